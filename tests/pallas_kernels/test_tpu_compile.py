"""The TPU kernels, and the engine step with them, compiled for v5e and v6e chips that nobody has here.

Needs libtpu (no TPU), which `pip install "jax[tpu]"` brings. Skipped without it, unless JAXKV_REQUIRE_TPU_COMPILER says that
it must be there. VMEM and HBM that do not suffice are compile errors.
"""

import os
import re
from collections import Counter
from dataclasses import dataclass
from functools import cache, partial

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

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
from jaxkv.device.state import EngineState, compile_zero_state, page_bytes, pool_structs, state_shardings
from jaxkv.device.step import build_step
from jaxkv.runtime.page_ops import PageForm, compile_page_ops
from jaxkv.types import KVGroup
from pallas_kernels.kv_write import api as kv_write_api
from pallas_kernels.kv_write.mosaic_tpu import kv_write
from pallas_kernels.layout import QUANT_DTYPES
from pallas_kernels.page_copy import api as page_copy_api
from pallas_kernels.page_copy.mosaic_tpu import copy_pages, gather_pages, scatter_pages
from pallas_kernels.ragged_paged_attention import api as attention_api
from pallas_kernels.ragged_paged_attention.mosaic_tpu import ragged_paged_attention
from tests import hlo

CHIPS = ["v5e", "v6e"]
MIB = 1 << 20


@pytest.fixture(autouse=True)
def only_tpu_kernels(monkeypatch):
    """Every op runs as the kernel under test or not at all."""
    for api, name, op in ((kv_write_api, "IMPLEMENTATIONS", kv_write), (page_copy_api, "GATHER", gather_pages),
                          (page_copy_api, "SCATTER", scatter_pages), (page_copy_api, "COPY", copy_pages),
                          (attention_api, "IMPLEMENTATIONS", ragged_paged_attention)):
        monkeypatch.setattr(api, name, {"mosaic_tpu": op})


@cache
def tpu_devices(name: str) -> tuple:
    try:
        return tuple(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)
    except Exception as error:
        if os.environ.get("JAXKV_REQUIRE_TPU_COMPILER"):
            raise
        pytest.skip(f"no libtpu to compile with: {str(error).splitlines()[0]}")


def tpu_mesh(name: str, devices: int) -> Mesh:
    return Mesh(np.array(tpu_devices(name)[:devices]), ("tp",))


@dataclass(frozen=True)
class Shapes:
    """One layer's attention of Llama-3-8B over `tp` chips, unless said otherwise."""

    chip: str = "v5e"
    tokens: int = 64
    seqs: int = 64
    page_size: int = 16
    tp: int = 1
    heads: tuple[int, int] = (32, 8)
    head_dim: int = 128
    dtype: str = "bfloat16"
    kv_dtype: str = "bfloat16"
    columns: int = 512
    pages: int = 4096
    kv_layout: str = "auto"

    @property
    def mesh(self) -> Mesh:
        return tpu_mesh(f"{self.chip}:2x2", self.tp)

    @property
    def ops(self) -> ops.MeshOps:
        return ops.MeshOps(self.mesh, self.layout)

    @property
    def layout(self) -> str:
        return ops.resolve_layout(self.kv_layout, self.head_dim, "tpu")

    def array(self, shape, dtype, *spec) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=NamedSharding(self.mesh, PartitionSpec(*spec)))

    def pool(self):
        sharding, page = NamedSharding(self.mesh, self.ops.pool_spec), (self.page_size, self.heads[1], self.head_dim)
        arrays = jax.eval_shape(lambda: ops.zero_pool(self.layout, self.pages, *page, self.kv_dtype, "tpu"))
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=ops.pool_format(x.ndim, sharding, "tpu")), arrays)

    def formats(self):
        return jax.tree.map(lambda x: x.format, self.pool())

    def rows(self, heads: int) -> jax.ShapeDtypeStruct:
        return self.array((self.tokens, heads, self.head_dim), self.dtype, None, "tp")

    def ints(self, *shape: int) -> jax.ShapeDtypeStruct:
        return self.array(shape, "int32")


