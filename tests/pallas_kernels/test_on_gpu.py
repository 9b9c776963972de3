"""The kernels on a real GPU, at real head counts, against the float64 oracle, and an engine that runs them: what interpret mode
cannot show. Compiling is most of the time, so the calls cover what there is rather than its product.

    JAXKV_TEST_PLATFORM=gpu python -m pytest -m gpu tests/pallas_kernels      (bench.kernels runs this first)
"""

import functools
import json
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk
from jaxkv import LLM, SamplingParams
from jaxkv.device.batch import BatchShape
from pallas_kernels.layout import from_storage

from .paged import TOLERANCE, check, make_case, oracle, oracle_mass, quantised_case

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(jax.default_backend() != "gpu", reason="no GPU in this process")]

LENGTHS = {  # of queries, of KV
    "decode": ([1] * 9, [1, 17, 4096, *range(1040, 1046)]),  # the last six share a prefix
    "drafts": ([5, 1, 3, 0, 2], [900, 17, 64, 0, 300]),
    "mixed": ([1, 200, 0, 4, 64, 40, 1], [900, 200, 0, 77, 1100, 200, 5]),
}


class Call(NamedTuple):
    """heads: of queries and of KV; kv_dtype: of a quantised pool; options: of the op, `sinks` for some."""

    lengths: str
    heads: tuple[int, int]
    head_dim: int
    page_size: int
    dtype: str = "bfloat16"
    kv_dtype: str | None = None
    options: dict = {}


CALLS = {
    "decode": Call("decode", (16, 4), 128, 16, options=dict(return_mass="token")),
    "drafts": Call("drafts", (16, 2), 128, 64, options=dict(sinks=True, return_mass="page")),
    "drafts-float8": Call("drafts", (8, 4), 256, 16, kv_dtype="float8_e4m3fn", options=dict(window=200, return_mass="token")),
    "llama": Call("mixed", (32, 8), 128, 16),
    "gpt-oss": Call("mixed", (16, 2), 64, 16, options=dict(window=128, sinks=True)),  # sequences end where a window starts
    "gemma": Call("mixed", (8, 4), 256, 128, options=dict(window=200, soft_cap=20.0)),
    "no-groups": Call("mixed", (4, 4), 80, 8),
    "seven-heads": Call("mixed", (14, 2), 96, 256, "float16", options=dict(soft_cap=20.0)),
    "int8": Call("mixed", (16, 4), 128, 16, kv_dtype="int8", options=dict(return_mass="token")),
    "float8": Call("mixed", (8, 2), 80, 32, "float16", "float8_e4m3fn", dict(window=200)),
}


@functools.partial(jax.jit, static_argnames=("window", "soft_cap", "impl", "max_q_len", "return_mass"))
def attend(q, pool, table, kv_lens, cu, plan, sinks, **static):
    return pk.ragged_paged_attention(q, pool, table, kv_lens, cu, plan=plan, sinks=sinks, layout="head_major", scale=0.1,
                                     return_lse=True, **static)


def prepare(call, impl):
    """The case that the oracle knows, and the arguments of `attend`."""
    options, (q_lens, kv_lens) = dict(call.options), LENGTHS[call.lengths]
    case = make_case(q_lens, kv_lens, heads=call.heads, head_dim=call.head_dim, page_size=call.page_size,
                     dtype="float32" if call.kv_dtype else call.dtype, window=options.get("window"),
                     shared=1024 * (call.lengths == "decode"), sharers=range(3, 9))
    pool = from_storage(jnp.asarray(case.pool))  # the CPU form of bfloat16 is its bits
    if call.kv_dtype:
        case, pool = quantised_case(case, call.kv_dtype, call.dtype)
    sinks = np.linspace(-1, 2, call.heads[0], dtype=np.float32) if options.pop("sinks", False) else None
    options["max_q_len"] = None if call.lengths == "mixed" else max(q_lens)
    planner = pk.attention_planner(
        impl, tokens=case.q.shape[0], seqs=len(kv_lens), q_heads=call.heads[0], kv_heads=call.heads[1], head_dim=call.head_dim,
        page_size=call.page_size, kv_dtype=call.kv_dtype or call.dtype, max_q_len=options["max_q_len"])
    plan = planner(np.asarray(q_lens), case.kv_lens, case.page_table, options.get("window"))
    q, _, *rest = case.args
    return case, (q, pool, *rest, jnp.asarray(plan), sinks), options


