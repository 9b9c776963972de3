"""Strict numerics for every test: five virtual CPU devices (four for meshes, and as many threads as the GPU interpreter
needs), no implicit promotion, warnings are errors.

Most of the suite's time was XLA's: so it optimises little, and the workers share what it made. Executors, and what is
compiled to see how much memory it takes, are fused as in service (``shipped.py``).

JAXKV_TEST_PLATFORM=gpu leaves the GPU in: for the tests marked so, which are skipped without one.
"""

import os
import tempfile
from importlib.metadata import version

os.environ["JAX_PLATFORMS"] = {"gpu": "cuda,cpu"}.get(os.environ.get("JAXKV_TEST_PLATFORM", ""), "cpu")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=5"
os.environ["XLA_FLAGS"] += " --xla_backend_optimization_level=0" * (os.environ["JAX_PLATFORMS"] == "cpu")
os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false" * version("jaxlib").startswith("0.10.")  # fatal to later ones
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# What one module, worker or server of a test compiled, the next one finds, and the user's own cache stays as it is. With a
# bound on its size JAX locks it: nobody reads half a file.
if "JAXKV_TEST_COMPILED" not in os.environ:
    COMPILED = tempfile.TemporaryDirectory(prefix="jaxkv-tests-")
    os.environ["JAXKV_TEST_COMPILED"] = COMPILED.name  # the workers inherit it
os.environ |= {"JAX_COMPILATION_CACHE_DIR": os.environ["JAXKV_TEST_COMPILED"],
               "JAX_COMPILATION_CACHE_MAX_SIZE": str(2**34), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
               "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}

import gc

import jax
import pytest
from hypothesis import HealthCheck, settings

from tests.shipped import as_shipped

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

settings.register_profile("jaxkv", deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("jaxkv")


@pytest.fixture(scope="module", autouse=True)
def forget_executables():
    """Compiled code takes hundreds of memory mappings an executable, of which a process may have 65,530."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture(name="as_shipped")
def fused_as_shipped():
    with as_shipped():
        yield


@pytest.fixture
def highest_precision():
    """Float32 products in float32, also on hardware that would rather not."""
    with jax.default_matmul_precision("highest"):
        yield
