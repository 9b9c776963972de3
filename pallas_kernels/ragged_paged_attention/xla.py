"""Ragged paged attention in plain XLA operations: the production path on CPU, and the fallback elsewhere.

One loop over a work list, `_attend`, with a trip count read from the data: an item gathers a block of pages, attends to it
with a tile of rows and combines the result with what the rows have seen, so nothing grows with the longest context. It
runs with up to three tile heights:
  * singles - one decode (q_len 1) over its own pages;
  * groups  - decodes that start with the same pages read those together, once;
  * chunks  - tiles of the queries of one sequence with more of them.
The work lists are computed inside the jit: they depend on no layer, so XLA's CSE leaves one copy per step, and the host has
nothing to plan. They hold one short row for each of at most (rows / tile + S) * P * ps / KEYS items.

Constants were chosen by CPU time at 12 query and 4 KV heads of 64. Keys and values are multiplied in float32 whatever they
are stored in, because XLA:CPU is slow at 16-bit products of few rows.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from ..layout import PoolDims, pool_dims, take_heads
from .geometry import I32, Batch, Items, Runs, grouped_batch, plain_batch, work_list
from .online import combine, empty_partials, finish, partial_attention
from .params import AttentionParams

KEYS = 128  # of a block; measured on CPU against 64, 256 and 512
CHUNK_ROWS, GROUP_ROWS = 64, 32  # of a tile
SINGLES = 4  # items of one row are done so many at a time: enough work for a second core
GROUP_MIN_MEMBERS, GROUP_MIN_KEYS = 8, 128  # fewer members or keys are not worth a tile


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

    tall = max(CHUNK_ROWS, GROUP_ROWS)
    q_rows = q_rows.astype(jnp.float32).reshape(tokens, dims.kv_heads, -1, head_dim).swapaxes(0, 1) * params.scale
    q_rows = jnp.pad(q_rows, ((0, 0), (0, tall), (0, 0), (0, 0)))  # [Hkv, T + tall, G, D]
    positions = jnp.pad(batch.positions, (0, tall), constant_values=-1)

    out = empty_partials(q_rows.shape[:3], head_dim)
    single, far = batch.q_lens == 1, jnp.full(seqs, pages * dims.page_size, I32)
    own = Runs(batch.first_row, single.astype(I32), batch.shared * dims.page_size, far)
    out = _attend(out, q_rows, pool, positions, batch, own, 1, SINGLES if seqs > 1 else 2, min(seqs, tokens), dims, params)
    if grouped:
        members = jnp.sum((batch.leader[None, :] == jnp.arange(seqs, dtype=I32)[:, None]).astype(I32), axis=1)
        members = jnp.where(batch.shared > 0, members, 0)
        runs = Runs(batch.first_row, members, jnp.zeros_like(members), batch.shared * dims.page_size)
        most = seqs // GROUP_ROWS + seqs // GROUP_MIN_MEMBERS
        out = _attend(out, q_rows, pool, positions, batch, runs, GROUP_ROWS, 1, most, dims, params)
    if params.max_q_len != 1:
        runs = Runs(batch.first_row, jnp.where(batch.q_lens > 1, batch.q_lens, 0), jnp.zeros_like(far), far)
        most = tokens // CHUNK_ROWS + min(seqs, tokens // 2)
        out = _attend(out, q_rows, pool, positions, batch, runs, CHUNK_ROWS, 1, most, dims, params)

    out = out[:, :tokens].swapaxes(0, 1).reshape(tokens, q_heads, head_dim + 2)
    result, lse = finish(out if batch.place is None else out[batch.place], sinks)
    return result.astype(q.dtype), lse, None


def _attend(
    out: jax.Array, q: jax.Array, pool: jax.Array, positions: jax.Array, batch: Batch, runs: Runs, tile: int,
    at_once: int, max_tiles: int, dims: PoolDims, params: AttentionParams,
) -> jax.Array:
    """Partials `out` [Hkv, T', G, D + 2] after the rows of all runs have seen their keys; q [Hkv, T', G, D], positions [T'].

    Rows of a tile beyond its own see no key, which leaves their partials as they are.
    """
    kv_heads, _, groups, head_dim = q.shape
    block_pages = max(1, min(KEYS // dims.page_size, batch.table.shape[1]))
    items: Items = work_list(
        runs, batch, tile=tile, block_pages=block_pages, max_tiles=max(max_tiles, 1), page_size=dims.page_size,
        num_pages=dims.num_pages, window=params.window)
    lanes = jnp.arange(at_once, dtype=I32)
    ahead = jnp.arange(tile, dtype=I32)[None, :]

    def step(i: jax.Array, out: jax.Array) -> jax.Array:
        number = i * at_once + lanes
        item = jax.tree.map(lambda x: x[jnp.minimum(number, x.shape[0] - 1)], items._replace(total=number))
        k, v = take_heads(pool, item.pages, params.layout)  # [W, Hkv, B, D]
        key = item.key[:, None] + jnp.arange(block_pages * dims.page_size, dtype=I32)[None, :]
        stop = jnp.where(number < items.total, item.stop, 0)
        there = (key >= item.start[:, None]) & (key < stop[:, None])  # [W, B]
        v = jnp.where(there[:, None, :, None], v.astype(jnp.float32), 0.0)
        rows = item.row[:, None] + ahead  # [W, tile]
        at = jnp.where(ahead < item.rows[:, None], positions[rows], -1)
        at = jnp.repeat(at, groups, axis=1)[:, :, None]  # [W, M, 1]
        ok = (key[:, None, :] <= at) & there[:, None, :]  # [W, M, B]
        if params.window is not None:
            ok &= key[:, None, :] > at - params.window
        mine = q[:, rows].swapaxes(0, 1).reshape(at_once, kv_heads, tile * groups, head_dim)
        new = partial_attention(mine, k.astype(jnp.float32), v, ok[:, None], params.soft_cap)
        new = new.reshape(at_once, kv_heads, tile, groups, head_dim + 2)
        for w in range(at_once):  # one after the other: items may be of the same rows
            old = lax.dynamic_slice_in_dim(out, item.row[w], tile, axis=1)
            out = lax.dynamic_update_slice_in_dim(out, combine(old, new[w]), item.row[w], axis=1)
        return out

    return lax.fori_loop(0, (items.total + at_once - 1) // at_once, step, out)
