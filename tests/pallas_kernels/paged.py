"""Poisoned paged batches, and attention computed by an independent float64 numpy oracle."""

from __future__ import annotations

from dataclasses import dataclass
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
    tokens, q_heads, head_dim = case.q.shape
    out, lse = np.zeros((tokens, q_heads, head_dim)), np.full((tokens, q_heads), -np.inf)
    for s, (begin, end) in enumerate(pairwise(case.cu_q_lens)):
        for row in range(begin, end):
            p = int(case.kv_lens[s]) - (end - row)
            low = 0 if window is None else max(0, p - window + 1)
            for h in range(q_heads):
                kv_head = h * case.keys[s].shape[1] // q_heads
                k = case.keys[s][low : p + 1, kv_head].astype(np.float64)
                v = case.values[s][low : p + 1, kv_head].astype(np.float64)
                x = k @ case.q[row, h].astype(np.float64) * scale
                x = x if soft_cap is None else soft_cap * np.tanh(x / soft_cap)
                e = np.exp(x)
                total = e.sum() + (0 if sinks is None else np.exp(np.float64(sinks[h])))
                out[row, h], lse[row, h] = e @ v / total, np.log(total)
    return out, lse


def oracle_mass(case: Case, lse: np.ndarray, *, scale, window=None, soft_cap=None, sinks=None) -> np.ndarray:
    """Softmax weights by token [S, Hkv, P * ps] in float64, given log-sum-exps [T, Hq] that hold the sinks."""
    page_size = case.pool.shape[3]  # head_major
    mass = np.zeros((len(case.keys), case.keys[0].shape[1], case.page_table.shape[1] * page_size))
    for s, (begin, end) in enumerate(pairwise(case.cu_q_lens)):
        for row in range(begin, end):
            p = int(case.kv_lens[s]) - (end - row)
            low = 0 if window is None else max(0, p - window + 1)
            for h in range(case.q.shape[1]):
                kv_head = h * case.keys[s].shape[1] // case.q.shape[1]
                x = case.keys[s][low : p + 1, kv_head].astype(np.float64) @ case.q[row, h].astype(np.float64) * scale
                x = x if soft_cap is None else soft_cap * np.tanh(x / soft_cap)
                mass[s, kv_head, low : p + 1] += np.exp(x - lse[row, h])
    return mass


def check(case: Case, result, *, tolerance=None, **options) -> None:
    """Compare (output, lse) with the oracle; every real row must be finite, padding must be 0 and -inf."""
    out, lse = (np.asarray(x) for x in result)
    assert out.dtype == case.q.dtype and lse.dtype == np.float32
    want, want_lse = oracle(case, **options)
    tolerance = tolerance or TOLERANCE[case.q.dtype.name]
    np.testing.assert_allclose(out.astype(np.float64), want, atol=tolerance, rtol=tolerance)
    n = case.real_rows
    np.testing.assert_allclose(lse[:n], want_lse[:n], atol=2e-5, rtol=2e-6)
    assert (lse[n:] == -np.inf).all()
