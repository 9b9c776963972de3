"""The definition of ragged paged attention: every table gathered whole, one dense masked softmax per token."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ..layout import Pool, PoolDims, pool_dims, take_heads
from .params import AttentionParams


def ragged_paged_attention(
    q: jax.Array,
    pool: Pool,
    page_table: jax.Array,
    kv_lens: jax.Array,
    cu_q_lens: jax.Array,
    sinks: jax.Array | None,
    plan: jax.Array | None,
    *,
    params: AttentionParams,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """See `api.ragged_paged_attention`. Needs T * Hq * P * ps floats; `plan` is not used."""
    tokens, q_heads, head_dim = q.shape
    dtype, dims = q.dtype, pool_dims(pool, params.layout)
    context = page_table.shape[1] * dims.page_size
    kv = jnp.stack(take_heads(pool, jnp.clip(page_table, 0, dims.num_pages - 1), params.layout))  # [2, S, Hkv, context, D]
    kv = kv.swapaxes(2, 3).astype(jnp.float32)

    rows = jnp.arange(tokens, dtype=jnp.int32)
    seq = jnp.sum((rows[:, None] >= cu_q_lens[None, 1:]).astype(jnp.int32), axis=1)  # [T], S for padding
    real = seq < page_table.shape[0]
    seq = jnp.where(real, seq, 0)
    position = kv_lens[seq] - (cu_q_lens[seq + 1] - rows)  # [T]
    key = jnp.arange(context, dtype=jnp.int32)[None, :]
    mask = (key <= position[:, None]) & real[:, None]  # [T, context]
    if params.window is not None:
        mask &= key > position[:, None] - params.window

    kv = jnp.where(mask[None, :, :, None, None], kv[:, seq], 0.0)  # [2, T, context, Hkv, D]
    q = q.astype(jnp.float32).reshape(tokens, dims.kv_heads, -1, head_dim)
    scores = jnp.einsum("thgd,tkhd->thgk", q, kv[0]) * params.scale
    if params.soft_cap is not None:
        scores = params.soft_cap * jnp.tanh(scores / params.soft_cap)
    scores = jnp.where(mask[:, None, None, :], scores, -jnp.inf).reshape(tokens, q_heads, context)
    if sinks is not None:
        sink = jnp.broadcast_to(sinks.astype(jnp.float32)[None, :, None], (tokens, q_heads, 1))
        scores = jnp.concatenate([scores, jnp.where(real[:, None, None], sink, -jnp.inf)], axis=2)
    lse = jax.nn.logsumexp(scores, axis=2)  # [T, Hq]
    weights = jnp.where(real[:, None, None], jnp.exp(scores - lse[:, :, None]), 0.0)[:, :, :context]
    out = jnp.einsum("thgk,tkhd->thgd", weights.reshape(*q.shape[:3], context), kv[1]).reshape(tokens, q_heads, head_dim)
    return out.astype(dtype), lse, _mass(weights, seq, page_table.shape, dims, params)


def _mass(
    weights: jax.Array, seq: jax.Array, table_shape: tuple[int, ...], dims: PoolDims, params: AttentionParams
) -> jax.Array | None:
    """Of weights [T, Hq, context] (0 for padding rows)."""
    if params.mass is None:
        return None
    seqs, pages = table_shape
    by_row = weights.reshape(weights.shape[0], dims.kv_heads, -1, weights.shape[2]).sum(axis=2)
    by_token = jnp.zeros((seqs, *by_row.shape[1:]), jnp.float32).at[seq].add(by_row)
    return by_token if params.mass == "token" else by_token.reshape(seqs, dims.kv_heads, pages, -1).sum(axis=3)
