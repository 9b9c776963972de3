"""Ragged paged attention in plain XLA operations: the production path on CPU, and the fallback elsewhere.

Online softmax over blocks of pages, in loops whose trip counts are read from the data, so nothing grows with the longest
context. Rows are worked on in two ways:
  * singles - one decode (q_len 1) over its own pages: `_singles`, a loop over blocks, several at once;
  * groups and chunks - decodes that start with the same pages, which read those together, once, and the queries of a
    sequence with more of them: `_tiles`, a loop over tiles of rows, inside it one over blocks.
The work lists are computed inside the jit: they depend on no layer, so XLA's CSE leaves one copy per step, and the host has
nothing to plan. They hold one short row for each of at most (rows / tile + S) tiles and S * P * ps / SINGLE_KEYS blocks.

Constants were chosen by CPU time at 12 query and 4 KV heads of 64. Keys and values are multiplied in float32 whatever they
are stored in, because XLA:CPU is slow at 16-bit products of few rows.

A tile's KV heads are worked on in two halves that do not depend on each other: XLA:CPU splits a product over two threads
badly and a softmax not at all, but runs one half's softmax beside the other's products. (Singles gain nothing from that.)
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from ..layout import Pool, PoolDims, pool_dims, take_heads
from .geometry import I32, Batch, Runs, block_list, grouped_batch, plain_batch, tile_list
from .mass import attention_mass
from .online import combine, empty_partials, finish, partial_attention
from .params import AttentionParams

KEYS, MANY_KEYS = 128, 512  # of a block; a tile reads MANY_KEYS at once while it has so many
CHUNK_ROWS, GROUP_ROWS = 64, 32  # of a tile, where there may be chunks and where there are decodes only
SINGLES, SINGLE_KEYS = 16, 64  # so many blocks of this size are done at once: enough work for a second core
GROUP_MIN_MEMBERS, GROUP_MIN_KEYS = 8, 128  # fewer members or keys are not worth a tile


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
    """See `api.ragged_paged_attention`."""
    tokens, q_heads, head_dim = q.shape
    seqs, pages = page_table.shape
    dims = pool_dims(pool, params.layout)
    min_pages = -(-GROUP_MIN_KEYS // dims.page_size)
    grouped = params.window is None and seqs >= GROUP_MIN_MEMBERS and pages >= min_pages
    if grouped:
        batch = grouped_batch(page_table, kv_lens, cu_q_lens, tokens, dims.page_size, min_pages, GROUP_MIN_MEMBERS)
        q_rows = q[batch.source]
    else:
        batch = plain_batch(page_table, kv_lens, cu_q_lens, tokens)
        q_rows = q

    q_rows = q_rows.astype(jnp.float32).reshape(tokens, dims.kv_heads, -1, head_dim).swapaxes(0, 1) * params.scale
    out = empty_partials(q_rows.shape[:3], head_dim)
    single, far = batch.q_lens == 1, jnp.full(seqs, pages * dims.page_size, I32)
    own = Runs(batch.first_row, single.astype(I32), batch.shared * dims.page_size, far)
    out = _singles(out, q_rows, pool, batch, own, min(seqs, tokens), dims, params)
    if grouped or params.max_q_len != 1:
        tile = min(tokens, GROUP_ROWS if params.max_q_len == 1 else CHUNK_ROWS)
        members = jnp.sum((batch.leader[None, :] == jnp.arange(seqs, dtype=I32)[:, None]).astype(I32), axis=1)
        runs = Runs(batch.first_row, jnp.where(single, jnp.where(batch.shared > 0, members, 0), batch.q_lens),
                    jnp.zeros_like(far), jnp.where(single, batch.shared * dims.page_size, far))
        most = seqs // tile + seqs // GROUP_MIN_MEMBERS if params.max_q_len == 1 else tokens // tile + min(seqs, tokens // 2)
        out = _tiles(out, q_rows, pool, batch, runs, tile, most, dims, params)

    out = out.swapaxes(0, 1).reshape(tokens, q_heads, head_dim + 2)
    result, lse = finish(out if batch.place is None else out[batch.place], sinks)
    mass = attention_mass(q, pool, page_table, kv_lens, cu_q_lens, lse, params=params)
    return result.astype(q.dtype), lse, mass


def _singles(
    out: jax.Array, q: jax.Array, pool: Pool, batch: Batch, runs: Runs, most: int, dims: PoolDims, params: AttentionParams
) -> jax.Array:
    """Partials `out` [Hkv, T, G, D + 2] after the only row of each run has seen its keys; q [Hkv, T, G, D]."""
    pages = batch.table.shape[1]
    block_pages = max(1, min(SINGLE_KEYS // dims.page_size, pages))
    tiles = tile_list(runs, batch, tile=1, most=most, window=params.window)
    total, *columns, ids = block_list(tiles, batch.table, block_pages=block_pages, page_size=dims.page_size,
                                      num_pages=dims.num_pages)
    rows = jnp.concatenate([jnp.stack(columns, axis=1), ids], axis=1)  # one read per block of the loop, not one per column
    at_once = min(SINGLES, 4 * most, most * -(-pages // block_pages))
    lanes = jnp.arange(at_once, dtype=I32)

    def step(i: jax.Array, out: jax.Array) -> jax.Array:
        number = i * at_once + lanes
        block = rows.at[number].get(mode="clip")  # [W, 4 + n]
        row, first, start, stop = (block[:, i] for i in range(4))
        key = first[:, None] + jnp.arange(block_pages * dims.page_size, dtype=I32)[None, :]
        stop = jnp.where(number < total, stop, 0)
        there = (key >= start[:, None]) & (key < stop[:, None])  # [W, B]
        k, v = take_heads(pool, block[:, 4:], params.layout)  # [W, Hkv, B, D]
        v = jnp.where(there[:, None, :, None], v.astype(jnp.float32), 0.0)
        mine = q.at[:, row].get(mode="promise_in_bounds").swapaxes(0, 1)  # [W, Hkv, G, D]
        new = partial_attention(mine, k.astype(jnp.float32), v, there[:, None, None], params.soft_cap)

        def add(w: jax.Array, out: jax.Array) -> jax.Array:  # one after the other: blocks may be of the same row
            old = lax.dynamic_slice_in_dim(out, row[w], 1, axis=1)
            return lax.dynamic_update_slice_in_dim(out, combine(old, new[w][:, None]), row[w], axis=1)

        return lax.fori_loop(0, at_once, add, out)

    return lax.fori_loop(0, (total + at_once - 1) // at_once, step, out)


def _tiles(
    out: jax.Array, q: jax.Array, pool: Pool, batch: Batch, runs: Runs, tile: int, most: int, dims: PoolDims,
    params: AttentionParams,
) -> jax.Array:
    """Partials `out` [Hkv, T, G, D + 2] after the rows of all runs have seen their keys, tile by tile; q [Hkv, T, G, D].

    A tile's rows that are not its own keep their partials: NaN among the tile's values must not reach them.
    """
    kv_heads, tokens, groups, head_dim = q.shape
    page_size, pages = dims.page_size, batch.table.shape[1]
    total, *columns = tile_list(runs, batch, tile=tile, most=max(most, 1), window=params.window)
    few, many = (max(1, min(keys // page_size, pages)) for keys in (KEYS, MANY_KEYS))
    rows = jnp.stack(columns, axis=1)
    table = jnp.clip(jnp.pad(batch.table, ((0, 0), (0, many))), 0, dims.num_pages - 1)
    ahead = jnp.arange(tile, dtype=I32)
    halves = [slice(0, kv_heads // 2), slice(kv_heads // 2, kv_heads)] if kv_heads > 1 else [slice(0, 1)]

    def one_tile(i: jax.Array, out: jax.Array) -> jax.Array:
        row, own, seq, start, stop = lax.dynamic_index_in_dim(rows, i, keepdims=False)
        low = jnp.minimum(row, tokens - tile)
        its = (low + ahead >= row) & (low + ahead < row + own)
        mine = lax.dynamic_slice_in_dim(q, low, tile, axis=1).reshape(kv_heads, tile * groups, head_dim)
        position = lax.dynamic_slice_in_dim(batch.positions, low, tile)
        at = jnp.repeat(jnp.where(its, position, -1), groups)[:, None]  # [M, 1]

        def block(n: int, masked: bool, page: jax.Array, seen: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            """`seen` [Hkv / 2, M, D + 2] after the n pages from number `page` of the sequence."""
            k, v = take_heads(pool, lax.dynamic_slice(table, (seq, page), (1, n)), params.layout)  # [1, Hkv, B, D]
            k, v, ok = k[0].astype(jnp.float32), v[0].astype(jnp.float32), None
            if masked:
                key = page * page_size + jnp.arange(n * page_size, dtype=I32)
                there = (key >= start) & (key < stop)  # [B]
                v = jnp.where(there[None, :, None], v, 0.0)
                ok = (key[None, :] <= at) & there[None, :]  # [M, B]
                if params.window is not None:
                    ok &= key[None, :] > at - params.window
            return tuple(combine(x, partial_attention(mine[heads], k[heads], v[heads], ok, params.soft_cap))
                         for x, heads in zip(seen, halves))

        first, windowed = start // page_size, params.window is not None
        count = (stop - 1) // page_size + 1 - first
        full = count if windowed else jnp.minimum(stop, jnp.min(jnp.where(its, position, stop)) + 1) // page_size - first
        large = full // many  # without a window these are blocks of which every row sees every key
        rest = first + large * many
        before = lax.dynamic_slice_in_dim(out, low, tile, axis=1).reshape(kv_heads, tile * groups, head_dim + 2)
        parts = tuple(before[heads] for heads in halves)
        parts = lax.fori_loop(0, large, lambda j, x: block(many, windowed, first + j * many, x), parts)
        small = (count - large * many + few - 1) // few
        parts = lax.fori_loop(0, small, lambda j, x: block(few, True, rest + j * few, x), parts)
        seen = jnp.where(jnp.repeat(its, groups)[None, :, None], jnp.concatenate(parts), before)
        return lax.dynamic_update_slice_in_dim(out, seen.reshape(kv_heads, tile, groups, head_dim + 2), low, axis=1)

    return lax.fori_loop(0, total, one_tile, out)
