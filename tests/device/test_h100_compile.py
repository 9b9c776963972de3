"""The engine step compiled for an H100 that nobody has here: it compiles, and nothing as large as a pool is copied.

Needs the CUDA plugin (no GPU): `pip install --no-deps jax-cuda12-plugin jax-cuda12-pjrt nvidia-cuda-runtime-cu12
nvidia-cuda-nvcc-cu12`, versions as jax. Skipped without it, unless JAXKV_REQUIRE_H100_COMPILER says that it must be there.
"""

import os
import re
from dataclasses import replace

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import pallas_kernels as ops
from jaxkv.device import models
from jaxkv.device.batch import BatchLayout, BatchShape
from jaxkv.device.sampling import init_sampler_state, mask_words
from jaxkv.device.sharding import param_shardings
from jaxkv.device.spec import KVSpec, kv_groups
from jaxkv.device.state import EngineState, state_shardings
from jaxkv.device.step import build_step

H100 = """gpu_device_info {threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 core_count: 132
 shared_memory_per_core: 233472 threads_per_core_limit: 2048 fpus_per_core: 128 block_dim_limit_x: 2147483647
 block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800
 clock_rate_ghz: 1.98 device_memory_size: 84942979072 shared_memory_per_block_optin: 232448
 cuda_compute_capability { major: 9 } registers_per_core_limit: 65536 registers_per_block_limit: 65536}
 platform_name: "CUDA" dnn_version_info { major: 9 minor: 8 } device_description_str: "NVIDIA H100 80GB HBM3" """
LLAMA = dict(architectures=["LlamaForCausalLM"], model_type="llama", hidden_size=1024, num_hidden_layers=4,
             num_attention_heads=16, num_key_value_heads=8, head_dim=64, intermediate_size=2048, vocab_size=4096,
             max_position_embeddings=4096, rms_norm_eps=1e-5, rope_theta=500000.0, hidden_act="silu",
             tie_word_embeddings=False)


def h100_mesh(gpus: int) -> Mesh:
    try:
        topology = topologies.get_topology_desc(platform="cuda", topology_name="h100", topology=f"1x1x{gpus}",
                                                target_config=H100)
    except Exception as error:
        if os.environ.get("JAXKV_REQUIRE_H100_COMPILER"):
            raise
        pytest.skip(f"no CUDA plugin to compile with: {str(error).splitlines()[0]}")
    return Mesh(np.array(topology.devices), ("tp",))


def step_of(
    mesh: Mesh, dtype: str, shape: BatchShape, pages: int, config: dict = LLAMA, windows: bool = True, impl: str = "auto",
    platform: str | None = None,
):
    """The jitted step, its arguments as the executor has them, and the bytes of a device's pools."""
    tp, platform = mesh.size, platform or ("cpu" if mesh.devices.flat[0].platform == "cpu" else "gpu")
    spec = models.spec_from_config(config, dtype, tp=tp, out_first=platform == "cpu")
    if windows:
        spec = replace(spec, windows=(None, 512) * (spec.num_layers // 2))
    groups = kv_groups(spec, tp, dtype)
    kv = KVSpec(groups, (pages,) * len(groups), 16, ops.resolve_layout("auto", spec.head_dim, platform))
    planner = ops.attention_planner(
        impl, tokens=shape.tokens, seqs=shape.seqs, q_heads=spec.num_heads // tp, kv_heads=groups[0].kv_heads // tp,
        head_dim=spec.head_dim, page_size=16, kv_dtype=dtype, max_q_len=1 if shape.decode else None)
    layout = BatchLayout(shape, len(groups), 256, planner.size)
    whole = NamedSharding(mesh, PartitionSpec())
    shardings = state_shardings(kv, mesh)
    params = tuple(jax.ShapeDtypeStruct(d.shape, d.dtype, sharding=s)
                   for d, s in zip(models.weight_table(spec), param_shardings(spec, mesh)))
    pools = tuple(tuple(jax.ShapeDtypeStruct(ops.pool_shape(kv.layout, pages, 16, g.kv_heads, g.head_dim),
                                             ops.storage_dtype(dtype, platform), sharding=s) for s in row)
                  for g, row in zip(groups, shardings.pools))
    sampler = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole),
                           jax.eval_shape(lambda: init_sampler_state(64, spec.vocab_size)))
    state = EngineState(pools, jax.ShapeDtypeStruct((64,), jnp.int32, sharding=whole), sampler)
    buffer = jax.ShapeDtypeStruct((layout.words,), jnp.int32, sharding=whole)
    masks = jax.ShapeDtypeStruct((shape.rows, mask_words(spec.vocab_size)), jnp.int32, sharding=whole)
    step = jax.jit(build_step(spec, kv, layout, mesh, impl), donate_argnums=1, out_shardings=(shardings, whole))
    pool_bytes = sum(int(np.prod(p.shape)) * p.dtype.itemsize for row in pools for p in row) // tp
    return step, (params, state, buffer, masks), pool_bytes


