"""Public `ragged_paged_attention`: validation and choice of implementation."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from ..dispatch import dispatch
from ..layout import Pool, pool_dims
from . import mosaic_tpu, ref, xla
from .mosaic_gpu import entry as mosaic_gpu
from .params import AttentionParams

IMPLEMENTATIONS = {  # best first for "auto": the Mosaic kernels come before XLA once a result on hardware is committed
    "xla": xla.ragged_paged_attention,
    "ref": ref.ragged_paged_attention,
    "mosaic_gpu": mosaic_gpu.ragged_paged_attention,
    "mosaic_tpu": mosaic_tpu.ragged_paged_attention,
}


def ragged_paged_attention(
    q: jax.Array,
    pool: Pool,
    page_table: jax.Array,
    kv_lens: jax.Array,
    cu_q_lens: jax.Array,
    *,
    layout: str,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: jax.Array | None = None,
    max_q_len: int | None = None,
    plan: jax.Array | None = None,
    impl: str = "auto",
    return_lse: bool = False,
    return_mass: str | None = None,
) -> jax.Array | tuple[jax.Array, ...]:
    """Causal attention of every sequence's newest queries over its paged KV; any mix of chunks, decodes and drafts.

    q: [T, Hq, D]; rows cu_q_lens[s] : cu_q_lens[s + 1] are the last q_len positions of sequence s, the others padding.
    pool: one layer's pages (`layout.Pool`), with the keys and values of these queries already written.
    page_table: [S, P] int32, page of positions [i * ps, (i + 1) * ps); kv_lens: [S] int32, tokens in the cache including
    the queries; cu_q_lens: [S + 1] int32, ascending from 0. A padding sequence has q_len 0. Entries of the table and slots of
    pages that no query can see may hold anything. window: a query at p sees keys at positions > p - window.
    soft_cap: scores become cap * tanh(scores / cap). sinks: [Hq] a logit per head added to the softmax denominator.
    max_q_len: a static promise about the batch; 1 (only decodes) saves compiling the rest.
    plan: what an `attention_planner` made for this batch and window, or None.
    return_mass: "page" or "token": also return where the attention went, what heavy-hitter policies (H2O, Scissorhands,
    SnapKV) need.
    Returns [T, Hq, D] in q's dtype, padding rows 0; with return_lse also [T, Hq] float32, the natural log of the softmax
    denominator (sink included), -inf for padding; with return_mass also [S, Hkv, P] (by page) or [S, Hkv, P * ps] (by
    token) float32, the softmax weights summed over the sequence's queries and the query heads of each KV head.
    Scores, softmax and sums are float32. ValueError: bad shapes.
    """
    page_table, kv_lens, cu_q_lens = jnp.asarray(page_table), jnp.asarray(kv_lens), jnp.asarray(cu_q_lens)
    dims = pool_dims(pool, layout)
    _check(q, pool, page_table, kv_lens, cu_q_lens, sinks, dims)
    if window is not None and window < 1 or soft_cap is not None and not soft_cap > 0 or not math.isfinite(scale):
        raise ValueError(f"window and soft_cap must be positive or None, scale finite, got {window=} {soft_cap=} {scale=}")
    if return_mass not in (None, "page", "token"):
        raise ValueError(f"return_mass must be None, 'page' or 'token', got {return_mass!r}")
    params = AttentionParams(layout, float(scale), window, soft_cap, 1 if q.shape[0] == 1 else max_q_len, return_mass)
    out, lse, mass = dispatch("ragged_paged_attention", IMPLEMENTATIONS, impl, q, pool, page_table, kv_lens, cu_q_lens, sinks,
                        plan, params=params)
    result = (out,) + (lse,) * return_lse + (mass,) * (return_mass is not None)
    return result if len(result) > 1 else out


def _check(q, pool, page_table, kv_lens, cu_q_lens, sinks, dims) -> None:
    heads_ok = q.ndim == 3 and q.shape[1] % dims.kv_heads == 0 and q.shape[2] == dims.head_dim
    if not heads_ok or q.dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"q must be float32/bfloat16/float16 [T, multiple of {dims.kv_heads}, {dims.head_dim}] for a pool "
                         f"of {dims}, got {q.dtype} {q.shape}")
    if page_table.ndim != 2 or kv_lens.shape != page_table.shape[:1] or cu_q_lens.shape != (page_table.shape[0] + 1,):
        raise ValueError(f"page_table [S, P], kv_lens [S] and cu_q_lens [S + 1] do not fit together: {page_table.shape}, "
                         f"{kv_lens.shape}, {cu_q_lens.shape}")
    for name, x in (("page_table", page_table), ("kv_lens", kv_lens), ("cu_q_lens", cu_q_lens)):
        if x.dtype != "int32":
            raise ValueError(f"{name} must be int32, got {x.dtype} {x.shape}")
    if sinks is not None and sinks.shape != q.shape[1:2]:
        raise ValueError(f"sinks must be [{q.shape[1]}] for q {q.shape}, got {sinks.shape}")
