"""Ragged paged attention in plain XLA operations: the production path on CPU, and the fallback elsewhere.

Three loops with trip counts read from the data, each over tiles of gathered pages with an online softmax, so that nothing
grows with the longest context:
  * chunks  - tiles of queries of one sequence (q_len > 1) over the pages they see;
  * groups  - decodes (q_len = 1) that start with the same pages read those once, together;
  * lanes   - what is left of every decode: (sequence, block of pages) items, dealt evenly to a few lanes.
Partials of groups and lanes are merged at the end. The work lists are computed inside the jit from the lengths: they are
layer-invariant, so XLA's CSE leaves one copy per step, and the host has nothing to plan (`attention_plan` is empty).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from ..layout import PoolDims, pool_dims, take_heads
from .geometry import I32, Decodes, cumulative, grouped_decodes, owner, plain_decodes, rows_of
from .online import add_block, empty_partials, finish, merge
from .params import AttentionParams

CHUNK_QUERIES, CHUNK_KEYS = 64, 256  # a tile of the chunks loop
GROUP_QUERIES, GROUP_KEYS = 32, 256  # a tile of the groups loop
GROUP_MEMBERS, GROUP_MIN_KEYS = 8, 128  # fewer members or keys are not worth a tile
LANES, LANE_KEYS = 4, 128


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
    q_lens = cu_q_lens[1:] - cu_q_lens[:-1]
    seq = rows_of(cu_q_lens, tokens)
    scaled = q.astype(jnp.float32) * params.scale
    scaled = scaled.reshape(tokens, dims.kv_heads, q_heads // dims.kv_heads, head_dim)

    decodes = _decodes(page_table, kv_lens, q_lens, dims, params)
    rows = jnp.minimum(cu_q_lens[:-1][decodes.order], tokens - 1)
    singles = _decode_partials(scaled[rows], pool, page_table[decodes.order], decodes, dims, params)
    known = jnp.minimum(seq, q_lens.shape[0] - 1)
    partial = singles[decodes.place[known]]  # [T, Hkv, G, D + 2]
    is_decode = q_lens[known] == 1
    if params.max_q_len != 1:
        chunks = _chunk_partials(scaled, pool, page_table, kv_lens, cu_q_lens, dims, params)
        partial = jnp.where(is_decode[:, None, None, None], partial, chunks)
    partial = jnp.where((seq < q_lens.shape[0])[:, None, None, None], partial, 0.0)
    out, lse = finish(partial.reshape(tokens, q_heads, head_dim + 2), sinks)
    return out.astype(q.dtype), lse


def _decodes(
    page_table: jax.Array, kv_lens: jax.Array, q_lens: jax.Array, dims: PoolDims, params: AttentionParams
) -> Decodes:
    min_pages = -(-GROUP_MIN_KEYS // dims.page_size)
    if params.window is None and page_table.shape[0] >= GROUP_MEMBERS and page_table.shape[1] >= min_pages:
        return grouped_decodes(page_table, kv_lens, q_lens, dims.page_size, min_pages, GROUP_MEMBERS)
    return plain_decodes(kv_lens, q_lens, dims.page_size, params.window)


def _decode_partials(
    q: jax.Array, pool: jax.Array, table: jax.Array, decodes: Decodes, dims: PoolDims, params: AttentionParams
) -> jax.Array:
    """Partials [S, Hkv, G, D + 2] of one query per place; q [S, Hkv, G, D], table [S, P] by place."""
    lanes = _lane_partials(q, pool, table, decodes, dims, params)
    min_pages = -(-GROUP_MIN_KEYS // dims.page_size)
    if params.window is not None or table.shape[0] < GROUP_MEMBERS or table.shape[1] < min_pages:
        return lanes
    seqs = table.shape[0]
    place = jnp.arange(seqs, dtype=I32)
    members = jnp.sum((decodes.leader[None, :] == place[:, None]).astype(I32), axis=1)
    members = jnp.where(decodes.shared > 0, members, 0)  # by leader
    groups = _tile_loop(
        q, pool, table, starts=place, counts=members, low=jnp.zeros_like(place), positions=decodes.length - 1,
        stops=decodes.shared * dims.page_size, tile=min(GROUP_QUERIES, seqs), keys=GROUP_KEYS, dims=dims, params=params)
    groups = jnp.where((decodes.shared > 0)[:, None, None, None], groups, empty_partials(q.shape[:3], dims.head_dim))
    return merge(jnp.stack([lanes, groups]), axis=0)


def _chunk_partials(
    q: jax.Array, pool: jax.Array, table: jax.Array, kv_lens: jax.Array, cu_q_lens: jax.Array, dims: PoolDims,
    params: AttentionParams,
) -> jax.Array:
    """Partials [T, Hkv, G, D + 2] of the rows of sequences with more than one query; other rows hold anything."""
    tokens = q.shape[0]
    q_lens = cu_q_lens[1:] - cu_q_lens[:-1]
    seq = jnp.minimum(rows_of(cu_q_lens, tokens), q_lens.shape[0] - 1)
    positions = kv_lens[seq] - cu_q_lens[1:][seq] + jnp.arange(tokens, dtype=I32)
    return _tile_loop(
        q, pool, table, starts=cu_q_lens[:-1], counts=jnp.where(q_lens > 1, q_lens, 0), low=jnp.zeros_like(q_lens),
        positions=positions, stops=kv_lens, tile=min(CHUNK_QUERIES, tokens), keys=CHUNK_KEYS, dims=dims, params=params)


def _tile_loop(
    q: jax.Array, pool: jax.Array, table: jax.Array, *, starts: jax.Array, counts: jax.Array, low: jax.Array,
    positions: jax.Array, stops: jax.Array, tile: int, keys: int, dims: PoolDims, params: AttentionParams,
) -> jax.Array:
    """Partials [T, Hkv, G, D + 2] of runs of rows that read the same table row.

    Run s: rows starts[s] .. + counts[s] (ascending) against table[s], keys below stops[s]; positions: [T] of the rows. A row
    sees keys up to its position, within the window. Rows outside every run hold anything.
    """
    rows, kv_heads, groups, head_dim = q.shape
    block_pages = max(1, min(keys // dims.page_size, table.shape[1]))
    block = block_pages * dims.page_size
    tiles = cumulative((counts + tile - 1) // tile)
    q = jnp.pad(q, ((0, tile), (0, 0), (0, 0), (0, 0)))
    positions = jnp.pad(positions, (0, tile))

    def one_tile(i: jax.Array, out: jax.Array) -> jax.Array:
        run = owner(tiles, i)
        first = starts[run] + (i - tiles[run]) * tile
        size = jnp.minimum(tile, starts[run] + counts[run] - first)
        position = lax.dynamic_slice_in_dim(positions, first, tile)
        stop = jnp.minimum(positions[first + size - 1] + 1, stops[run])
        start = jnp.int32(0) if params.window is None else jnp.maximum(position[0] - params.window + 1, 0)
        low_page, high_page = start // dims.page_size, (stop - 1) // dims.page_size
        mine = lax.dynamic_slice_in_dim(q, first, tile).transpose(1, 0, 2, 3).reshape(kv_heads, tile * groups, head_dim)
        at = jnp.repeat(position, groups)[None, :]  # [1, M]

        def one_block(j: jax.Array, partial: jax.Array) -> jax.Array:
            page = low_page + j * block_pages
            index = jnp.clip(page + jnp.arange(block_pages, dtype=I32), low_page, high_page)
            pages = jnp.clip(table[run, index], 0, dims.num_pages - 1)
            k, v = take_heads(pool, pages[None], params.layout)
            key = page * dims.page_size + jnp.arange(block, dtype=I32)
            v = jnp.where(((key >= start) & (key < stop))[None, :, None], v[0].astype(jnp.float32), 0.0)
            ok = (key[:, None] <= at) & (key < stop)[:, None]  # [B, M]
            if params.window is not None:
                ok &= key[:, None] > at - params.window
            return add_block(partial, mine, k[0].astype(jnp.float32), v, ok[None], params.soft_cap)

        blocks = (high_page - low_page) // block_pages + 1
        partial = lax.fori_loop(0, blocks, one_block, empty_partials((kv_heads, tile * groups), head_dim))
        partial = partial.reshape(kv_heads, tile, groups, head_dim + 2).transpose(1, 0, 2, 3)
        return lax.dynamic_update_slice_in_dim(out, partial, first, 0)

    out = jnp.zeros((rows + tile, kv_heads, groups, head_dim + 2), jnp.float32)
    return lax.fori_loop(0, tiles[-1], one_tile, out)[:rows]


def _lane_partials(
    q: jax.Array, pool: jax.Array, table: jax.Array, decodes: Decodes, dims: PoolDims, params: AttentionParams
) -> jax.Array:
    """Partials [S, Hkv, G, D + 2] of every place's pages from `low` on.

    The items (place, block) in order are cut into LANES runs of equal length; step t handles item t of every run. A lane
    keeps the partial of its current place and writes it to slot place + lane, which no other lane uses: two lanes meet in
    at most one place.
    """
    seqs, kv_heads, groups, head_dim = q.shape
    lanes = LANES if seqs > 1 else 2
    block_pages = max(1, min(LANE_KEYS // dims.page_size, table.shape[1]))
    block = block_pages * dims.page_size
    last = (decodes.length - 1) // dims.page_size
    blocks = cumulative(jnp.where(decodes.length > 0, (last - decodes.low) // block_pages + 1, 0))
    run = (blocks[-1] + lanes - 1) // lanes
    lane = jnp.arange(lanes, dtype=I32)

    def item(t: jax.Array) -> tuple[jax.Array, ...]:
        """Of item t of every lane: place, first key, number of keys the query sees, pages [W, n]."""
        number = lane * run + t
        place = owner(blocks, jnp.minimum(number, blocks[-1] - 1))
        page = decodes.low[place] + (number - blocks[place]) * block_pages
        index = page[:, None] + jnp.arange(block_pages, dtype=I32)[None, :]
        index = jnp.clip(jnp.minimum(index, last[place][:, None]), 0, table.shape[1] - 1)
        pages = jnp.clip(table[place[:, None], index], 0, dims.num_pages - 1)
        stop = jnp.where(number < blocks[-1], decodes.length[place], 0)
        return place, page * dims.page_size, stop, pages

    def step(t: jax.Array, carry: tuple) -> tuple:
        partial, previous, (place, start, stop, pages), slots = carry
        k, v = take_heads(pool, pages, params.layout)
        key = start[:, None] + jnp.arange(block, dtype=I32)[None, :]
        ok = key < stop[:, None]  # [W, B]
        if params.window is not None:
            ok &= key >= stop[:, None] - params.window
        ok = ok[:, None, :, None]
        v = jnp.where(ok, v.astype(jnp.float32), 0.0)
        partial = jnp.where((place == previous)[:, None, None, None], partial, empty_partials(partial.shape[:-1], head_dim))
        partial = add_block(partial, q[place], k.astype(jnp.float32), v, ok, params.soft_cap)
        for w in range(lanes):
            slots = lax.dynamic_update_slice_in_dim(slots, partial[w : w + 1], place[w] + w, 0)
        return partial, place, item(t + 1), slots

    slots = empty_partials((seqs + lanes, kv_heads, groups), head_dim)
    init = (empty_partials((lanes, kv_heads, groups), head_dim), jnp.full(lanes, -1, I32), item(jnp.int32(0)), slots)
    slots = lax.fori_loop(0, run, step, init)[-1]
    begin, end = blocks[:-1, None], blocks[1:, None]
    met = jnp.maximum(begin, lane[None, :] * run) < jnp.minimum(end, (lane[None, :] + 1) * run)  # [S, W]
    parts = slots[jnp.arange(seqs, dtype=I32)[:, None] + lane[None, :]]  # [S, W, Hkv, G, D + 2]
    parts = jnp.where(met[:, :, None, None, None], parts, empty_partials(parts.shape[:-1], head_dim))
    return merge(parts, axis=1)
