"""Truncation: the sort against plain numpy, every implementation against the sort, rows against numpy; tiny shapes."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pallas_kernels.sampling.api import IMPLEMENTATIONS, truncated_argmax
from pallas_kernels.sampling.ref import kept_limit
from pallas_kernels.sampling.rows import any_of, argmax_rows, largest_rows, largest_values, sum_rows

RUN = {impl: jax.jit(partial(truncated_argmax, impl=impl)) for impl in IMPLEMENTATIONS}
KEPT = jax.jit(lambda z, *columns: jax.lax.bitcast_convert_type(jnp.abs(z), jnp.int32) < kept_limit(z, *columns)[:, None])
TOP_P = st.sampled_from([1e-9, 1e-3, 0.1, 0.5, 0.9, 0.999, 1.0])
MIN_P = st.sampled_from([0.0, 1e-4, 0.1, 1.0])


def make_z(rng, rows, vocab, kind):
    """f32 [rows, vocab], 0 for the likeliest of a row: many ties, none, coarse as from bfloat16, or one token's mass."""
    if kind == "one":
        z = np.full((rows, vocab), -np.inf)
        z[np.arange(rows), rng.integers(0, vocab, rows)] = 0
        return z.astype(np.float32)
    z = rng.normal(size=(rows, vocab)) * rng.choice([0.3, 2.0, 8.0])
    if kind == "ties":
        z = np.round(z)
    if kind == "coarse":
        z = np.asarray(z, jnp.bfloat16)
    z = z.astype(np.float32)
    z -= z.max(axis=1, keepdims=True)
    if kind == "holes":
        z[(rng.random(z.shape) < 0.5) & (z < 0)] = -np.inf
    if kind == "equal":
        z[:] = 0
    return z


KIND = st.sampled_from(["ties", "smooth", "coarse", "holes", "equal", "one"])


def numpy_kept(z, top_k, top_p, min_p):
    """In float64 for one row [V]: which tokens are kept, and how far the mass is from a tie at a border."""
    p = np.exp(z.astype(np.float64))
    with np.errstate(divide="ignore"):
        keep = (z >= np.log(np.float32(min_p))) & (z > -np.inf)
    margin = np.abs(p - min_p).min() if 0 < min_p < 1 else np.inf
    if 0 < top_k < len(z):
        keep &= z >= np.sort(z)[-top_k]
    if top_p < 1:
        order = np.argsort(-z, kind="stable")
        mass = np.cumsum(np.where(keep, p, 0)[order])
        target = top_p * mass[-1]
        margin = min(margin, np.abs(mass - target).min() / p.sum(), mass[0] / p.sum())
        keep &= z >= z[order][np.argmax(mass >= target)]
    return keep, margin


@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 2, 7, 90, 160]), KIND, st.sampled_from([0, 1, 2, 5, 64, 65, 159, 10**9]),
       TOP_P, MIN_P)
def test_the_sort_keeps_what_plain_numpy_keeps(seed, vocab, kind, top_k, top_p, min_p):
    z = make_z(np.random.default_rng(seed), 1, vocab, kind)
    want, margin = numpy_kept(z[0], top_k, top_p, min_p)
    assume(margin > 1e-6)
    got = KEPT(z, np.array([top_k], np.int32), np.array([top_p], np.float32), np.array([min_p], np.float32))
    np.testing.assert_array_equal(np.asarray(got)[0], want)


@settings(max_examples=40)
@given(st.integers(0, 2**32 - 1), st.sampled_from([3, 200, 4000, 17408, 17001]), KIND, st.booleans())
def test_every_implementation_chooses_the_token_of_the_sort(seed, vocab, kind, race_is_of_z):
    """Nine rows with their own settings; 17408 and 17001 are wide enough for blocks, with and without a divisor."""
    rng = np.random.default_rng(seed)
    z = make_z(rng, 9, vocab, kind)
    race = (np.exp(z) / rng.exponential(size=z.shape) if race_is_of_z else rng.random(z.shape)).astype(np.float32)
    columns = (rng.choice([0, 1, 2, 50, 64, 65, 1000, vocab - 1, vocab, 2**31 - 1], 9).astype(np.int32),
               rng.choice([1e-9, 1e-3, 0.5, 0.9, 0.999, 1.0, 1.0], 9).astype(np.float32),
               rng.choice([0.0, 0.0, 1e-4, 0.3, 1.0], 9).astype(np.float32))
    want = np.asarray(RUN["ref"](race, z, *columns))
    kept = np.asarray(KEPT(z, *columns))
    np.testing.assert_array_equal(want, np.argmax(np.where(kept, race, -np.inf), axis=1))
    for impl, run in RUN.items():
        np.testing.assert_array_equal(np.asarray(run(race, z, *columns)), want, err_msg=impl)


