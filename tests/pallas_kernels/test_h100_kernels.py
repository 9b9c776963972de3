"""The decode and merge kernels compiled for an H100 that nobody has here: they are in the program, spill nothing, fit into
shared memory as often as the tuning means them to, and nothing as large as a pool is copied.

Needs the CUDA plugin, as tests/device/test_h100_compile.py says; skipped without it.
"""

import os
import re

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels import codec_spec, decode_pages, encode_pages, encoded_bytes, encoded_shape
from pallas_kernels.layout import QuantPool
from pallas_kernels.ragged_paged_attention.mosaic_gpu import entry, plan
from pallas_kernels.ragged_paged_attention.params import AttentionParams
from pallas_kernels.ragged_paged_attention.tuning import CHIPS, decode_tuning

H100 = """gpu_device_info {threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 core_count: 132
 shared_memory_per_core: 233472 threads_per_core_limit: 2048 fpus_per_core: 128 block_dim_limit_x: 2147483647
 block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800
 clock_rate_ghz: 1.98 device_memory_size: 84942979072 shared_memory_per_block_optin: 232448
 cuda_compute_capability { major: 9 } registers_per_core_limit: 65536 registers_per_block_limit: 65536}
 platform_name: "CUDA" dnn_version_info { major: 9 minor: 8 } device_description_str: "NVIDIA H100 80GB HBM3" """
SEQS, PAGES, KV_HEADS, POOL_PAGES = 64, 128, 8, 16384
RESERVED = 1024  # bytes of shared memory that the system takes from every block
CHIP = CHIPS["h100"]


@pytest.fixture(scope="module")
def sharding() -> NamedSharding:
    try:
        topology = topologies.get_topology_desc(platform="cuda", topology_name="h100", topology="1x1x1", target_config=H100)
    except Exception as error:
        if os.environ.get("JAXKV_REQUIRE_H100_COMPILER"):
            raise
        pytest.skip(f"no CUDA plugin to compile with: {str(error).splitlines()[0]}")
    return NamedSharding(Mesh(np.array(topology.devices), ("x",)), PartitionSpec())


def compile_call(sharding, dtype, head_dim, page_size, groups, tokens, sinks=False, queries="bfloat16", **options):
    defaults = dict(layout="head_major", scale=0.1, window=None, soft_cap=None, max_q_len=1, mass=None)
    params = AttentionParams(**defaults | options)
    quantised = dtype in ("int8", "float8_e4m3fn")
    q_heads = groups * KV_HEADS
    spec = plan.plan_spec(tokens, SEQS, q_heads=q_heads, kv_heads=KV_HEADS, head_dim=head_dim, page_size=page_size,
                          kv_dtype=dtype, max_q_len=params.max_q_len)
    shape = lambda dtype, *dims: jax.ShapeDtypeStruct(dims, dtype, sharding=sharding)  # noqa: E731
    pool = shape(dtype, POOL_PAGES, 2, KV_HEADS, page_size, head_dim)
    if quantised:
        pool = QuantPool(pool, shape("float32", *pool.shape[:-1]))
    i32 = jnp.int32
    args = (shape(queries if quantised else dtype, tokens, q_heads, head_dim), pool, shape(i32, SEQS, PAGES),
            shape(i32, SEQS), shape(i32, SEQS + 1), shape("float32", q_heads) if sinks else None,
            shape(i32, plan.plan_size(spec)))
    call = jax.jit(lambda *a: entry.ragged_paged_attention(*a, params=params), out_shardings=sharding)
    return call.lower(*args).compile(), sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(pool))


