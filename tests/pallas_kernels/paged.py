"""Poisoned paged batches, and attention computed by an independent float64 numpy oracle."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.layout import QuantPool
from pallas_kernels.quant import quantize_rows

CPU_IMPLS = ("xla", "ref")  # the kernels of accelerators run interpreted, in modules of their own, on the same cases
TOLERANCE = {"float32": 2e-6, "float16": 2e-3, "bfloat16": 1.6e-2}  # of the outputs, which are of order 1


@dataclass(frozen=True)
class Case:
    """One call's arrays, and what the oracle needs: contiguous keys and values [kv_len, Hkv, D] of every sequence."""

    q: np.ndarray
    pool: np.ndarray
    page_table: np.ndarray
    kv_lens: np.ndarray
    cu_q_lens: np.ndarray
    keys: tuple[np.ndarray, ...]
    values: tuple[np.ndarray, ...]

    @property
    def args(self) -> tuple[jnp.ndarray, ...]:
        return tuple(jnp.asarray(x) for x in (self.q, self.pool, self.page_table, self.kv_lens, self.cu_q_lens))

    @property
    def real_rows(self) -> int:
        return int(self.cu_q_lens[-1])


def quantised(pool: jax.Array, dtype: str) -> QuantPool:
    """A poisoned pool in int8 or float8: where it is NaN, scales are NaN and values 77 or NaN."""
    empty = jnp.isnan(pool).any(axis=-1)
    values, scales = quantize_rows(jnp.nan_to_num(pool), dtype)
    poison = jnp.float32(77 if dtype == "int8" else np.nan).astype(dtype)
    return QuantPool(jnp.where(empty[..., None], poison, values), jnp.where(empty, jnp.nan, scales))


def quantised_case(case: Case, dtype: str, q_dtype: str) -> tuple[Case, QuantPool]:
    """A float32 case as it is with a pool in int8 or float8, and the poisoned pool."""

    def rows(x: np.ndarray) -> np.ndarray:
        values, scales = quantize_rows(jnp.asarray(x), dtype)
        return np.asarray(values, np.float32) * np.asarray(scales)[..., None]

    known = replace(case, q=case.q.astype(q_dtype), keys=tuple(map(rows, case.keys)), values=tuple(map(rows, case.values)))
    return known, quantised(jnp.asarray(case.pool), dtype)


