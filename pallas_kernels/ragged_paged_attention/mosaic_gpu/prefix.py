"""Which decodes of a batch start with the same pages (cascade attention): they read those together, once."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

MIN_SHARED_KEYS = 128  # fewer are not worth a tile
FAR = 2**30


class Shared(NamedTuple):
    """Prefixes: keys [S] that a shared tile reads for a sequence; tile [S] and place [S] in it; by shared tile its
    `members`, `start` in `tokens_of` (tokens of all members, by tile) and `reader`, the sequence whose table it uses."""

    keys: np.ndarray
    tile: np.ndarray
    place: np.ndarray
    members: np.ndarray
    start: np.ndarray
    reader: np.ndarray
    tile_keys: np.ndarray
    tokens_of: np.ndarray


def find_shared(
    q_lens: np.ndarray, kv_lens: np.ndarray, page_table: np.ndarray, page_size: int, tile_tokens: int, tiles: int
) -> Shared | None:
    """Decodes (q_len 1) grouped by their leading full pages; None if no two share enough to be worth a tile.

    Tables are compared with their neighbours in the order of their first pages, so the cost is a sort of S numbers and one
    comparison of S tables. A group is a run of neighbours that agree on at least `MIN_SHARED_KEYS`; it shares what all agree
    on. tile_tokens, tiles: most members of a tile, and tiles to fill (`PlanSpec`).
    """
    least = max(1, MIN_SHARED_KEYS // page_size)
    full = np.where(q_lens == 1, (kv_lens - 1) // page_size, 0)
    candidate = np.flatnonzero(full >= least)
    if candidate.size < 2 or page_table.shape[1] < least:
        return None
    order = candidate[np.argsort(page_table[candidate, least - 1], kind="stable")]
    depth = int(full[order].max())
    table = page_table[order, :depth]
    differs = table[1:] != table[:-1]
    agree = np.where(differs.any(axis=1), differs.argmax(axis=1), depth)
    agree = np.minimum(agree, np.minimum(full[order[1:]], full[order[:-1]]))
    joined = agree >= least
    if not joined.any():
        return None
    return _shared_tiles(q_lens, order, joined, agree, page_size, tile_tokens, tiles)


def _shared_tiles(
    q_lens: np.ndarray, order: np.ndarray, joined: np.ndarray, agree: np.ndarray, page_size: int, tile_tokens: int, tiles: int
) -> Shared:
    """Runs of `order` whose neighbours are joined, cut into tiles of at most `tile_tokens` members."""
    seqs = len(q_lens)
    start = np.flatnonzero(np.concatenate([[True], ~joined]))
    sizes = np.diff(np.append(start, len(order)))
    depth = np.minimum.reduceat(np.append(np.where(joined, agree, FAR), FAR), start)  # of a run
    place = np.arange(len(order)) - np.repeat(start, sizes)
    part, place = np.divmod(place, tile_tokens)
    tile_of = np.cumsum(place == 0) - 1  # all runs, then only those worth it
    members = np.bincount(tile_of)
    keep = members > 1
    number = np.cumsum(keep) - 1
    kept = keep[tile_of]
    run_of = np.repeat(np.arange(len(start)), sizes)
    keys, tile, where = (np.zeros(seqs, np.int32) for _ in range(3))
    chosen = order[kept]
    keys[chosen] = depth[run_of[kept]] * page_size
    tile[chosen] = seqs + number[tile_of[kept]]
    where[chosen] = place[kept]
    first = np.flatnonzero(place == 0)[keep]
    counts = members[keep]
    cu = np.cumsum(q_lens) - q_lens
    tokens_of = np.zeros(seqs, np.int32)
    tokens_of[: len(chosen)] = cu[chosen]
    by_tile = np.zeros((4, tiles), np.int32)
    by_tile[:, : len(counts)] = counts, np.cumsum(counts) - counts, order[first], depth[run_of[first]] * page_size
    return Shared._make([keys, tile, where, *by_tile, tokens_of])
