"""The Hopper prefill kernel interpreted on CPU against the float64 oracle; what no query sees is NaN or garbage.

The interpreter simulates threads, barriers and copies, but does the two matrix products with jnp.dot (see `prefill_kernel`);
that the real ones compile is shown by test_h100_prefill.py. Every simulated warpgroup that waits holds a thread of XLA:CPU:
with fewer than five (virtual) devices or cores, which conftest.py provides, the interpreter can come to a standstill.
"""

import functools
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("absl")  # undeclared dependency of Pallas Mosaic GPU in jax 0.10
from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import get_races, reset_gpu_interpret_mode_state
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

from pallas_kernels.ragged_paged_attention import ref
from pallas_kernels.ragged_paged_attention.mosaic_gpu.prefill import prefill_attention
from pallas_kernels.ragged_paged_attention.mosaic_gpu.prefill_jobs import make_jobs
from pallas_kernels.ragged_paged_attention.mosaic_gpu.prefill_tuning import PrefillBlocks
from pallas_kernels.ragged_paged_attention.params import AttentionParams

from .paged import TOLERANCE, check_nan, make_case, oracle, quantised, with_nan

SMALL = PrefillBlocks(keys=64, stages=2, own_output=True, ctas=2)


@pytest.fixture(autouse=True)
def fresh_interpreter():
    yield
    jax.effects_barrier()  # the interpreter of a kernel under way would lose its barriers
    reset_gpu_interpret_mode_state()


@functools.partial(jax.jit, static_argnames=("params", "blocks", "races"))
def attend(q, pool, page_table, kv_lens, cu_q_lens, tiles, *, params, blocks=SMALL, races=False):
    return prefill_attention(q, pool, page_table, kv_lens, cu_q_lens, tiles, params=params, blocks=blocks,
                             interpret=InterpretGPUParams(detect_races=races))


def tiles_of(case, size, least=1):
    """All sequences of at least `least` queries in tiles, with entries that say nothing between and behind them."""
    tiles = []
    for s, (begin, end) in enumerate(pairwise(case.cu_q_lens)):
        tiles += [(s, row, min(128, end - row), 0) for row in range(begin, end, 128) if end - begin >= least]
    tiles.insert(1, (0, 0, 0, 0))
    return np.asarray(tiles + [(0, 0, 0, 0)] * (size - len(tiles)), np.int32)


def check(case, result, *, tiles, window=None, soft_cap=None):
    out, lse = (np.asarray(x) for x in result)
    assert out.dtype == case.q.dtype and lse.dtype == np.float32
    want, want_lse = oracle(case, scale=0.3, window=window, soft_cap=soft_cap)
    rows = np.concatenate([np.arange(first, first + n) for _, first, n, _ in tiles])
    tolerance = TOLERANCE[case.q.dtype.name]
    np.testing.assert_allclose(out[rows].astype(np.float64), want[rows], atol=tolerance, rtol=tolerance)
    np.testing.assert_allclose(lse[rows], want_lse[rows], atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(
    "q_lens, kv_lens, shape, options, blocks",
    [
        ([70, 1, 20, 130], [70, 9, 150, 131], dict(heads=(4, 2), head_dim=64), dict(), SMALL),
        ([40, 3], [200, 3], dict(heads=(3, 1), head_dim=16, page_size=128, dtype="float16"), dict(), SMALL),
        ([90], [300], dict(heads=(2, 2), head_dim=32, page_size=8), dict(window=70, soft_cap=3.0),
         SMALL._replace(own_output=False)),
        ([130], [130], dict(heads=(8, 1), head_dim=80, page_size=32), dict(window=9), SMALL._replace(keys=128)),
        ([40, 40], [100, 120], dict(heads=(2, 1), head_dim=16), dict(window=20), SMALL._replace(ctas=1)),
    ],
    ids=["chunks", "page-larger-than-block", "window-and-cap", "eight-heads", "every-block-starts-a-window-or-ends-a-sequence"],
)
def test_matches_the_oracle(q_lens, kv_lens, shape, options, blocks):
    case = make_case(q_lens, kv_lens, **{"dtype": "bfloat16"} | shape, window=options.get("window"))
    tiles = tiles_of(case, 8, least=2)
    params = AttentionParams("head_major", 0.3, options.get("window"), options.get("soft_cap"), None)
    check(case, attend(*case.args, tiles, params=params, blocks=blocks), tiles=tiles, **options)


@pytest.mark.parametrize(
    ("kv_dtype", "q_dtype", "shape", "options", "blocks"),
    [
        ("int8", "bfloat16", dict(head_dim=80, page_size=16), dict(), SMALL),
        ("float8_e4m3fn", "float16", dict(head_dim=32, page_size=128), dict(window=30, soft_cap=2.0),
         SMALL._replace(keys=128, own_output=False)),
    ],
)
def test_quantised_pools(kv_dtype, q_dtype, shape, options, blocks):
    """Against the definition on the same quantised pool; where nothing may be read, scales are NaN and so is float8."""
    case = make_case([3, 40], [150, 333], heads=(2, 1), window=options.get("window"), **shape)
    q, pool, *rest = case.args
    args, tiles = (q.astype(q_dtype), quantised(pool, kv_dtype), *rest), tiles_of(case, 6)
    params = AttentionParams("head_major", 0.3, options.get("window"), options.get("soft_cap"), None)
    out, lse = attend(*args, tiles, params=params, blocks=blocks, races=True)
    assert not get_races().races_found and out.dtype == q_dtype
    want = ref.ragged_paged_attention(q, *args[1:], None, None, params=params)
    n = case.real_rows
    np.testing.assert_allclose(out[:n].astype(jnp.float32), want[0][:n], atol=TOLERANCE[q_dtype], rtol=TOLERANCE[q_dtype])
    np.testing.assert_allclose(lse[:n], want[1][:n], atol=TOLERANCE[q_dtype], rtol=TOLERANCE[q_dtype])


@pytest.mark.parametrize("part", [0, 1], ids=["key", "value"])
@pytest.mark.parametrize("quant", [None, "int8", "float8_e4m3fn"])
def test_a_visible_nan_comes_out(quant, part):
    case = with_nan(make_case([40, 30], [150, 60], heads=(2, 1), head_dim=32, dtype="float16"), 0, part)
    q, pool, *rest = case.args
    args = (q, quantised(pool, quant) if quant else pool, *rest)
    check_nan(case, attend(*args, tiles_of(case, 6), params=AttentionParams("head_major", 0.3, None, None, None)), seq=0,
              part=part)


def test_no_races_and_the_same_bits_twice():
    case = make_case([10, 66], [10, 100], heads=(2, 1), head_dim=16, dtype="bfloat16")
    run = functools.partial(attend, *case.args, tiles_of(case, 4), params=AttentionParams("head_major", 0.3, None, None, None))
    first = jax.block_until_ready(run(races=True))
    assert not get_races().races_found
    jax.effects_barrier()  # the interpreter of a kernel under way would lose its barriers
    reset_gpu_interpret_mode_state()
    for a, b in zip(first, run(), strict=True):
        rows = slice(0, case.real_rows)
        np.testing.assert_array_equal(np.asarray(a)[rows], np.asarray(b)[rows])


@settings(max_examples=3)
@given(lengths=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 90)), min_size=3, max_size=3), seed=st.integers(0, 99))
def test_random_lengths(lengths, seed):
    q_lens = [q for q, _ in lengths]
    kv_lens = [q + past if q else 0 for q, past in lengths]
    case = make_case(q_lens, kv_lens, heads=(2, 1), head_dim=16, dtype="bfloat16", tokens=121, pages=10, num_pages=30,
                     seed=seed)
    tiles = tiles_of(case, 5)
    check(case, attend(*case.args, tiles, params=AttentionParams("head_major", 0.3, None, None, None)), tiles=tiles)
    jax.effects_barrier()  # the interpreter of a kernel under way would lose its barriers
    reset_gpu_interpret_mode_state()