@pytest.mark.parametrize(
    "dtype, head_dim, page_size, groups, tokens, options",
    [
        ("bfloat16", 128, 16, 4, 64, dict()),
        ("float16", 128, 256, 1, 64, dict()),
        ("bfloat16", 128, 64, 16, 64, dict(window=4096, soft_cap=30.0, sinks=True)),
        ("bfloat16", 128, 16, 8, 512, dict(max_q_len=8)),
        ("bfloat16", 64, 16, 2, 64, dict()),
        ("bfloat16", 256, 16, 4, 512, dict(max_q_len=8, window=512, soft_cap=30.0)),
        ("float16", 80, 16, 4, 64, dict()),
        ("bfloat16", 128, 16, 4, 512, dict(max_q_len=8, mass="token", window=512, soft_cap=30.0)),
        ("bfloat16", 96, 32, 4, 64, dict()),
        ("int8", 128, 16, 4, 64, dict(mass="page")),
        ("int8", 128, 32, 4, 64, dict()),
        ("float8_e4m3fn", 256, 16, 4, 64, dict(mass="token")),
        ("int8", 80, 16, 4, 64, dict(mass="token")),
        ("float8_e4m3fn", 128, 64, 8, 512, dict(max_q_len=8, window=512, soft_cap=30.0)),
        ("int8", 64, 256, 4, 64, dict(sinks=True)),
        ("int8", 128, 16, 4, 64, dict(queries="float16")),
        ("int8", 64, 32, 4, 64, dict(queries="float16")),
        ("float8_e4m3fn", 80, 64, 4, 64, dict(queries="float16")),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else str(x),
)
def test_compiles_without_spills_within_shared_memory(
    sharding, tmp_path, monkeypatch, dtype, head_dim, page_size, groups, tokens, options
):
    monkeypatch.setenv("MOSAIC_GPU_DUMP_TO", str(tmp_path))
    kernels = 3 if "mass" in options else 2
    compiled, pool_bytes = compile_call(sharding, dtype, head_dim, page_size, groups, tokens, **options)
    assert compiled.as_text().count("mosaic_gpu_v2") == kernels, "decode, merge and, if asked for, mass"
    assert compiled.memory_analysis().temp_size_in_bytes < pool_bytes / 10

    reports = sorted(tmp_path.glob("*.ptxas"))
    assert 1 <= len(reports) <= kernels  # a kernel that an earlier test compiled is not compiled again
    together = decode_tuning(CHIP, head_dim, page_size, dtype).ctas_per_sm
    for report in reports:
        text = report.read_text()
        assert set(re.findall(r"(\d+) bytes spill", text)) == {"0"}, text
        [registers] = map(int, re.findall(r"Used (\d+) registers", text))
        passes = report.with_suffix(".mlir-passes.log").read_text()
        [smem] = {int(x) for x in re.findall(r"dynamic_shared_memory_size %c(\d+)_i32", passes)}
        assert smem <= CHIP.block_smem
        assert together * (smem + RESERVED) <= CHIP.sm_smem and together * 128 * registers <= 65536, (smem, registers)


@pytest.mark.parametrize("tokens, max_q_len", [(64, 1), (512, 512)])
def test_slices_that_a_kernel_gets_as_pointers_into_their_whole_are_aligned(sharding, tokens, max_q_len):
    """Mosaic GPU refuses arguments that do not start at 256 bytes. XLA makes such pointers since jax 0.11."""
    compiled, _ = compile_call(sharding, "bfloat16", 128, 16, 4, tokens, max_q_len=max_q_len)
    fused = [body for body in compiled.as_text().split("\n\n") if "mosaic_gpu_v2" in body and not body.startswith("ENTRY")]
    starts = [int(start) for body in fused for start in re.findall(r"slice=\{\[(\d+):", body)]
    assert all(4 * start % 256 == 0 for start in starts) and (starts or jax.__version_info__ < (0, 11)), starts


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_kv_codec_compiles_to_few_passes(sharding, dtype):
    """Encoding and decoding 16 pages of Llama-3-8B: temporaries smaller than the pages, a handful of fused kernels."""
    shape = (32, 2, 16, 8, 128)
    spec = codec_spec("int4", shape[0])
    pages = jax.ShapeDtypeStruct((16, *shape), jnp.dtype(dtype), sharding=sharding)
    encoded = jax.ShapeDtypeStruct((16, *encoded_shape(spec, shape, dtype)), jnp.uint8, sharding=sharding)
    for op, arg in ((lambda x: encode_pages(spec, x), pages), (lambda x: decode_pages(spec, x, shape, dtype), encoded)):
        compiled = jax.jit(op).lower(arg).compile()
        assert compiled.memory_analysis().temp_size_in_bytes < 16 * encoded_bytes(spec, shape, dtype)
        assert compiled.as_text().count("calls=%fused") < 10
