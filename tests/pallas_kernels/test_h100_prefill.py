"""The Hopper prefill kernel and page moves compiled for an H100 that nobody has here.

Needs the CUDA plugin (no GPU), see tests/device/test_h100_compile.py. Skipped without it, unless JAXKV_REQUIRE_H100_COMPILER
says that it must be there.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import pallas_kernels as pk
from pallas_kernels.layout import QuantPool
from pallas_kernels.page_copy import mosaic_gpu
from pallas_kernels.ragged_paged_attention.mosaic_gpu.prefill import prefill_attention
from pallas_kernels.ragged_paged_attention.mosaic_gpu.prefill_shape import CONSUMERS, registers
from pallas_kernels.ragged_paged_attention.params import AttentionParams

SHARED_MEMORY = 232448
H100 = f"""gpu_device_info {{threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 core_count: 132
 shared_memory_per_core: 233472 threads_per_core_limit: 2048 fpus_per_core: 128 block_dim_limit_x: 2147483647
 block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800
 clock_rate_ghz: 1.98 device_memory_size: 84942979072 shared_memory_per_block_optin: {SHARED_MEMORY}
 cuda_compute_capability {{ major: 9 }} registers_per_core_limit: 65536 registers_per_block_limit: 65536}}
 platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 8 }} device_description_str: "NVIDIA H100 80GB HBM3" """


def h100():
    try:
        return topologies.get_topology_desc(platform="cuda", topology_name="h100", topology="1x1x1", target_config=H100)
    except Exception as error:
        if os.environ.get("JAXKV_REQUIRE_H100_COMPILER"):
            raise
        pytest.skip(f"no CUDA plugin to compile with: {str(error).splitlines()[0]}")


def compile_for_h100(function, *args, donate=()):
    """args: (shape, dtype)."""
    where = NamedSharding(Mesh(np.array(h100().devices), ("x",)), PartitionSpec())
    args = [jax.ShapeDtypeStruct(shape, dtype, sharding=where) for shape, dtype in args]
    return jax.jit(function, out_shardings=where, donate_argnums=donate).lower(*args).compile()


def compile_prefill(head_dim, page_size, groups, *, dtype="bfloat16", kv_dtype=None, window=None, soft_cap=None,
                    num_pages=1024, tokens=512):
    params = AttentionParams("head_major", 0.1, window, soft_cap, None)
    kv_heads, seqs = 2, 8
    shape = pk.pool_shape("head_major", num_pages, page_size, kv_heads, head_dim)
    pool = [(shape, kv_dtype), (shape[:-1], "float32")] if kv_dtype else [(shape, dtype)]

    def attend(*args):
        q, *pool, page_table, kv_lens, cu_q_lens, tiles = args
        return prefill_attention(q, QuantPool(*pool) if kv_dtype else pool[0], page_table, kv_lens, cu_q_lens, tiles,
                                 params=params)

    return compile_for_h100(attend, ((tokens, groups * kv_heads, head_dim), dtype), *pool, ((seqs, 64), jnp.int32),
                            ((seqs,), jnp.int32), ((seqs + 1,), jnp.int32), ((tokens // 128 + seqs, 4), jnp.int32))


def resources(call: str, folder: Path) -> tuple[int, int, int]:
    """Bytes of spill stores and of dynamic shared memory, and registers of a thread at launch, that compiling `call` takes.
    In a process of its own: the compiler reads where to dump from its environment."""
    code = f"from tests.pallas_kernels.test_h100_prefill import *\n{call}"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"MOSAIC_GPU_DUMP_TO": str(folder)},
                   cwd=Path(__file__).parents[2], capture_output=True, text=True)
    (assembler,), (passes,) = folder.glob("*.ptxas"), folder.glob("*.mlir-passes.log")
    spills = re.findall(r"(\d+) bytes spill stores", assembler.read_text())
    shared = re.findall(r"dynamic_shared_memory_size %c(\d+)", passes.read_text())
    [registers] = re.findall(r"Used (\d+) registers", assembler.read_text())
    return max(map(int, spills)), max(map(int, shared)), int(registers)


@pytest.mark.parametrize("head_dim, page_size, groups, options", [
    (64, 16, 1, {}),
    (80, 16, 4, {}),
    (96, 64, 2, {}),
    (128, 16, 4, dict(window=1000, soft_cap=30.0)),
    (128, 128, 3, dict(dtype="float16")),
    (256, 256, 8, {}),
    (64, 128, 8, dict(kv_dtype="float8_e4m3fn", dtype="float16")),
    (96, 16, 2, dict(kv_dtype="int8")),
])
def test_prefill_compiles(head_dim, page_size, groups, options):
    assert "mosaic_gpu" in compile_prefill(head_dim, page_size, groups, **options).as_text()


BOTH = dict(window=1000, soft_cap=30.0)


@pytest.mark.parametrize("head_dim, page_size, groups, most, options", [
    (128, 16, 4, 0, {}), (256, 16, 4, 20, {}), (64, 16, 1, 0, BOTH), (128, 16, 4, 48, BOTH), (256, 16, 4, 68, BOTH),
    (128, 16, 4, 0, BOTH | dict(kv_dtype="int8")), (80, 16, 4, 0, BOTH | dict(kv_dtype="int8")),
    (128, 64, 4, 0, BOTH | dict(kv_dtype="float8_e4m3fn")),
])
def test_prefill_spills_no_more_than_stated_and_fits_shared_memory(head_dim, page_size, groups, most, options, tmp_path):
    """At head_dim 256, and at 128 with window and soft cap together, a few scalars of a job are spilled, as `prefill_tuning`
    says: outside the loop over unmasked blocks. The bounds are what the compiler reports today."""
    h100()  # skips without a compiler
    spills, shared, launched = resources(f"compile_prefill({head_dim}, {page_size}, {groups}, **{options!r})", tmp_path)
    assert spills <= most and 0 < shared <= SHARED_MEMORY
    consumer, producer, widener = registers(head_dim, "kv_dtype" in options)
    assert CONSUMERS * consumer + producer + widener <= (4 if "kv_dtype" in options else 3) * launched, "setmaxnreg would hang"


def test_prefill_temporaries_do_not_grow_with_the_pool():
    small, large = (compile_prefill(128, 16, 4, num_pages=n).memory_analysis().temp_size_in_bytes for n in (1024, 16384))
    assert small == large


@pytest.mark.parametrize("layout", ["token_major", "head_major"])
def test_page_moves_copy_nothing_else(layout):
    layers, pages, page = 3, 16, (16, 8, 128)
    pool = (pk.pool_shape(layout, 4096, *page), jnp.bfloat16)
    data = ((pages, layers, 2, *page), jnp.bfloat16)
    index = ((pages,), jnp.int32)
    size = layers * int(np.prod(pool[0])) * 2
    gather = compile_for_h100(lambda i, *pools: mosaic_gpu.gather_pages(pools, i, layout=layout), index, *[pool] * layers)
    scatter = compile_for_h100(lambda i, d, *pools: mosaic_gpu.scatter_pages(pools, i, d, layout=layout), index, data,
                               *[pool] * layers, donate=range(2, 2 + layers))
    for compiled in (gather, scatter):
        assert "mosaic_gpu" in compiled.as_text() and compiled.memory_analysis().temp_size_in_bytes < 4096
    assert scatter.memory_analysis().alias_size_in_bytes == size, "pools are written in place"
