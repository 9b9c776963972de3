"""Strict numerics for every test: five virtual CPU devices (four for meshes, and as many threads as the GPU interpreter
needs), no implicit promotion, warnings are errors.

JAXKV_TEST_PLATFORM=gpu leaves the GPU in: for the tests marked so, which are skipped without one.
"""

import os

os.environ["JAX_PLATFORMS"] = {"gpu": "cuda,cpu"}.get(os.environ.get("JAXKV_TEST_PLATFORM", ""), "cpu")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=5"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import gc
import tempfile

import jax
import pytest
from hypothesis import HealthCheck, settings

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# What one module compiled and forgot, the next one finds. Not shared with other processes, which may read half a file.
COMPILED = tempfile.TemporaryDirectory(prefix="jaxkv-tests-")
jax.config.update("jax_compilation_cache_dir", COMPILED.name)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

settings.register_profile("jaxkv", deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("jaxkv")


@pytest.fixture(scope="module", autouse=True)
def forget_executables():
    """Compiled code takes hundreds of memory mappings an executable, of which a process may have 65,530."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture
def highest_precision():
    """Float32 products in float32, also on hardware that would rather not."""
    with jax.default_matmul_precision("highest"):
        yield