@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 7, 90, 160]), KIND, st.sampled_from([0, 1, 3, 64, 65, 10**9]), TOP_P,
       MIN_P)
def test_kept_sets_are_equal(seed, vocab, kind, top_k, top_p, min_p):
    """Each token asks whether it wins when it has the best race, [V] of V rows: the whole set, not one choice of it."""
    z = np.repeat(make_z(np.random.default_rng(seed), 1, vocab, kind), vocab, axis=0)
    race = (np.exp(z) + 10 * np.eye(vocab)).astype(np.float32)
    columns = (np.full(vocab, top_k, np.int32), np.full(vocab, top_p, np.float32), np.full(vocab, min_p, np.float32))
    kept = np.asarray(KEPT(z[:1], *(c[:1] for c in columns)))[0]
    assert kept[np.argmax(z[0])]
    for impl, run in RUN.items():
        np.testing.assert_array_equal(np.asarray(run(race, z, *columns)) == np.arange(vocab), kept, err_msg=impl)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_rows_that_keep_nothing_and_nan_rows_end(impl):
    z = np.full((3, 200), -np.inf, np.float32)
    z[1:], z[2, 3] = np.nan, 0.0
    race = np.where(np.isnan(z), np.nan, 0.0).astype(np.float32)
    columns = (np.full(3, 70, np.int32), np.full(3, 0.9, np.float32), np.full(3, 0.1, np.float32))
    token = np.asarray(RUN[impl](race, z, *columns))
    assert token[0] == 0 and np.all((token >= 0) & (token < 200))


def test_bad_arguments():
    z, row = jnp.zeros((2, 5)), jnp.zeros(2)
    with pytest.raises(ValueError, match=r"race and z must be float32.*\(2, 5\).*\(2, 4\)"):
        truncated_argmax(z, z[:, :4], row.astype(int), row, row)
    with pytest.raises(ValueError, match=r"top_k must be int32 \[2\] to match z \(2, 5\), got float32"):
        truncated_argmax(z, z, row, row, row)
    with pytest.raises(ValueError, match=r"min_p must be float32 \[2\].*\(1,\)"):
        truncated_argmax(z, z, row.astype(jnp.int32), row, row[:1])


# -- rows ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab", [1, 5, 127, 128, 129, 192, 700])
def test_argmax_takes_the_lowest_index_among_equals(vocab):
    x = np.random.default_rng(vocab).integers(0, 4, (9, vocab)).astype(np.float32)
    x[0], x[1], x[2] = -np.inf, 0, np.inf
    np.testing.assert_array_equal(jax.jit(argmax_rows)(x), np.argmax(x, axis=1))


def test_argmax_with_nan_stays_in_the_vocabulary():
    x = np.random.default_rng(0).normal(size=(3, 130)).astype(np.float32)
    x[0], x[1, 129], x[2, 3] = np.nan, np.nan, np.nan
    index = np.asarray(jax.jit(argmax_rows)(x))
    assert np.all((index >= 0) & (index < 130))


@pytest.mark.parametrize("vocab", [1, 16, 31, 32, 96, 4000, 4001, 4748 * 32])
def test_sums_are_exact(vocab):
    x = np.random.default_rng(vocab).integers(0, 2**31 // vocab, (3, vocab)).astype(np.int32)
    np.testing.assert_array_equal(jax.jit(sum_rows)(x), x.sum(axis=1))


@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1), st.sampled_from([5, 700, 5248, 5251]), st.sampled_from([1, 5, 20]),
       st.sampled_from([2, 30, 10**6]))
def test_the_n_largest_equal_those_of_the_sort(seed, vocab, n, levels):
    n = min(n, vocab)
    x = np.random.default_rng(seed).integers(0, levels, (4, vocab)).astype(np.float32)
    x[0, 3:], x[1] = -np.inf, -np.inf
    ids = np.argsort(-x, axis=1, kind="stable")[:, :n]
    got = jax.jit(largest_rows, static_argnums=1)(x, n)
    np.testing.assert_array_equal(got[1], ids)
    np.testing.assert_array_equal(got[0], np.take_along_axis(x, ids, 1))
    np.testing.assert_array_equal(jax.jit(largest_values, static_argnums=1)(x, n), got[0])


@pytest.mark.parametrize("rows", [1, 7, 32, 64, 96])
def test_any_of(rows):
    nothing, last = np.zeros(rows, bool), np.arange(rows) == rows - 1
    assert [bool(x) for x in jax.jit(any_of)(last, nothing, nothing, last)] == [True, False, False, True]
