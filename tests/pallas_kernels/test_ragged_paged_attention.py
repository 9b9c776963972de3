"""Every implementation against the float64 oracle, on batches where whatever must not be read is NaN or garbage."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import pallas_kernels as pk
from pallas_kernels.arg_specs import BATCHES, MODELS
from pallas_kernels.quant import quantize_rows

from .paged import CPU_IMPLS, check, check_nan, make_case, oracle, oracle_mass, quantised, to_pool, with_nan

MIXED = dict(q_lens=[1, 5, 0, 20, 1, 3], kv_lens=[33, 5, 0, 50, 1, 19])  # decodes, whole and later chunks, a draft, padding
impls = pytest.mark.parametrize("impl", CPU_IMPLS)


@functools.partial(jax.jit, static_argnames=("layout", "scale", "window", "soft_cap", "impl", "max_q_len", "return_mass"))
def attend(q, pool, page_table, kv_lens, cu_q_lens, sinks=None, **options):
    return pk.ragged_paged_attention(q, pool, page_table, kv_lens, cu_q_lens, sinks=sinks, return_lse=True, **options)


@impls
@pytest.mark.parametrize("layout", pk.LAYOUTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_mixed_batch(impl, layout, dtype):
    case = make_case(**MIXED, layout=layout, dtype=dtype)
    check(case, attend(*case.args, layout=layout, scale=0.3, impl=impl), scale=0.3)


@impls
@pytest.mark.parametrize(
    "shape, options",
    [
        (dict(), dict(window=7)),
        (dict(), dict(window=1)),
        (dict(page_size=3), dict(window=20)),
        (dict(heads=(6, 2)), dict(soft_cap=1.5, sinks=True)),
        (dict(page_size=1), dict()),
        (dict(page_size=3, heads=(3, 3)), dict()),
        (dict(page_size=3, heads=(4, 1)), dict(window=9, soft_cap=2.0, sinks=True)),
    ],
    ids=lambda d: "-".join(f"{k}={v}" for k, v in d.items()) or "plain",
)
def test_features(impl, shape, options):
    case = make_case(**MIXED, **shape, layout="token_major", window=options.get("window"))
    if options.get("sinks"):
        options = options | dict(sinks=np.random.default_rng(1).normal(size=case.q.shape[1]).astype(np.float32))
    got = attend(*case.args, layout="token_major", scale=0.4, impl=impl, **options)
    check(case, got, scale=0.4, **options)


@impls
@pytest.mark.parametrize("window", [None, 150])
def test_more_rows_than_a_tile_and_more_keys_than_a_block(impl, window):
    case = make_case([70, 1, 2], [300, 290, 131], heads=(2, 1), window=window)
    got = attend(*case.args, layout="head_major", scale=0.3, window=window, impl=impl)
    check(case, got, scale=0.3, window=window, tolerance=5e-6)


@pytest.mark.parametrize(
    "kv_lens, shared, sharers",
    [
        ([145, 150, 260, 144, 161, 170, 145, 180, 40], 144, range(8)),  # one group, one alone, one ends with a shared page
        ([40] + [140 + i for i in range(9)], 128, (9, 2, 4, 5, 6, 1, 8, 7)),  # scattered members
        ([150] * 9, 128, range(7)),  # too few members
        ([150] * 9, 48, range(9)),  # too few pages
        ([150] * 40, 144, range(40)),  # more members than a tile
    ],
)
def test_decodes_that_share_a_prefix(kv_lens, shared, sharers):
    case = make_case([1] * len(kv_lens), kv_lens, heads=(2, 1), head_dim=4, shared=shared, sharers=tuple(sharers))
    got = attend(*case.args, layout="head_major", scale=0.3, impl="xla", max_q_len=1)
    check(case, got, scale=0.3, tolerance=5e-6)


def test_two_groups_and_a_chunk_in_one_batch():
    first, second = (make_case([1] * 8, [140 + i for i in range(8)], heads=(2, 1), head_dim=4, shared=128,
                               sharers=tuple(range(8)), pages=11, seed=i) for i in range(2))
    chunk = make_case([6], [30], heads=(2, 1), head_dim=4, pages=11, seed=2)
    cases, table, base = (first, chunk, second), [], 0
    for case in cases:
        table.append(case.page_table + base)
        base += case.pool.shape[0]
    parts = [case.q[: case.real_rows] for case in cases]
    case = type(first)(
        np.concatenate(parts), np.concatenate([c.pool for c in cases]), np.concatenate(table).astype(np.int32),
        np.concatenate([c.kv_lens for c in cases]),
        np.concatenate([[0], np.cumsum([1] * 8 + [6] + [1] * 8)]).astype(np.int32),
        sum((c.keys for c in cases), ()), sum((c.values for c in cases), ()))
    check(case, attend(*case.args, layout="head_major", scale=0.3, impl="xla"), scale=0.3, tolerance=5e-6)


def test_group_is_not_taken_when_tables_only_agree_in_the_middle():
    """Sequences that agree on one page number but not on the pages before it share nothing."""
    case = make_case([1] * 8, [150] * 8, heads=(2, 1), head_dim=4, shared=128, sharers=tuple(range(8)), num_pages=90)
    table, pool = case.page_table.copy(), case.pool.copy()
    keys, values = list(case.keys), list(case.values)
    spare = [p for p in range(90) if p not in table][:8]
    for s, page in enumerate(spare):  # a first page of its own for everyone, the rest still shared
        table[s, 0] = page
        pool[page] = np.random.default_rng(s).normal(size=pool.shape[1:])
        keys[s], values[s] = keys[s].copy(), values[s].copy()
        keys[s][:16], values[s][:16] = pool[page].transpose(0, 2, 1, 3)
    case = type(case)(case.q, pool, table, case.kv_lens, case.cu_q_lens, tuple(keys), tuple(values))
    check(case, attend(*case.args, layout="head_major", scale=0.3, impl="xla", max_q_len=1), scale=0.3, tolerance=5e-6)


@impls
@pytest.mark.parametrize("options", [dict(), dict(window=7), dict(soft_cap=1.5, sinks=True)], ids=str)
@pytest.mark.parametrize("lens", [MIXED, dict(q_lens=[1] * 3, kv_lens=[33, 1, 290]), dict(q_lens=[70], kv_lens=[300])],
                         ids=["mixed", "decode", "chunk"])
def test_attention_mass(impl, options, lens):
    case = make_case(**lens, window=options.get("window"))
    if options.get("sinks"):
        options = options | dict(sinks=np.random.default_rng(1).normal(size=case.q.shape[1]).astype(np.float32))
    decode = 1 if max(lens["q_lens"]) == 1 else None
    run = functools.partial(attend, *case.args, layout="head_major", scale=0.3, impl=impl, max_q_len=decode, **options)
    want = oracle_mass(case, oracle(case, scale=0.3, **options)[1], scale=0.3, **options)
    *result, by_token = run(return_mass="token")
    check(case, result, scale=0.3, **options)
    np.testing.assert_allclose(by_token, want, atol=1e-5)
    by_page = run(return_mass="page")[2]
    np.testing.assert_allclose(by_page, want.reshape(*by_page.shape, -1).sum(-1), atol=1e-5)
    if "sinks" not in options:  # every query head of every real row gives away exactly 1
        rows = np.diff(case.cu_q_lens) * case.q.shape[1] / by_page.shape[1]
        np.testing.assert_allclose(by_page.sum(axis=2), np.repeat(rows[:, None], by_page.shape[1], 1), atol=1e-4)


def quantized(case, dtype, layout):
    """The case with its pages quantised, NaN where they were NaN; keys and values as they come out again."""
    canonical = case.pool.transpose(0, 1, 3, 2, 4).astype(np.float32)  # head_major -> [N, 2, ps, Hkv, D]
    values, scales = quantize_rows(jnp.nan_to_num(canonical), dtype)
    scales = np.where(np.isnan(canonical).any(-1), np.nan, scales)
    scales = to_pool(scales[..., None], "head_major" if layout == "paired" else layout)[..., 0]
    pool = pk.QuantPool(jnp.asarray(to_pool(np.asarray(values), layout)), jnp.asarray(scales))
    if dtype == "float8_e4m3fn":
        pool = pool._replace(values=jax.lax.bitcast_convert_type(pool.values, jnp.uint8))
    rows = [tuple(np.asarray(v, np.float32) * np.asarray(s)[..., None] for v, s in (quantize_rows(x, dtype) for x in kv))
            for kv in (case.keys, case.values)]
    return dataclasses.replace(case, keys=rows[0], values=rows[1]), pool


@impls
@pytest.mark.parametrize("layout", pk.LAYOUTS)
@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_quantised_keys_and_values(impl, layout, dtype):
    case, pool = quantized(make_case(**MIXED), dtype, layout)
    q, _, *rest = case.args
    check(case, attend(q, pool, *rest, layout=layout, scale=0.3, impl=impl), scale=0.3, tolerance=1e-5)


@impls
@pytest.mark.parametrize("part", [0, 1], ids=["key", "value"])
@pytest.mark.parametrize("quant", [None, "int8", "float8_e4m3fn"])
def test_a_visible_nan_comes_out(impl, quant, part):
    case = with_nan(make_case(**MIXED), 3, part)
    q, pool, *rest = case.args
    pool = quantised(pool, quant) if quant else pool
    check_nan(case, attend(q, pool, *rest, layout="head_major", scale=0.3, impl=impl), seq=3, part=part)


@impls
def test_empty_batch_and_running_twice(impl):
    case = make_case(**MIXED)
    first, again = (attend(*case.args, layout="head_major", scale=0.3, impl=impl) for _ in range(2))
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    empty = make_case([0] * 6, [0] * 6, tokens=32, pages=case.page_table.shape[1], num_pages=case.pool.shape[0])
    check(empty, attend(*empty.args, layout="head_major", scale=0.3, impl=impl), scale=0.3)


@given(lengths=st.lists(st.tuples(st.integers(0, 7), st.integers(0, 17)), min_size=5, max_size=5), seed=st.integers(0, 99),
       window=st.sampled_from([None, 6]))
def test_random_shapes(lengths, seed, window):
    q_lens = [q for q, _ in lengths]
    kv_lens = [q + past if q else 0 for q, past in lengths]
    case = make_case(q_lens, kv_lens, page_size=4, heads=(2, 1), head_dim=4, tokens=36, pages=7, num_pages=40, seed=seed,
                     window=window)
    got = attend(*case.args, layout="head_major", scale=0.5, window=window, impl="xla")
    check(case, got, scale=0.5, window=window)


def test_merging_by_log_sum_exp():
    """Attention over two halves of the keys, merged by their log-sum-exp, is attention over all of them."""
    case = make_case([1], [40])
    whole, lse = attend(*case.args, layout="head_major", scale=0.3, impl="xla")
    q, pool, table, _, cu = case.args
    halves = [attend(q, pool, table[:, i:], jnp.array([n], jnp.int32), cu, layout="head_major", scale=0.3, impl="xla")
              for i, n in ((0, 16), (1, 24))]
    weights = [np.exp(h[1][0] - lse[0]) for h in halves]
    np.testing.assert_allclose(weights[0] + weights[1], 1, rtol=1e-5)
    np.testing.assert_allclose(sum(w[:, None] * h[0][0] for w, h in zip(weights, halves, strict=True)), whole[0], atol=1e-6)


def test_matmul_precision_is_respected(highest_precision):
    case = make_case(**MIXED)
    text = jax.jit(lambda *a: pk.ragged_paged_attention(*a, layout="head_major", scale=0.3)).lower(*case.args).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert products and all("HIGHEST" in line for line in products)


def test_memory_does_not_grow_with_context_or_pool(as_shipped):
    """No [tokens, context] scores, no gathered context, no copy of the pool."""
    def temp(context, num_pages):
        shape = (jax.ShapeDtypeStruct((256, 4, 16), jnp.float32),
                 jax.ShapeDtypeStruct(pk.pool_shape("head_major", num_pages, 16, 2, 16), jnp.float32),
                 jax.ShapeDtypeStruct((4, context // 16), jnp.int32), jax.ShapeDtypeStruct((4,), jnp.int32),
                 jax.ShapeDtypeStruct((5,), jnp.int32))
        f = jax.jit(lambda *a: pk.ragged_paged_attention(*a, layout="head_major", scale=0.3, impl="xla"))
        return f.lower(*shape).compile().memory_analysis().temp_size_in_bytes

    small, large = temp(512, 64), temp(16384, 4096)
    scores = 256 * 4 * 16384 * 4
    assert large < small + scores / 16 and large < 4096 * 16 * 2 * 2 * 16 * 4 / 4


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("batch", ["decode-24-shared", "prefill-2048", "mixed"])
def test_real_shapes_trace(model, batch):
    heads, lens = MODELS[model], BATCHES[batch]
    tokens, seqs = sum(lens.q_lens), len(lens.q_lens)
    shape = lambda *s, dtype=jnp.int32: jax.ShapeDtypeStruct(s, dtype)  # noqa: E731
    f = functools.partial(pk.ragged_paged_attention, layout="token_major", scale=0.1, window=heads.window)
    out = jax.eval_shape(
        f, shape(tokens, heads.q_heads, heads.head_dim, dtype=jnp.bfloat16),
        shape(*pk.pool_shape("token_major", 999, 16, heads.kv_heads, heads.head_dim), dtype=jnp.bfloat16),
        shape(seqs, -(-max(lens.kv_lens) // 16)), shape(seqs), shape(seqs + 1))
    assert out.shape == (tokens, heads.q_heads, heads.head_dim) and out.dtype == jnp.bfloat16


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(q=jnp.zeros((4, 3, 8))), r"multiple of 2, 8.*\(4, 3, 8\)"),
        (dict(q=jnp.zeros((4, 4, 9))), r"\(4, 4, 9\)"),
        (dict(pool=jnp.zeros((9, 2, 2, 16))), r"5 axes.*\(9, 2, 2, 16\)"),
        (dict(kv_lens=jnp.zeros(3, jnp.int32)), r"\(2, 5\), \(3,\), \(3,\)"),
        (dict(cu_q_lens=jnp.zeros(3, jnp.uint32)), "cu_q_lens must be int32"),
        (dict(sinks=jnp.zeros(3)), r"sinks must be \[4\].*\(3,\)"),
        (dict(window=0), "window=0"),
        (dict(soft_cap=0.0), "soft_cap=0.0"),
        (dict(scale=float("nan")), "scale finite"),
        (dict(layout="nonsense"), "layout must be one of"),
        (dict(impl="nonsense"), "impl must be one of"),
    ],
)
def test_bad_arguments(change, message):
    good = dict(q=jnp.zeros((4, 4, 8)), pool=jnp.zeros(pk.pool_shape("head_major", 9, 16, 2, 8)),
                page_table=jnp.zeros((2, 5), jnp.int32), kv_lens=jnp.zeros(2, jnp.int32),
                cu_q_lens=jnp.zeros(3, jnp.int32), layout="head_major", scale=1.0)
    with pytest.raises(ValueError, match=message):
        pk.ragged_paged_attention(**(good | change))


def test_plan_has_its_static_size():
    shape = dict(tokens=8, seqs=4, q_heads=8, kv_heads=2, head_dim=128, page_size=16, kv_dtype="bfloat16", max_q_len=None)
    table = np.zeros((2, 4), np.int32)
    for impl, wanted in (("mosaic_gpu", True), ("xla", False), ("auto", False)):
        planner = pk.attention_planner(impl, **shape)
        plan = planner(np.array([1, 5]), np.array([3, 9]), table)
        assert plan.dtype == np.int32 and plan.shape == (planner.size,) and (planner.size > 0) == wanted
