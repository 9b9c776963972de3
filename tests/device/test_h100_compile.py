"""The engine step compiled for an H100 that nobody has here: it compiles, and no pool and no weight is copied.

Needs the CUDA plugin (no GPU): `pip install --no-deps jax-cuda12-plugin jax-cuda12-pjrt nvidia-cuda-runtime-cu12
nvidia-cuda-nvcc-cu12`, versions as jax. Skipped without it, unless JAXKV_REQUIRE_H100_COMPILER says that it must be there.
"""

import os
from collections import Counter
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
from tests import hlo

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


def compile_checked(mesh: Mesh, dtype: str, shape: BatchShape, pages: int, config: dict = LLAMA, **options):
    """`compile_step`, having asserted that the pools are updated in place and that neither pools nor weights are copied."""
    step, arguments, pool_bytes = step_of(mesh, dtype, shape, pages, config, **options)
    compiled = step.lower(*arguments).compile()
    assert compiled.memory_analysis().alias_size_in_bytes >= pool_bytes, "the pools are updated in place"
    check_copies(compiled, arguments, shape, config, mesh.size, options.get("impl") == "mosaic_gpu")
    return compiled, pool_bytes


def check_copies(compiled, arguments: tuple, shape: BatchShape, config: dict, gpus: int, kernels: bool) -> None:
    """Outside fusions a pool is made once, by the scatter that writes its layer's KV, and no weight at all. The text says so
    even where a copy would reuse the bytes of activations; the bytes bound what is made in other shapes."""
    params, state = arguments[:2]
    weights, pools = ([x.sharding.shard_shape(x.shape) for x in jax.tree.leaves(tree) if x.ndim > 1]
                      for tree in (params, state.pools))
    item = params[0].dtype.itemsize
    made = hlo.made(compiled.as_text(), weights + pools, shape.tokens, shape.rows)
    assert made == Counter(("fusion", pool) for pool in pools)

    if not kernels:  # XLA's attention has buffers of its own
        return
    rows, tokens, hidden = shape.rows, shape.tokens, config["hidden_size"]
    logits = rows * config["vocab_size"] * 4
    sampling = 3 * logits  # at once; jax 0.10 gathers them on each of several devices
    mlp = tokens * (3 * config["intermediate_size"] // gpus + hidden) * item
    sums = tokens * hidden * (4 + 4 + item + item) * (gpus > 1)  # a product before and after its all-reduce, and its addends
    least = min(int(np.prod(x)) for x in weights + pools) * item
    # Beyond these activations (1.0 times on jax 0.12, up to 1.4 on 0.10) less than a copy of anything.
    assert compiled.memory_analysis().temp_size_in_bytes < 1.5 * max(sampling, mlp, sums) + least / 4


def check_reductions(text: str, shape: BatchShape, config: dict) -> None:
    """After attention and after the MLP of each layer; over the entry two more: what the embedding, split by token id, gives,
    and the first logit of each row, looked at for NaN. The last layer's MLP sees only the rows that are sampled from."""
    layers, hidden = config["num_hidden_layers"], config["hidden_size"]
    reductions = Counter({("all-reduce", (shape.tokens, hidden)): 2 * layers - 1})
    reductions.update({("all-reduce", (shape.rows, hidden)): 2, ("all-reduce", (shape.rows, 1)): 1})
    assert hlo.collectives(text, entry=True) == reductions


@pytest.mark.parametrize("shape", [BatchShape(64, 64, 64, decode=True), BatchShape(512, 64, 64)], ids=["decode", "mixed"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_step_has_no_pool_sized_temporary(dtype, shape):
    mesh = h100_mesh(1)
    small, small_pool = compile_checked(mesh, dtype, shape, pages=4096)
    large, large_pool = compile_checked(mesh, dtype, shape, pages=16384)
    a, b = small.memory_analysis(), large.memory_analysis()
    assert b.temp_size_in_bytes < large_pool / 10
    assert b.temp_size_in_bytes - a.temp_size_in_bytes < (large_pool - small_pool) / 100, "temporaries grow with the pool"


def test_four_devices_reduce_twice_per_layer_and_gather_nothing_of_the_pool():
    rows = 64
    shape = BatchShape(rows, 64, rows, decode=True)
    compiled, pool = compile_checked(h100_mesh(4), "bfloat16", shape, pages=4096)
    text = compiled.as_text()
    check_reductions(text, shape, LLAMA)
    gathered = {shape for kind, shape in hlo.collectives(text, entry=False) if kind != "all-reduce"}
    vocab = LLAMA["vocab_size"]  # the likeliest of each device, and their sums; on jax 0.10 the logits
    assert gathered <= {(4 * rows, 20), (4 * rows, 64), (rows, 4), (rows, vocab), (rows, vocab // 4)}
    assert compiled.memory_analysis().temp_size_in_bytes < pool / 4


LLAMA_8B = LLAMA | dict(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, head_dim=128,
                        intermediate_size=14336, vocab_size=128256)
LLAMA_70B = LLAMA_8B | dict(hidden_size=8192, num_hidden_layers=80, num_attention_heads=64, intermediate_size=28672)


@pytest.mark.parametrize("shape", [BatchShape(64, 64, 64, decode=True), BatchShape(2048, 64, 64)], ids=["decode", "mixed"])
@pytest.mark.parametrize("config, gpus", [(LLAMA_8B, 1), (LLAMA_70B, 8)], ids=["8b", "70b"])
def test_whole_step_with_our_kernels(config, gpus, shape):
    """Llama-3-8B on one H100 and 70B on eight: our kernels are in it, KV and weights stay where they are."""
    pages = 16384  # 262,144 tokens
    compiled, _ = compile_checked(h100_mesh(gpus), "bfloat16", shape, pages, config, windows=False, impl="mosaic_gpu")
    text, memory = compiled.as_text(), compiled.memory_analysis()
    per_layer = 2 if shape.decode else 3  # decode and merge; a mixed step also prefills
    assert text.count("custom_call_target=\"mosaic_gpu_v2\"") == per_layer * config["num_hidden_layers"]
    assert memory.argument_size_in_bytes < 80e9
    if gpus == 1:
        assert not hlo.collectives(text)
        return
    check_reductions(text, shape, config)
    # Elsewhere only sampling and prompt log-probabilities: logits or parts of them, the largest of blocks of them, pairs.
    rows, vocab = shape.rows, config["vocab_size"]
    outside = hlo.collectives(text, entry=False)
    assert {shape for kind, shape in outside if kind == "all-gather"} <= {
        (rows, 2), *((rows, vocab // parts) for parts in (1, 2, 8, 128, 256))}
    assert {kind for kind, _ in outside} <= {"all-gather", "all-reduce"}
    assert outside["all-reduce", (rows, config["hidden_size"])] == 2, "the last layer, for the rows of prompt log-probabilities"