def compile_step(*args, **options):
    """The compiled step and the bytes of a device's pools; arguments of `step_of`."""
    step, arguments, pool_bytes = step_of(*args, **options)
    return step.lower(*arguments).compile(), pool_bytes


@pytest.mark.parametrize("shape", [BatchShape(64, 64, 64, decode=True), BatchShape(512, 64, 64)], ids=["decode", "mixed"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_step_has_no_pool_sized_temporary(dtype, shape):
    mesh = h100_mesh(1)
    small, small_pool = compile_step(mesh, dtype, shape, pages=4096)
    large, large_pool = compile_step(mesh, dtype, shape, pages=16384)
    a, b = small.memory_analysis(), large.memory_analysis()
    assert a.alias_size_in_bytes >= small_pool, "the pools are updated in place"
    assert b.temp_size_in_bytes < large_pool / 10
    assert b.temp_size_in_bytes - a.temp_size_in_bytes < (large_pool - small_pool) / 100, "temporaries grow with the pool"


def test_four_devices_reduce_twice_per_layer_and_gather_nothing_of_the_pool():
    compiled, pool = compile_step(h100_mesh(4), "bfloat16", BatchShape(64, 64, 64, decode=True), pages=4096)
    text = compiled.as_text()
    assert "all-reduce" in text
    assert compiled.memory_analysis().temp_size_in_bytes < pool / 4


LLAMA_8B = LLAMA | dict(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, head_dim=128,
                        intermediate_size=14336, vocab_size=128256)
LLAMA_70B = LLAMA_8B | dict(hidden_size=8192, num_hidden_layers=80, num_attention_heads=64, intermediate_size=28672)


@pytest.mark.parametrize("shape", [BatchShape(64, 64, 64, decode=True), BatchShape(2048, 64, 64)], ids=["decode", "mixed"])
@pytest.mark.parametrize("config, gpus", [(LLAMA_8B, 1), (LLAMA_70B, 8)], ids=["8b", "70b"])
def test_whole_step_with_our_kernels(config, gpus, shape):
    """Llama-3-8B on one H100 and 70B on eight: our kernels are in it, KV and weights stay where they are."""
    pages = 16384  # 262,144 tokens
    compiled, pool = compile_step(h100_mesh(gpus), "bfloat16", shape, pages, config, windows=False, impl="mosaic_gpu")
    text, memory = compiled.as_text(), compiled.memory_analysis()
    layers = config["num_hidden_layers"]
    per_layer = 2 if shape.decode else 3  # decode and merge; a mixed step also prefills
    assert text.count("custom_call_target=\"mosaic_gpu_v2\"") == per_layer * layers
    weights = memory.argument_size_in_bytes - pool
    assert memory.alias_size_in_bytes >= pool and memory.argument_size_in_bytes < 80e9
    largest_weight = config["vocab_size"] * config["hidden_size"] * 2 / gpus
    assert memory.temp_size_in_bytes < min(weights, pool) / 8 + largest_weight / 4, "no pool-sized or weight-sized temporary"
    kinds = set(re.findall(r" (all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)(?:-start)?\(", text))
    assert ("all-reduce" in kinds) == (gpus > 1) and (gpus > 1 or not kinds)