def test_no_tiles():
    case = make_case([1], [5], heads=(2, 1), head_dim=16, dtype="bfloat16")
    params = AttentionParams("head_major", 0.3, None, None, None)
    out, lse = attend(*case.args, jnp.zeros((0, 4), jnp.int32), params=params)
    assert out.shape == case.q.shape and (lse == -jnp.inf).all()


@pytest.mark.parametrize("job_rows", [16, 64, 128])
@pytest.mark.parametrize("window", [None, 20])
def test_jobs_cover_every_row_once(job_rows, window):
    case = make_case([130, 0, 7, 1, 300], [140, 0, 50, 1, 300], heads=(1, 1), head_dim=2)
    tiles = tiles_of(case, 12, least=2)
    tokens, cu = case.q.shape[0], case.cu_q_lens
    jobs = jax.tree.map(np.asarray, make_jobs(jnp.asarray(tiles), jnp.asarray(case.kv_lens), jnp.asarray(cu), tokens, job_rows,
                                              window))
    covered = []
    for number, (row, rows, seq, position, first, kv_len) in enumerate(jobs.fields[: jobs.total[0]]):
        assert row % 8 == 0 and 0 < rows <= job_rows and kv_len == case.kv_lens[seq]
        q_len = cu[seq + 1] - cu[seq]
        assert first == (0 if window is None else max(0, kv_len - q_len - window + 1))
        mine = jobs.source[row : row + rows]
        np.testing.assert_array_equal(mine, cu[seq] + position - (kv_len - q_len) + np.arange(rows))
        np.testing.assert_array_equal(jobs.packed[mine], row + np.arange(rows))
        np.testing.assert_array_equal(jobs.job[mine], number)
        np.testing.assert_array_equal(jobs.at[mine], np.arange(rows))
        covered += [*range(row, row + rows)]
        assert row + job_rows <= len(jobs.source), "a job's copy stays inside"
    assert len(covered) == len(set(covered)) == sum(n for _, _, n, _ in tiles)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(dtype="float32"), "float32.*both must be bfloat16"),
        (dict(q_dtype="float16"), "q float16 and pool bfloat16"),
        (dict(layout="token_major"), "layout='token_major'"),
        (dict(mass="page"), "mass='page'"),
        (dict(scale=-1.0), "scale=-1.0"),
        (dict(head_dim=24), "head_dim=24"),
        (dict(page_size=12), "page_size=12"),
        (dict(page_size=48), "page_size=48"),
        (dict(quant="int8", page_size=8), "quantised pool with page_size=8, head_dim=128"),
        (dict(quant="int8", head_dim=256), "quantised pool with page_size=16, head_dim=256"),
    ],
)
def test_refusals_name_the_reason(change, message):
    shape = dict(dtype="bfloat16", layout="head_major", head_dim=128, page_size=16) | change
    case = make_case([4], [4], heads=(2, 1), **{k: shape[k] for k in ("dtype", "layout", "head_dim", "page_size")})
    q, pool, *rest = case.args
    if change.get("quant"):
        pool = quantised(pool, change["quant"])
    params = AttentionParams(shape["layout"], shape.get("scale", 1.0), None, None, None, shape.get("mass"))
    with pytest.raises(NotImplementedError, match=message):
        prefill_attention(q.astype(shape.get("q_dtype", q.dtype)), pool, *rest, jnp.zeros((1, 4), jnp.int32), params=params)