def bytes_of(tree, devices=1) -> int:
    return sum(int(np.prod(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)) // devices


def compile_for(function, *args, **jit_options):
    return jax.jit(function, **jit_options).lower(*args).compile()


def compile_attention(s: Shapes, **options):
    static = dict(scale=0.1) | options
    sinks = s.array((s.heads[0],), "float32", "tp") if static.pop("sinks", False) else None
    call = partial(s.ops.ragged_paged_attention, **static)
    return compile_for(lambda q, pool, table, kv, cu, sinks: call(q, pool, table, kv, cu, sinks=sinks), s.rows(s.heads[0]),
                       s.pool(), s.ints(s.seqs, s.columns), s.ints(s.seqs), s.ints(s.seqs + 1), sinks)


def compile_write(s: Shapes):
    return compile_for(s.ops.kv_write, s.pool(), s.rows(s.heads[1]), s.rows(s.heads[1]), s.ints(s.tokens),
                       donate_argnums=0, out_shardings=s.formats())


def kernels(compiled) -> int:
    return compiled.as_text().count('custom_call_target="tpu_custom_call"')


def temporaries(compiled) -> int:
    return compiled.memory_analysis().temp_size_in_bytes


COLLECTIVES = r" (all-gather|all-reduce|all-to-all|collective-permute|collective-broadcast|reduce-scatter)(?:-start)?\("


def collectives(text: str) -> list[str]:
    return re.findall(COLLECTIVES, text)


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("page_size", [16, 64])
@pytest.mark.parametrize("tokens,options,calls", [(64, dict(max_q_len=1), 1), (2048, dict(), 2)], ids=["decode", "mixed"])
def test_attention(chip, page_size, tokens, options, calls):
    s = Shapes(chip=chip, tokens=tokens, page_size=page_size, columns=8192 // page_size)
    compiled = compile_attention(s, return_lse=True, **options)
    assert kernels(compiled) == calls
    assert temporaries(compiled) < bytes_of(s.pool()) / 8


@pytest.mark.parametrize("shape", [
    dict(page_size=256), dict(page_size=48, columns=64), dict(head_dim=64), dict(head_dim=80), dict(head_dim=96),
    dict(head_dim=64, kv_layout="head_major"), dict(head_dim=64, heads=(14, 2), page_size=32),
    dict(head_dim=64, heads=(12, 12)), dict(head_dim=256, page_size=32), dict(heads=(28, 4), page_size=32),
    dict(heads=(32, 32)), dict(dtype="float32", kv_dtype="float32"), dict(dtype="float32")], ids=str)
def test_attention_of_other_shapes_copies_no_pool(shape):
    s = Shapes(**dict(tokens=256, seqs=8, columns=128) | shape)
    compiled = compile_attention(s, window=1000, soft_cap=30.0, sinks=True)
    assert kernels(compiled) == 2
    assert temporaries(compiled) < bytes_of(s.pool()) / 8


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("kv_dtype", QUANT_DTYPES)
@pytest.mark.parametrize("page_size,head_dim", [(16, 128), (64, 128), (16, 64), (64, 96)])
def test_attention_over_quantised_pools_with_mass(chip, kv_dtype, page_size, head_dim):
    s = Shapes(chip=chip, tokens=256, seqs=8, columns=128, page_size=page_size, kv_dtype=kv_dtype, head_dim=head_dim)
    compiled = compile_attention(s, return_mass="page")
    assert kernels(compiled) == 3
    assert temporaries(compiled) < bytes_of(s.pool()) / 8


@pytest.mark.parametrize("shape", [
    dict(page_size=48), dict(page_size=96), dict(heads=(32, 32), dtype="float32", kv_dtype="float32")], ids=str)
def test_mass_of_other_pages_and_of_many_heads(shape):
    s = Shapes(**dict(tokens=256, seqs=8, columns=64) | shape)
    assert kernels(compile_attention(s, return_mass="token")) == 3


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("shape", [
    dict(), dict(page_size=64, tokens=2048), dict(kv_dtype="float32"), dict(kv_dtype="int8"),
    dict(kv_dtype="int8", page_size=64), dict(kv_dtype="float8_e4m3fn", page_size=64), dict(head_dim=80), dict(head_dim=64),
    dict(head_dim=64, kv_dtype="int8"), dict(head_dim=96, kv_dtype="float8_e4m3fn")], ids=str)
def test_write_in_place(chip, shape):
    s = Shapes(chip=chip, **shape)
    compiled = compile_write(s)
    assert kernels(compiled) == len(jax.tree.leaves(s.pool()))
    assert compiled.memory_analysis().alias_size_in_bytes >= bytes_of(s.pool())
    assert temporaries(compiled) < 32 * MIB


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("kv_dtype,head_dim", [("bfloat16", 128), ("int8", 128), ("bfloat16", 64), ("int8", 80)])
def test_page_moves(chip, kv_dtype, head_dim):
    s = Shapes(chip=chip, kv_dtype=kv_dtype, head_dim=head_dim, pages=1024)
    pools, formats, n = (s.pool(),) * 32, (s.formats(),) * 32, 16
    width, dtype = ops.canonical_row(kv_dtype, s.head_dim)
    data = s.array((n, 32, 2, s.page_size, 8, width), dtype)
    gathered = compile_for(s.ops.gather_pages, pools, s.ints(n))
    scattered = compile_for(s.ops.scatter_pages, pools, s.ints(n), data, donate_argnums=0, out_shardings=formats)
    copied = compile_for(s.ops.copy_pages, pools, s.ints(n), s.ints(n), donate_argnums=0, out_shardings=formats)
    parts = len(jax.tree.leaves(pools[0]))
    assert [kernels(c) for c in (gathered, scattered, copied)] == [parts, parts, 2 * parts]
    for compiled in (gathered, scattered, copied):
        assert temporaries(compiled) < 4 * bytes_of(data)
    for compiled in (scattered, copied):
        assert compiled.memory_analysis().alias_size_in_bytes >= bytes_of(pools)


@pytest.mark.parametrize("chip", CHIPS)
def test_heads_over_four_chips_need_no_collective(chip):
    s = Shapes(chip=chip, tp=4)
    for compiled in (compile_attention(s), compile_write(s)):
        assert kernels(compiled) and not collectives(compiled.as_text())
        assert temporaries(compiled) < bytes_of(s.pool()) / 16


def llama(hidden: int, layers: int, heads: int, mlp: int, head_dim: int = 128) -> dict:
    return dict(architectures=["LlamaForCausalLM"], model_type="llama", hidden_size=hidden, num_hidden_layers=layers,
                num_attention_heads=heads, num_key_value_heads=8, head_dim=head_dim, intermediate_size=mlp, vocab_size=128256,
                max_position_embeddings=8192, rms_norm_eps=1e-5, rope_theta=500000.0, hidden_act="silu",
                tie_word_embeddings=False)


LLAMA_8B, LLAMA_70B = llama(4096, 32, 32, 14336), llama(8192, 80, 64, 28672)
NARROW = llama(2048, 4, 32, 8192, head_dim=64)  # Llama-3.2-1B with a quarter of its layers
DECODE, MIXED = BatchShape(64, 64, 64, decode=True), BatchShape(2048, 64, 64)


@pytest.mark.parametrize("config,topology,shape,pages,kv_dtype", [
    (LLAMA_8B, "v5e:2x4", DECODE, 32768, "bfloat16"), (LLAMA_8B, "v6e:2x2", MIXED, 16384, "bfloat16"),
    (LLAMA_70B, "v6e:4x4", DECODE, 8192, "bfloat16"), (NARROW, "v5e:2x2", DECODE, 32768, "bfloat16"),
    (NARROW, "v6e:2x2", DECODE, 32768, "int8")],
    ids=["8b-v5e-tp8-decode", "8b-v6e-tp4-mixed", "70b-v6e-tp16-decode", "narrow-v5e-tp4-decode", "narrow-v6e-tp4-int8"])
def test_engine_step(config, topology, shape, pages, kv_dtype):
    """Fits HBM; no temporary as large as a pool or a part of the weights; the layers reduce and do nothing else."""
    mesh = Mesh(np.array(tpu_devices(topology)), ("tp",))
    compiled, kv, params = compile_step(config, mesh, shape, pages, kv_dtype)
    layers, memory, text = config["num_hidden_layers"], compiled.memory_analysis(), compiled.as_text()
    pool, weights = page_bytes(kv, mesh)[0] * pages // mesh.size, bytes_of(params, mesh.size)
    assert kernels(compiled) == layers * ((1 if shape.decode else 2) + (2 if kv_dtype in QUANT_DTYPES else 1))
    assert memory.alias_size_in_bytes >= pool, "the pools are updated in place"
    formats = compile_zero_state(kv, 8, 64, mesh).output_formats.pools
    assert formats == compiled.input_formats[0][1].pools == compiled.output_formats[0].pools
    # Prefetches into vector memory apart, a pool is made once, by the kernel that writes its layer's KV, and no weight at all.
    matrices, pools = ([x.sharding.shard_shape(x.shape) for x in jax.tree.leaves(tree) if x.ndim > 1]
                       for tree in (params, pool_structs(kv, mesh)))
    made = hlo.made(text, matrices + pools, shape.tokens, shape.rows)
    # The scales of this quantised pool are small enough for vector memory: they are fetched, written there and stored back.
    assert made == Counter(("custom-call" if len(x) == len(pools[0]) else "copy-start", x) for x in pools)
    logits, sums = shape.rows * config["vocab_size"] * 4, shape.tokens * config["hidden_size"] * 12
    # Beyond these activations (1.0 times on jax 0.12, up to 1.4 on 0.10) a sixteenth of what a layer has.
    assert memory.temp_size_in_bytes < 1.5 * max(2 * logits, sums) + min(pool, weights) / layers / 16
    # After attention and after the MLP of each layer, the last MLP for the sampled rows only; for the embedding, split by token
    # id; and for the first logit of each row, looked at for NaN. Conditional computations belong to sampling and prompt
    # log-probabilities.
    reduced = hlo.collectives(text, entry=True)
    assert {kind for kind, _ in reduced} == {"all-reduce"} and reduced.total() == 2 * layers + 2
    assert reduced["all-reduce", (shape.tokens, config["hidden_size"])] >= 2 * layers - 1


@pytest.mark.parametrize("chip,kv_dtype,layout", [
    ("v5e", "bfloat16", "paired"), ("v5e", "bfloat16", "head_major"), ("v6e", "int8", "paired")])
def test_executables_agree_on_the_format_and_size_of_the_pools(chip, kv_dtype, layout):
    kv = KVSpec((KVGroup((0, 1), 8, 64, kv_dtype),), (512,), 16, layout)
    mesh = tpu_mesh(f"{chip}:2x2", 2)
    zeros = compile_zero_state(kv, 8, 64, mesh)
    formats = zeros.output_formats.pools[0]
    for (_, name, _), moved in compile_page_ops(kv, mesh, PageForm(kv, mesh)).items():
        assert moved.input_formats[0][0] == formats
        assert name == "gather" or moved.output_formats == formats
        assert temporaries(moved) < MIB
    pools = page_bytes(kv, mesh)[0] * kv.num_pages[0] // mesh.size
    assert pools <= zeros.memory_analysis().output_size_in_bytes < pools + MIB / 4
    assert temporaries(zeros) < MIB


@pytest.mark.parametrize("shape", [
    (16, 8, 64, "bfloat16"), (16, 8, 80, "int8"), (48, 3, 96, "float8_e4m3fn"), (256, 12, 256, "int8"), (20, 2, 64, "bfloat16"),
    (1, 1, 8, "float32"), (1, 5, 300, "bfloat16"), (6, 1, 128, "int8"), (10, 4, 64, "float32")], ids=str)
@pytest.mark.parametrize("layout", ops.LAYOUTS)
def test_bytes_of_a_page(layout, shape):
    pool = jax.eval_shape(lambda: ops.zero_pool(layout, 64, *shape, "tpu"))
    at = NamedSharding(tpu_mesh("v5e:2x2", 1), PartitionSpec())
    sizes = [compile_for(partial(jnp.zeros, x.shape, x.dtype), out_shardings=ops.pool_format(x.ndim, at, "tpu"))
             .memory_analysis().output_size_in_bytes for x in jax.tree.leaves(pool)]
    assert sum(sizes) == 64 * ops.pool_page_bytes(layout, *shape, "tpu")


def compile_step(config: dict, mesh: Mesh, shape: BatchShape, pages: int, kv_dtype: str = "bfloat16"):
    page_size, columns, slots, tp = 16, 512, 64, mesh.size
    spec = models.spec_from_config(config, "bfloat16", tp=tp, out_first=False)
    groups = kv_groups(spec, tp, kv_dtype)
    kv = KVSpec(groups, (pages,) * len(groups), page_size, ops.resolve_layout("auto", spec.head_dim, "tpu"))
    layout = BatchLayout(shape, len(groups), columns, 0)
    whole, shardings = NamedSharding(mesh, PartitionSpec()), state_shardings(kv, mesh)
    params = tuple(jax.ShapeDtypeStruct(d.shape, d.dtype, sharding=s)
                   for d, s in zip(models.weight_table(spec), param_shardings(spec, mesh)))
    pools = pool_structs(kv, mesh)
    sampler = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole),
                           jax.eval_shape(lambda: init_sampler_state(slots, spec.vocab_size)))
    state = EngineState(pools, jax.ShapeDtypeStruct((slots,), jnp.int32, sharding=whole), sampler)
    buffer = jax.ShapeDtypeStruct((layout.words,), jnp.int32, sharding=whole)
    masks = jax.ShapeDtypeStruct((shape.rows, mask_words(spec.vocab_size)), jnp.int32, sharding=whole)
    compiled = compile_for(build_step(spec, kv, layout, mesh), params, state, buffer, masks, donate_argnums=1,
                           out_shardings=(shardings, whole))
    return compiled, kv, params
