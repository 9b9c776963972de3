"""The integer half of an XLA attention call: which rows, pages and positions are worked on together.

Everything here depends on the batch only, never on a layer: in a step that unrolls its layers XLA computes it once.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

I32 = jnp.int32


class Batch(NamedTuple):
    """The ragged batch in the order that it is worked on: sequences that start with the same pages are neighbours.

    By sequence [S]: `first_row`, `q_lens`, `shared` (leading pages read together with the group), `leader` (first member
    of the group, itself if alone) and `table` [S, P]. By row [T]: `positions`, -1 for padding. `source` [T]: the caller's
    row of each row; `place` [T]: the row of each of the caller's rows (both None: same order).
    """

    first_row: jax.Array
    q_lens: jax.Array
    shared: jax.Array
    leader: jax.Array
    table: jax.Array
    positions: jax.Array
    source: jax.Array | None
    place: jax.Array | None


class Runs(NamedTuple):
    """By sequence [S]: `rows` consecutive rows from `first_row` that attend to its keys low <= key < stop, as far as
    position and window allow."""

    first_row: jax.Array
    rows: jax.Array
    low: jax.Array
    stop: jax.Array


class Tiles(NamedTuple):
    """Tiles of rows that read the same keys; entries from `total` on are meaningless.

    By tile [I]: first `row`, how many `rows`, the `seq` whose table is read, `start` <= key < `stop` the keys that are there
    to be read (at least one).
    """

    total: jax.Array
    row: jax.Array
    rows: jax.Array
    seq: jax.Array
    start: jax.Array
    stop: jax.Array


class Splits(NamedTuple):
    """What tiles read, cut into runs of blocks of pages, the longest first; entries from `total` on have no keys (`stop` is 0).

    By split [I]: `row` of its tile, `key` position of its first key, `start` and `stop` of its tile, `blocks` in it, its
    `pages` [I, n].
    """

    total: jax.Array
    row: jax.Array
    key: jax.Array
    start: jax.Array
    stop: jax.Array
    blocks: jax.Array
    pages: jax.Array


def plain_batch(page_table: jax.Array, kv_lens: jax.Array, cu_q_lens: jax.Array, tokens: int) -> Batch:
    """The batch as it came, nothing shared."""
    q_lens = cu_q_lens[1:] - cu_q_lens[:-1]
    index = jnp.arange(q_lens.shape[0], dtype=I32)
    _, positions = _rows(kv_lens, cu_q_lens, tokens)
    return Batch(cu_q_lens[:-1], q_lens, jnp.zeros_like(index), index, page_table, positions, None, None)


def grouped_batch(
    page_table: jax.Array, kv_lens: jax.Array, cu_q_lens: jax.Array, tokens: int, page_size: int, min_pages: int,
    min_members: int,
) -> Batch:
    """The batch with its decodes (q_len 1) grouped where at least that many share at least that many pages.

    Sequences are tried as a group if they agree on page number `min_pages` - 1; shared are the leading pages on which all
    members agree and which are full in each.
    """
    seqs, pages = page_table.shape
    index = jnp.arange(seqs, dtype=I32)
    q_lens = cu_q_lens[1:] - cu_q_lens[:-1]
    full = jnp.where(q_lens == 1, kv_lens, 0) // page_size
    candidate = full >= min_pages
    key = page_table[:, min_pages - 1]
    same = (key[:, None] == key[None, :]) & candidate[:, None] & candidate[None, :]
    leader = jnp.where(candidate, jnp.argmax(same, axis=1).astype(I32), index)
    differs = jnp.where(page_table == page_table[leader], pages, jnp.arange(pages, dtype=I32)[None, :])
    agree = jnp.minimum(differs.min(axis=1), full)
    leader = jnp.where(agree >= min_pages, leader, index)
    member = leader[:, None] == leader[None, :]
    shared = jnp.where(member, agree[None, :], pages).min(axis=1)
    big = jnp.sum(member.astype(I32), axis=1) >= min_members
    shared, leader = jnp.where(big, shared, 0), jnp.where(big, leader, index)

    before = (leader[None, :] < leader[:, None]) | ((leader[None, :] == leader[:, None]) & (index[None, :] < index[:, None]))
    rank = jnp.sum(before.astype(I32), axis=1)  # sequence -> new place
    order = jnp.argmax(rank[None, :] == index[:, None], axis=1).astype(I32)  # new place -> sequence
    cu_new = cumulative(q_lens[order])
    new_seq, positions = _rows(kv_lens[order], cu_new, tokens)
    old_seq, _ = _rows(kv_lens, cu_q_lens, tokens)
    rows = jnp.arange(tokens, dtype=I32)
    real = rows < cu_q_lens[-1]
    source = jnp.where(real, cu_q_lens[order[new_seq]] + rows - cu_new[new_seq], rows)
    place = jnp.where(real, cu_new[rank[old_seq]] + rows - cu_q_lens[old_seq], rows)
    return Batch(cu_new[:-1], q_lens[order], shared[order], rank[leader[order]], page_table[order], positions, source, place)


def tile_list(runs: Runs, batch: Batch, *, tile: int, most: int, window: int | None) -> Tiles:
    """Runs cut into tiles of at most `tile` rows; `most` is how many there can be."""
    tiles = cumulative((runs.rows + tile - 1) // tile)
    number = jnp.arange(most, dtype=I32)
    run = _owner(tiles, number)
    row = jnp.clip(runs.first_row[run] + (number - tiles[run]) * tile, 0, batch.positions.shape[0] - 1)
    rows = jnp.clip(runs.first_row[run] + runs.rows[run] - row, 1, tile)
    start = runs.low[run]
    if window is not None:
        start = jnp.maximum(start, batch.positions[row] - window + 1)
    stop = jnp.minimum(runs.stop[run], batch.positions[row + rows - 1] + 1)
    return Tiles(tiles[-1], row, rows, run, start, stop)


def split_list(
    tiles: Tiles, table: jax.Array, *, at_once: int, most_blocks: int, block_pages: int, page_size: int, num_pages: int
) -> Splits:
    """What each tile reads, cut into splits of at most `most_blocks` blocks of `block_pages` pages, and into smaller ones
    where there would be fewer than twice as many splits as are worked on `at_once`."""
    count, pages = tiles.row.shape[0], table.shape[1]
    first, last = tiles.start // page_size, (tiles.stop - 1) // page_size
    real = (tiles.stop > tiles.start) & (jnp.arange(count, dtype=I32) < tiles.total)
    blocks = jnp.where(real, (last - first) // block_pages + 1, 0)
    longest = jnp.clip(jnp.sum(blocks) // (2 * at_once), 1, most_blocks)
    sizes = longest - jnp.arange(most_blocks, dtype=I32)
    rest = ((blocks % longest)[None, :] == sizes[:, None]) & (sizes > 0)[:, None]
    ends = cumulative(rest.astype(I32).at[0].set(blocks // longest).reshape(-1))  # by size, then by tile
    number = jnp.arange(count * (-(-pages // (block_pages * most_blocks)) + 1) + 4 * at_once, dtype=I32)
    owner = _owner(ends, number)
    size, tile = sizes[owner // count], owner % count
    before = jnp.where(size == longest, number - ends[owner], blocks[tile] // longest) * longest
    page = first[tile] + before * block_pages
    index = jnp.minimum(page[:, None] + jnp.arange(most_blocks * block_pages, dtype=I32)[None, :], last[tile][:, None])
    taken = table[tiles.seq[tile][:, None], jnp.clip(index, 0, pages - 1)]
    stop = jnp.where(number < ends[-1], tiles.stop[tile], 0)
    return Splits(ends[-1], tiles.row[tile], page * page_size, tiles.start[tile], stop, size, jnp.clip(taken, 0, num_pages - 1))


def cumulative(counts: jax.Array) -> jax.Array:
    """[n] -> [n + 1] int32: 0 and the running sums."""
    return jnp.concatenate([jnp.zeros(1, I32), jnp.cumsum(counts, dtype=I32)])


def _owner(cumulated: jax.Array, number: jax.Array) -> jax.Array:
    """Which of n owners has each number, given their `cumulative` counts [n + 1]; n - 1 past the end."""
    at = jnp.searchsorted(cumulated, number, side="right", method="compare_all").astype(I32) - 1
    return jnp.clip(at, 0, cumulated.shape[0] - 2)


def _rows(kv_lens: jax.Array, cu_q_lens: jax.Array, tokens: int) -> tuple[jax.Array, jax.Array]:
    """Sequence (the last one for padding) and position (-1 for padding) of every row, both [T]."""
    rows = jnp.arange(tokens, dtype=I32)
    seq = _owner(cu_q_lens, rows)
    return seq, jnp.where(rows < cu_q_lens[-1], kv_lens[seq] - cu_q_lens[seq + 1] + rows, -1)
