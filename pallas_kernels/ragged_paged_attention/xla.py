"""Ragged paged attention in plain XLA operations."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from ..layout import PoolDims, pool_dims, to_canonical
from .params import AttentionParams

_QUERY_TILE = 64
_KV_BLOCK = 256


def ragged_paged_attention(
    q: jax.Array,
    pool: jax.Array,
    page_table: jax.Array,
    kv_lens: jax.Array,
    cu_q_lens: jax.Array,
    sinks: jax.Array | None,
    plan: jax.Array | None,
    *,
    params: AttentionParams,
) -> tuple[jax.Array, jax.Array]:
    """See `api.ragged_paged_attention`."""
    tokens, q_heads, head_dim = q.shape
    dims = pool_dims(pool, params.layout)
    groups = q_heads // dims.kv_heads
    tile = 1 if tokens <= page_table.shape[0] else min(_QUERY_TILE, tokens)
    q_lens = cu_q_lens[1:] - cu_q_lens[:-1]
    cu_tiles = jnp.cumsum((q_lens + tile - 1) // tile, dtype=jnp.int32)  # [S]
    pages_per_block = max(1, min(_KV_BLOCK // dims.page_size, page_table.shape[1]))
    block = pages_per_block * dims.page_size
    scaled = jnp.pad(q.astype(jnp.float32) * params.scale, ((0, tile), (0, 0), (0, 0)))

    def one_tile(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        out, lse = carry
        seq = jnp.sum((cu_tiles <= i).astype(jnp.int32))
        first_tile = jnp.where(seq > 0, cu_tiles[seq - 1], 0)
        row = cu_q_lens[seq] + (i - first_tile) * tile
        end = cu_q_lens[seq + 1]
        position = kv_lens[seq] - end + row + jnp.arange(tile, dtype=jnp.int32)  # [tile]
        stop = jnp.minimum(position[-1] + 1, kv_lens[seq])
        start = jnp.maximum(position[0] - params.window + 1, 0) if params.window is not None else jnp.int32(0)
        rows = lax.dynamic_slice_in_dim(scaled, row, tile)  # [tile, Hq, D]
        rows = rows.reshape(tile, dims.kv_heads, groups, head_dim).transpose(1, 2, 0, 3)  # [Hkv, G, tile, D]

        def one_block(j: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            index = j * pages_per_block + jnp.arange(pages_per_block, dtype=jnp.int32)
            pages = page_table[seq, jnp.minimum(index, page_table.shape[1] - 1)]
            pages = pool[jnp.clip(pages, 0, dims.num_pages - 1)]
            kv = to_canonical(pages, params.layout).transpose(1, 3, 0, 2, 4)  # [2, Hkv, pages, ps, D]
            kv = kv.reshape(2, dims.kv_heads, block, head_dim).astype(jnp.float32)
            key = j * block + jnp.arange(block, dtype=jnp.int32)
            kv = jnp.where(((key >= start) & (key < stop))[None, None, :, None], kv, 0.0)
            mask = key[None, :] <= position[:, None]
            if params.window is not None:
                mask &= key[None, :] > position[:, None] - params.window
            scores = jnp.einsum("hgtd,hkd->hgtk", rows, kv[0])
            if params.soft_cap is not None:
                scores = params.soft_cap * jnp.tanh(scores / params.soft_cap)
            scores = jnp.where(mask[None, None], scores, -jnp.inf)
            top, total, acc = state
            new_top = jnp.maximum(top, scores.max(axis=-1))
            safe = jnp.where(new_top == -jnp.inf, 0.0, new_top)
            weights = jnp.exp(scores - safe[..., None])
            shrink = jnp.exp(top - safe)
            total = total * shrink + weights.sum(axis=-1)
            acc = acc * shrink[..., None] + jnp.einsum("hgtk,hkd->hgtd", weights, kv[1])
            return new_top, total, acc

        shape = (dims.kv_heads, groups, tile)
        if sinks is None:
            init = jnp.full(shape, -jnp.inf, jnp.float32), jnp.zeros(shape, jnp.float32)
        else:
            sink = sinks.astype(jnp.float32).reshape(dims.kv_heads, groups, 1)
            init = jnp.broadcast_to(sink, shape), jnp.ones(shape, jnp.float32)
        top, total, acc = lax.fori_loop(
            start // block, (stop + block - 1) // block, one_block, (*init, jnp.zeros((*shape, head_dim), jnp.float32)))
        new = (acc / total[..., None]).transpose(2, 0, 1, 3).reshape(tile, q_heads, head_dim)
        new_lse = (top + jnp.log(total)).transpose(2, 0, 1).reshape(tile, q_heads)
        mine = row + jnp.arange(tile, dtype=jnp.int32) < end
        new = jnp.where(mine[:, None, None], new, 0.0)
        new_lse = jnp.where(mine[:, None], new_lse, -jnp.inf)
        return (lax.dynamic_update_slice_in_dim(out, new, row, 0), lax.dynamic_update_slice_in_dim(lse, new_lse, row, 0))

    init = (jnp.zeros((tokens + tile, q_heads, head_dim), jnp.float32),
            jnp.full((tokens + tile, q_heads), -jnp.inf, jnp.float32))
    out, lse = lax.fori_loop(0, cu_tiles[-1], one_tile, init)
    return out[:tokens].astype(q.dtype), lse[:tokens]