def make_case(
    q_lens, kv_lens, *, page_size=16, heads=(4, 2), head_dim=8, layout="head_major", dtype="float32", window=None,
    shared=0, sharers=(), tokens=None, pages=None, num_pages=None, seed=0,
) -> Case:
    """A batch whose pool is NaN wherever no query may look, and whose table is garbage wherever it may not be read.

    The first `shared` tokens of the sequences in `sharers` lie in the same pages.
    """
    rng = np.random.default_rng(seed)
    seqs, (q_heads, kv_heads) = len(q_lens), heads
    need = [-(-n // page_size) for n in kv_lens]
    pages = pages or max([1, *need]) + 1
    num_pages = num_pages or sum(need) + 3
    kv_type = jnp.dtype(dtype)
    canonical = np.full((num_pages, 2, page_size, kv_heads, head_dim), np.nan, kv_type)
    table = rng.integers(-7, num_pages + 100, size=(seqs, pages)).astype(np.int32)
    free = list(rng.permutation(num_pages))
    common = [free.pop() for _ in range(shared // page_size)]
    keys, values = [], []
    for s, (q_len, kv_len) in enumerate(zip(q_lens, kv_lens, strict=True)):
        first = 0 if window is None else max(0, kv_len - q_len - window + 1)  # first key that a query sees
        kv = rng.normal(size=(2, kv_len, kv_heads, head_dim)).astype(np.float32).astype(kv_type)
        for i in range(first // page_size, need[s]) if q_len else ():
            mine = s in sharers and i < len(common)
            table[s, i] = common[i] if mine else free.pop()
            low, high = max(first, i * page_size), min(kv_len, (i + 1) * page_size)
            slot = canonical[table[s, i], :, low - i * page_size : high - i * page_size]
            if mine and s != min(sharers):
                kv[:, low:high] = slot
            slot[...] = kv[:, low:high]
        keys.append(kv[0])
        values.append(kv[1])
    tokens = tokens or sum(q_lens) + 2
    q = rng.normal(size=(tokens, q_heads, head_dim)).astype(np.float32).astype(kv_type)
    return Case(q, to_pool(canonical, layout), table, np.asarray(kv_lens, np.int32),
                np.concatenate([[0], np.cumsum(q_lens)]).astype(np.int32), tuple(keys), tuple(values))


def to_pool(canonical: np.ndarray, layout: str) -> np.ndarray:
    """Canonical pages [N, 2, ps, Hkv, D] as a stored CPU pool, without the code under test."""
    pool = canonical.transpose({"token_major": (0, 2, 1, 3, 4)}.get(layout, (0, 1, 3, 2, 4)))
    if layout == "paired":
        pool = np.concatenate([pool[:, :1], pool[:, 1:]], axis=-1)  # keys, values
    pool = np.ascontiguousarray(pool)
    return pool.view(np.uint16) if pool.dtype == jnp.bfloat16 else pool


def oracle(case: Case, *, scale, window=None, soft_cap=None, sinks=None) -> tuple[np.ndarray, np.ndarray]:
    """Outputs [T, Hq, D] and log-sum-exp [T, Hq] in float64; 0 and -inf for padding."""
    out, lse = np.zeros(case.q.shape), np.full(case.q.shape[:2], -np.inf)
    for s, kv_head, here, scores in _scores(case, scale, window, soft_cap):
        e = np.exp(scores)
        total = e.sum(axis=-1) + (0 if sinks is None else np.exp(np.float64(sinks[here[1]])))
        out[here], lse[here] = e @ case.values[s][:, kv_head].astype(np.float64) / total[..., None], np.log(total)
    return out, lse


def oracle_mass(case: Case, lse: np.ndarray, *, scale, window=None, soft_cap=None, sinks=None) -> np.ndarray:
    """Softmax weights by token [S, Hkv, P * ps] in float64, given log-sum-exps [T, Hq] that hold the sinks."""
    page_size = case.pool.shape[3]  # head_major
    mass = np.zeros((len(case.keys), case.keys[0].shape[1], case.page_table.shape[1] * page_size))
    for s, kv_head, here, scores in _scores(case, scale, window, soft_cap):
        mass[s, kv_head, : scores.shape[-1]] = np.exp(scores - lse[here][..., None]).sum(axis=(0, 1))
    return mass


def _scores(case: Case, scale, window, soft_cap):
    """Of every sequence with queries and every KV head: both numbers, the index [rows, query heads] of its outputs, and the
    scores [rows, query heads, kv_len] in float64, -inf for keys that a row does not see."""
    for s, (begin, end) in enumerate(pairwise(case.cu_q_lens)):
        kv_len, kv_heads = case.keys[s].shape[:2]
        behind = np.arange(kv_len - (end - begin), kv_len)[:, None] - np.arange(kv_len)  # [rows, kv_len]
        seen = (behind >= 0) & (behind < (window or kv_len))
        groups = case.q.shape[1] // kv_heads
        for kv_head in range(kv_heads) if end > begin else ():
            here = slice(begin, end), slice(kv_head * groups, (kv_head + 1) * groups)
            x = case.q[here].astype(np.float64) @ case.keys[s][:, kv_head].astype(np.float64).T * scale
            x = x if soft_cap is None else soft_cap * np.tanh(x / soft_cap)
            yield s, kv_head, here, np.where(seen[:, None], x, -np.inf)


def with_nan(case: Case, seq: int, part: int) -> Case:
    """The case with NaN as the last key (part 0) or value (1) but one of a sequence, in a head_major pool."""
    at, page_size = int(case.kv_lens[seq]) - 2, case.pool.shape[3]
    pool = case.pool.copy()
    pool.view(jnp.bfloat16 if pool.dtype == np.uint16 else pool.dtype)[case.page_table[seq, at // page_size], part, :,
                                                                       at % page_size] = np.nan
    return replace(case, pool=pool)


def check_nan(case: Case, result, *, seq: int, part: int) -> None:
    """What sees the NaN of `with_nan` is NaN; other sequences are finite."""
    out, lse = (np.asarray(x, np.float32) for x in result)
    begin, end = case.cu_q_lens[seq], case.cu_q_lens[seq + 1]
    here = slice(max(begin, end - 2), end)
    assert np.isnan(out[here]).all() and (part == 1 or np.isnan(lse[here]).all())
    others = np.r_[0:begin, end : case.real_rows]
    assert others.size and np.isfinite(out[others]).all() and np.isfinite(lse[others]).all()


def check(case: Case, result, *, tolerance=None, lse_tolerance=2e-5, **options) -> None:
    """Compare (output, lse) with the oracle; every real row must be finite, padding must be 0 and -inf."""
    out, lse = (np.asarray(x) for x in result)
    assert out.dtype == case.q.dtype and lse.dtype == np.float32
    want, want_lse = oracle(case, **options)
    tolerance = tolerance or TOLERANCE[case.q.dtype.name]
    np.testing.assert_allclose(out.astype(np.float64), want, atol=tolerance, rtol=tolerance)
    n = case.real_rows
    np.testing.assert_allclose(lse[:n], want_lse[:n], atol=lse_tolerance, rtol=2e-6)
    assert (lse[n:] == -np.inf).all()
