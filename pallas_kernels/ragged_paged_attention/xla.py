"""Ragged paged attention in plain XLA operations: the production path on CPU, and the fallback elsewhere.

Online softmax over blocks of pages, in loops whose trip counts are read from the data, so nothing grows with the longest
context. Rows are worked on in two ways:
  * singles - one decode (q_len 1) over its own pages, in splits of a few blocks: `_singles`, a loop over splits, several
    at once, inside it one over blocks;
  * groups and chunks - decodes that start with the same pages, which read those together, once, and the queries of a
    sequence with more of them: `_tiles`, a loop over tiles of rows, inside it one over blocks.
The work lists are computed inside the jit: they depend on no layer, so XLA's CSE leaves one copy per step, and the host has
nothing to plan. They hold one short row for each of at most (rows / tile + S) tiles and about
S * (P * ps / (SINGLE_KEYS * SINGLE_BLOCKS) + 1) splits.

Constants were chosen by CPU time at 12 query and 4 KV heads of 64. Keys and values are multiplied in float32 whatever they
are stored in, because XLA:CPU is slow at 16-bit products of few rows.

A tile's KV heads are worked on in two halves that do not depend on each other: XLA:CPU splits a product over two threads
badly and a softmax not at all, but runs one half's softmax beside the other's products. (Singles gain nothing from that.)
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from ..layout import Pool, PoolDims, pool_dims, take_heads
from .geometry import I32, Batch, Runs, grouped_batch, plain_batch, split_list, tile_list
from .mass import attention_mass
from .online import Parts, attend, combine, empty_partials, finish, join, split
from .params import AttentionParams

KEYS, MANY_KEYS = 128, 512  # of a block; a tile reads MANY_KEYS at once while it has so many
CHUNK_ROWS, GROUP_ROWS = 64, 32  # of a tile, where there may be chunks and where there are decodes only
SINGLES, SINGLE_KEYS = 16, 64  # so many blocks of this size are done at once: enough work for a second core
SINGLE_BLOCKS = 4  # of a row one after the other, before what they saw is added to what others of the row saw
GROUP_MIN_MEMBERS, GROUP_MIN_KEYS = 8, 128  # fewer members or keys are not worth a tile

_cut = partial(lax.dynamic_slice_in_dim, allow_negative_indices=False)
_put = partial(lax.dynamic_update_slice_in_dim, allow_negative_indices=False)
_at = partial(lax.dynamic_index_in_dim, keepdims=False, allow_negative_indices=False)


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
    at_once = min(SINGLES, 4 * most, most * -(-pages // block_pages))
    tiles = tile_list(runs, batch, tile=1, most=most, window=params.window)
    total, *columns, ids = split_list(tiles, batch.table, at_once=at_once, most_blocks=SINGLE_BLOCKS, block_pages=block_pages,
                                      page_size=dims.page_size, num_pages=dims.num_pages)
    rows = jnp.concatenate([jnp.stack(columns, axis=1), ids], axis=1)  # one read per turn of the loop, not one per column
    rows = jnp.pad(rows, ((0, -rows.shape[0] % at_once), (0, 0)))
    ahead = jnp.arange(block_pages * dims.page_size, dtype=I32)

    def step(i: jax.Array, out: jax.Array) -> jax.Array:
        splits = _cut(rows, i * at_once, at_once)  # [W, 5 + n]
        row, first, start, stop, length = (splits[:, i] for i in range(5))
        mine = q.at[:, row].get(mode="promise_in_bounds").swapaxes(0, 1)  # [W, Hkv, G, D]

        def block(j: jax.Array, seen: Parts) -> Parts:
            key = (first + j * ahead.size)[:, None] + ahead[None, :]
            there = (key >= start[:, None]) & (key < stop[:, None])  # [W, B]
            k, v = take_heads(pool, _cut(splits, 5 + j * block_pages, block_pages, axis=1), params.layout)  # [W, Hkv, B, D]
            v = jnp.where(there[:, None, :, None], v.astype(jnp.float32), 0.0)
            return attend(seen, mine, k.astype(jnp.float32), v, there[:, None, None], params.soft_cap)

        seen = split(empty_partials(mine.shape[:3], mine.shape[3]))
        new = join(lax.fori_loop(0, length[0], block, seen))  # the longest comes first

        def add(w: jax.Array, out: jax.Array) -> jax.Array:  # one after the other: splits may be of the same row
            place = _at(row, w)
            return _put(out, combine(_cut(out, place, 1, axis=1), _at(new, w)[:, None]), place, axis=1)

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
    tiles = tile_list(runs, batch, tile=tile, most=max(most, 1), window=params.window)
    few, many = (max(1, min(keys // page_size, pages)) for keys in (KEYS, MANY_KEYS))
    table = jnp.clip(jnp.pad(batch.table, ((0, 0), (0, many))), 0, dims.num_pages - 1)
    low = jnp.minimum(tiles.row, tokens - tile)
    rows = low[:, None] + jnp.arange(tile, dtype=I32)[None, :]
    its = (rows >= tiles.row[:, None]) & (rows < (tiles.row + tiles.rows)[:, None])
    positions = jnp.where(its, batch.positions[rows], -1)  # [I, tile]

    first, windowed = tiles.start // page_size, params.window is not None
    count = (tiles.stop - 1) // page_size + 1 - first
    seen_by_all = jnp.minimum(tiles.stop, jnp.where(its, positions, tiles.stop[:, None]).min(axis=1) + 1)
    full = count if windowed else seen_by_all // page_size - first
    large = full // many  # without a window these are blocks of which every row sees every key
    small = (count - large * many + few - 1) // few
    columns = jnp.stack([low, tiles.seq, tiles.start, tiles.stop, first, large, small], axis=1)
    halves = [slice(0, kv_heads // 2), slice(kv_heads // 2, kv_heads)] if kv_heads > 1 else [slice(0, 1)]

    def one_tile(i: jax.Array, out: jax.Array) -> jax.Array:
        low, seq, start, stop, first, large, small = _at(columns, i)
        mine = _cut(q, low, tile, axis=1).reshape(kv_heads, tile * groups, head_dim)
        at = jnp.repeat(_at(positions, i), groups)[:, None]  # [M, 1]

        def block(n: int, masked: bool, page: jax.Array, seen: tuple[Parts, ...]) -> tuple[Parts, ...]:
            """`seen`, by half of the heads [Hkv / 2, M, ...], after the n pages from number `page` of the sequence."""
            ids = lax.dynamic_slice(table, (seq, page), (1, n), allow_negative_indices=False)
            k, v = take_heads(pool, ids, params.layout)  # [1, Hkv, B, D]
            k, v, ok = k[0].astype(jnp.float32), v[0].astype(jnp.float32), None
            if masked:
                key = page * page_size + jnp.arange(n * page_size, dtype=I32)
                there = (key >= start) & (key < stop)  # [B]
                v = jnp.where(there[None, :, None], v, 0.0)
                ok = (key[None, :] <= at) & there[None, :]  # [M, B]
                if params.window is not None:
                    ok &= key[None, :] > at - params.window
            return tuple(attend(parts, mine[heads], k[heads], v[heads], ok, params.soft_cap)
                         for parts, heads in zip(seen, halves))

        before = _cut(out, low, tile, axis=1).reshape(kv_heads, tile * groups, head_dim + 2)
        seen = tuple(split(before[heads]) for heads in halves)
        seen = lax.fori_loop(0, large, lambda j, x: block(many, windowed, first + j * many, x), seen)
        rest = first + large * many
        seen = lax.fori_loop(0, small, lambda j, x: block(few, True, rest + j * few, x), seen)
        after = jnp.where((at >= 0)[None], jnp.concatenate([join(parts) for parts in seen]), before)
        return _put(out, after.reshape(kv_heads, tile, groups, head_dim + 2), low, axis=1)

    return lax.fori_loop(0, tiles.total, one_tile, out)
