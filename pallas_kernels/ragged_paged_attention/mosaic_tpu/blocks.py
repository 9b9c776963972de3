"""Blocks of KV on their way from HBM to VMEM, two at a time, and what a block's rows are worth once they are there.

A block is `pages` neighbouring pages of one sequence; a page is one DMA, keys and values of all its KV heads together. While
one block is worked on the next one, maybe the next tile's first, is on its way. Rows of a paired pool are multiplied whole:
queries are 0 where values stand, and what comes out where keys stand is not used.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

I32 = jnp.int32
LANES = 128


class BlockShape(NamedTuple):
    """Static: pages per block, table columns P, and dimensions of a page; `width` of a stored row, D or, paired, 2 * D."""

    pages: int
    columns: int
    page_size: int
    kv_heads: int
    width: int

    @property
    def keys(self) -> int:
        return self.pages * self.page_size


class Fetcher(NamedTuple):
    """Moves blocks. `pool` and `scales` (or None) lie in HBM, `table` [S * P] and the tile list in SMEM; `buffer`
    [2, pages, parts, Hkv, ps, width], `scale_buffer` [2, pages, parts, Hkv, ps] (or None) in VMEM; `sem` one per slot. `parts`
    is 2 for keys and values, 1 for keys alone, or for pairs."""

    shape: BlockShape
    table: Any
    seq: Any
    start: Any
    stop: Any
    pool: Any
    scales: Any
    buffer: Any
    scale_buffer: Any
    sem: Any

    def first_page(self, tile: jax.Array) -> jax.Array:
        """Column of the table with the first key of a tile."""
        return lax.div(self.start[tile], I32(self.shape.page_size))

    def pages(self, tile: jax.Array) -> jax.Array:
        """Pages that a tile reads."""
        return lax.div(self.stop[tile] - 1, I32(self.shape.page_size)) - self.first_page(tile) + 1

    def blocks(self, tile: jax.Array) -> jax.Array:
        """Blocks that a tile reads, at least one."""
        return lax.div(self.pages(tile) + (self.shape.pages - 1), I32(self.shape.pages))

    def key(self, tile: jax.Array, block: jax.Array) -> jax.Array:
        """Position of a block's first key."""
        return (self.first_page(tile) + block * self.shape.pages) * self.shape.page_size

    def start_copy(self, tile: jax.Array, block: jax.Array, slot: jax.Array) -> None:
        """Begin to fill a slot."""
        self._each(tile, block, slot, lambda copy: copy.start())

    def wait_copy(self, tile: jax.Array, block: jax.Array, slot: jax.Array) -> None:
        """Until the slot is filled."""
        self._each(tile, block, slot, lambda copy: copy.wait())

    def _each(self, tile, block, slot, act) -> None:
        column = self.seq[tile] * self.shape.columns + self.first_page(tile) + block * self.shape.pages
        count = jnp.minimum(self.pages(tile) - block * self.shape.pages, self.shape.pages)

        def page(j, carry):
            def copy(source, buffer):
                at = (self.table[column + j], pl.ds(0, buffer.shape[2]))
                act(pltpu.make_async_copy(source.at[at], buffer.at[slot, j], self.sem.at[slot]))

            copy(self.pool, self.buffer)
            if self.scales is not None:
                copy(self.scales, self.scale_buffer)
            return carry

        lax.fori_loop(0, count, page, I32(0))

    def _seen(self, tile: jax.Array, block: jax.Array) -> tuple[jax.Array, jax.Array]:
        """[start, stop) of a tile, counted from a block's first key."""
        key = self.key(tile, block)
        return self.start[tile] - key, self.stop[tile] - key

    def clear_unseen_values(self, tile: jax.Array, block: jax.Array, slot: jax.Array) -> None:
        """Zero the values (keys too where paired) that lie outside [start, stop): weight 0 times NaN is NaN."""
        last, keys = self.buffer.shape[2] - 1, self.shape.keys
        low, high = self._seen(tile, block)

        @pl.when((low > 0) | (high < keys))
        def _():
            page = (self.shape.page_size, self.shape.width)

            def clear(j, carry):
                at = lax.broadcasted_iota(I32, page, 0) + j * self.shape.page_size
                seen = (at >= low) & (at < high)
                for head in range(self.shape.kv_heads):
                    values = self.buffer[slot, j, last, head].astype(jnp.float32)
                    self.buffer[slot, j, last, head] = jnp.where(seen, values, 0.0).astype(self.buffer.dtype)
                return carry

            lax.fori_loop(0, self.shape.pages, clear, I32(0))

    def rows(self, slot: jax.Array, which: int, head: int, dtype: jnp.dtype) -> jax.Array:
        """Keys (which = 0) or values (1), or pairs, of a KV head in a slot as [keys, width] in `dtype`, not scaled."""
        part = min(which, self.buffer.shape[2] - 1)
        return self.buffer[slot, :, part, head].reshape(self.shape.keys, self.shape.width).astype(dtype)

    def value_scales(self, tile: jax.Array, block: jax.Array, slot: jax.Array, head: int) -> jax.Array:
        """The `row_scales` of values, 0 outside [start, stop)."""
        low, high = self._seen(tile, block)
        at = lax.broadcasted_iota(I32, (1, self.shape.keys), 1)
        return jnp.where((at >= low) & (at < high), self.row_scales(slot, 1, head), 0.0)

    def row_scales(self, slot: jax.Array, which: int, head: int) -> jax.Array:
        """Their scales as [1, keys] float32; anything outside [start, stop), where nothing may have been written.

        They come as [pages, ps]. Mosaic does not reshape that to lanes, but every page can be repeated along the lanes, by
        doubling, and then be kept where it belongs.
        """
        pages, size, keys = self.shape.pages, self.shape.page_size, self.shape.keys
        wide = self.scale_buffer[slot, :, which, head]
        if size < LANES:
            wide = jnp.concatenate([wide, jnp.zeros((pages, LANES - size), jnp.float32)], axis=1)
            while size < LANES:
                wide, size = wide + pltpu.roll(wide, size, 1), 2 * size
        wide = jnp.concatenate([wide] * -(-keys // size), axis=1)[:, :keys]
        page = lax.div(lax.broadcasted_iota(I32, (pages, keys), 1), I32(self.shape.page_size))
        own = page == lax.broadcasted_iota(I32, (pages, keys), 0)
        return jnp.sum(jnp.where(own, wide, 0.0), axis=0, keepdims=True)
