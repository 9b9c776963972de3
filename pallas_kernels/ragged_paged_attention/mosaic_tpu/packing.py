"""Where queries lie for the TPU kernels, and the lists of tiles that the kernels work through.

Queries are *packed*: [Hkv, R * G, D], the G query heads of a KV head next to their row, so that a tile of rows is one matrix
per KV head. Every sequence starts at a packed row that a DMA may start from (Mosaic moves whole sublane tiles). Depends on
the batch only, never on a layer: in a step that unrolls its layers XLA computes it once.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ..geometry import I32, cumulative


class Packing(NamedTuple):
    """By sequence [S]: `q_lens` and `first_row`, its first packed row. `place` [T]: the packed row of each of the caller's
    rows; `real` [T]: rows of a sequence; `source` [R]: the caller's row of each packed row, anything for padding."""

    q_lens: jax.Array
    first_row: jax.Array
    place: jax.Array
    real: jax.Array
    source: jax.Array


class Tiles(NamedTuple):
    """A work list; entries from `total` [1] on are meaningless. A tile is up to `height` rows of one sequence.

    By tile [I], int32: `seq`; `row`, its first packed row; `rows`; `position` of its first row; `start` <= key < `stop`, the
    keys that any of its rows sees.
    """

    total: jax.Array
    seq: jax.Array
    row: jax.Array
    rows: jax.Array
    position: jax.Array
    start: jax.Array
    stop: jax.Array


def pack(cu_q_lens: jax.Array, tokens: int, align: int, spare: int) -> Packing:
    """Packing of a batch; sequences start at multiples of `align` rows, and `spare` rows follow the last."""
    seqs = cu_q_lens.shape[0] - 1
    q_lens = cu_q_lens[1:] - cu_q_lens[:-1]
    starts = cumulative((q_lens + align - 1) // align * align)
    rows = jnp.arange(tokens, dtype=I32)
    owner = _owner(cu_q_lens, rows)
    place = jnp.clip(starts[owner] + rows - cu_q_lens[owner], 0, None)
    packed_rows = -(-(tokens + min(seqs, tokens) * (align - 1)) // align) * align + spare
    packed = jnp.arange(packed_rows, dtype=I32)
    owner = _owner(starts, packed)
    source = jnp.clip(cu_q_lens[owner] + packed - starts[owner], 0, tokens - 1)
    return Packing(q_lens, starts[:-1], jnp.minimum(place, packed_rows - 1), rows < cu_q_lens[-1], source)


def tile_list(
    packing: Packing, kv_lens: jax.Array, chosen: jax.Array, *, height: int, most: int, window: int | None, context: int
) -> Tiles:
    """The rows of the `chosen` [S] sequences in tiles of at most `height`, in packed order; there are at most `most`.

    context: P * ps, keys that a page table can name.
    """
    q_lens = jnp.where(chosen, packing.q_lens, 0)
    tiles = cumulative((q_lens + height - 1) // height)
    number = jnp.arange(most, dtype=I32)
    seq = _owner(tiles, number)
    ahead = (number - tiles[seq]) * height
    rows = jnp.clip(q_lens[seq] - ahead, 1, height)
    position = jnp.clip(kv_lens[seq] - q_lens[seq] + ahead, 0, context - 1)
    start = jnp.zeros_like(position) if window is None else jnp.maximum(position - window + 1, 0)
    stop = jnp.minimum(position + rows, context)
    return Tiles(tiles[-1:], seq, packing.first_row[seq] + ahead, rows, position, start, stop)


def _owner(cumulated: jax.Array, number: jax.Array) -> jax.Array:
    """Which of n owners has each number, given their `cumulative` counts [n + 1]; n - 1 past the end."""
    return jnp.clip(jnp.searchsorted(cumulated, number, side="right").astype(I32) - 1, 0, cumulated.shape[0] - 2)