@pytest.mark.parametrize("name, impl", [*((name, "mosaic_gpu") for name in CALLS), ("gpt-oss", "xla"), ("int8", "xla")])
def test_attention(name, impl):
    call = CALLS[name]
    case, args, options = prepare(call, impl)
    with jax.default_matmul_precision("highest" if impl == "xla" else None):  # XLA's float32 scores in float32
        result, again = attend(*args, impl=impl, **options), attend(*args, impl=impl, **options)
    for a, b in zip(result, again, strict=True):
        np.testing.assert_array_equal(a, b)
    known = dict(scale=0.1, window=options.get("window"), soft_cap=options.get("soft_cap"), sinks=args[-1])
    lse_tolerance = TOLERANCE[call.dtype] if call.kv_dtype else 2e-5  # chunks round such keys to the dtype of the queries
    check(case, result[:2], lse_tolerance=lse_tolerance, **known)
    if by := options.get("return_mass"):
        want = oracle_mass(case, oracle(case, **known)[1], **known)
        want = want.reshape(*want.shape[:2], -1, call.page_size).sum(axis=3) if by == "page" else want
        np.testing.assert_allclose(result[2], want, atol=2e-3, rtol=max(lse_tolerance, 1e-4))


def test_page_copies():
    """A scatter writes into the pools that it is given, and drops what is no page."""
    pages, layers, shape = jnp.array([3, 0, 7, 5], jnp.int32), 3, pk.pool_shape("head_major", 9, 16, 8, 128)
    pools = tuple(jax.random.normal(jax.random.key(i), shape, jnp.bfloat16) for i in range(layers))
    data = pk.gather_pages(pools, pages, layout="head_major", impl="mosaic_gpu")
    np.testing.assert_array_equal(np.asarray(data), np.asarray(pk.gather_pages(pools, pages, layout="head_major", impl="ref")))
    to = jnp.array([5, -1, 0, 9], jnp.int32)
    want = pk.scatter_pages(pools, to, data, layout="head_major", impl="ref")
    places = [pool.unsafe_buffer_pointer() for pool in pools]
    scatter = functools.partial(pk.scatter_pages, layout="head_major", impl="mosaic_gpu")
    got = jax.jit(scatter, donate_argnums=0)(pools, to, data)
    assert [pool.unsafe_buffer_pointer() for pool in got] == places
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def generate(impl, directory, monkeypatch):
    """Greedy tokens of two prompts from an engine on random weights; the longer prompt comes in two chunks."""
    for module in ("executor", "startup"):  # two of the shapes are enough
        monkeypatch.setattr(f"jaxkv.runtime.{module}.batch_shapes",
                            lambda *_: (BatchShape(2, 2, 2, decode=True), BatchShape(64, 2, 2)))
    (directory / "config.json").write_text(json.dumps(dict(
        architectures=["LlamaForCausalLM"], model_type="llama", hidden_size=128, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=2, head_dim=64, intermediate_size=128, vocab_size=67, max_position_embeddings=256,
        rms_norm_eps=1e-5, rope_theta=10000.0, hidden_act="silu", tie_word_embeddings=False, initializer_range=0.4)))
    llm = LLM(str(directory), load_format="dummy", skip_tokenizer_init=True, dtype="float16", attention_impl=impl,
              max_model_len=128, max_num_seqs=2, max_num_batched_tokens=64, kv_cache_memory="1M", host_kv_memory=0)
    prompts = [{"prompt_token_ids": [i * i % 67 for i in range(n)]} for n in (90, 5)]
    results = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=12, ignore_eos=True), use_tqdm=False)
    llm.shutdown()
    return [result.outputs[0].token_ids for result in results]


def test_an_engine_gives_the_tokens_of_xla(tmp_path, monkeypatch):
    assert generate("mosaic_gpu", tmp_path, monkeypatch) == generate("xla", tmp_path, monkeypatch)
