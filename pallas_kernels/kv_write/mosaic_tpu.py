"""`kv_write` for TPU: only the tiles that receive rows are read, changed and written back, in place.

HBM is addressed in tiles of several sublanes, so a row cannot be copied to its slot by itself. Rows are sorted by slot (once
per step, whatever the number of layers), which brings those of a tile together: a tile is then read once and written once,
and no two of the copies under way touch the same tile.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ..layout import Pool, PoolDims, QuantPool, pair, pool_dims
from ..quant import quantize_rows

I32 = jnp.int32
SLOTS = 8  # tiles in VMEM, half of them on their way in
TILE_ROWS = {1: 32, 2: 8, 4: 8}  # sublanes of a tile, by bytes per element
MAX_TILE_BYTES = 1 << 20


class Edits(NamedTuple):
    """Which rows go to which tile, int32. `total` [1] tiles; by tile [T]: its number `tile` and its first row `first` [T + 1]
    in sorted order; by sorted row [T]: `source`, the caller's row, and `offset` in the tile."""

    total: jax.Array
    tile: jax.Array
    first: jax.Array
    source: jax.Array
    offset: jax.Array


def kv_write(pool: Pool, k: jax.Array, v: jax.Array, slots: jax.Array, *, layout: str) -> Pool:
    """See `api.kv_write`. NotImplementedError: what `_check` refuses."""
    dims = pool_dims(pool, layout)
    values = pool.values if isinstance(pool, QuantPool) else pool
    _check(values, dims, layout)
    unit = TILE_ROWS[values.dtype.itemsize]
    unit = unit if dims.page_size % unit == 0 else 16
    context = dims.num_pages * dims.page_size
    rows = jnp.concatenate([k, v], axis=1)  # [T, 2 * Hkv, D]
    if isinstance(pool, QuantPool):
        rows, scales = quantize_rows(rows, values.dtype)
    rows = pair(rows) if layout == "paired" else rows
    values = _edit_values(values, rows.astype(values.dtype), _edits(slots, unit, context), unit)
    if not isinstance(pool, QuantPool):
        return values
    return QuantPool(values, _edit_scales(pool.scales, scales, _edits(slots, dims.page_size, context)))


def _check(values: jax.Array, dims: PoolDims, layout: str) -> None:
    if layout == "token_major":
        raise NotImplementedError(f"the TPU kernel writes head_major and paired pools, got {layout}")
    if values.dtype.name not in ("float32", "bfloat16", "int8", "float8_e4m3fn"):
        raise NotImplementedError(f"the TPU kernel writes no {values.dtype.name} pools")
    if dims.page_size % 16:
        raise NotImplementedError(f"page size must be a multiple of 16, got {dims.page_size}")
    _, parts, _, _, width = values.shape
    tile = parts * dims.kv_heads * TILE_ROWS[values.dtype.itemsize] * max(128, width) * values.dtype.itemsize
    if tile > MAX_TILE_BYTES:
        raise NotImplementedError(f"tiles of all heads of {dims} take {tile} bytes, more than {MAX_TILE_BYTES}")


def _edits(slots: jax.Array, unit: int, context: int) -> Edits:
    """Of slots [T] in tiles of `unit` slots."""
    rows = slots.shape[0]
    slots = jnp.where((slots >= 0) & (slots < context), slots, context)
    source = jnp.argsort(slots).astype(I32)
    ordered = slots[source]
    tile = ordered // unit
    real = ordered < context
    new = real & jnp.concatenate([jnp.ones(1, bool), tile[1:] != tile[:-1]])
    number = jnp.cumsum(new, dtype=I32)  # tiles up to and with each row
    edge = jnp.arange(1, rows + 2, dtype=I32)
    first = jnp.minimum(jnp.searchsorted(number, edge).astype(I32), jnp.sum(real, dtype=I32))
    return Edits(number[-1:], tile[jnp.minimum(first[:-1], rows - 1)], first, source, ordered % unit)


def _edit_values(pool: jax.Array, rows: jax.Array, edits: Edits, unit: int) -> jax.Array:
    """pool [N, 2, Hkv, ps, D] with rows [T, 2 * Hkv, D] of its dtype written, or with 1 and 2 * D for 2 and D."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    _, parts, kv_heads, page_size, width = pool.shape
    per_page = page_size // unit

    def tile_of(ref, tile):
        start = pl.multiple_of(lax.rem(tile, I32(per_page)) * unit, unit)
        return ref.at[lax.div(tile, I32(per_page)), :, :, pl.ds(start, unit)]

    def insert(tile, rows, count, offset, wide):
        """Rows are inserted one sublane at a time, which Mosaic does in float32 only; every value survives that."""
        wide[...] = tile[...].astype(jnp.float32)

        def one(j, carry):
            row = rows[j].astype(jnp.float32)
            for head in range(parts * kv_heads):
                wide[head // kv_heads, head % kv_heads, pl.ds(offset(j), 1), :] = row[head : head + 1]
            return carry

        lax.fori_loop(0, count, one, I32(0))
        tile[...] = wide[...].astype(tile.dtype)

    shape = (parts, kv_heads, unit, width)
    return _edit(pool, rows, edits, tile_of, insert, shape, unit, pltpu.VMEM(shape, jnp.float32), "kv_write")


def _edit_scales(pool: jax.Array, scales: jax.Array, edits: Edits) -> jax.Array:
    """pool [N, 2, Hkv, ps] float32 with scales [T, 2 * Hkv] written; a tile is a page."""
    from jax.experimental.pallas import tpu as pltpu

    shape = pool.shape[1:]
    rows = jnp.broadcast_to(scales.reshape(-1, *shape[:2], 1), (scales.shape[0], *shape))

    def insert(tile, rows, count, offset, wide):
        del wide
        lane = lax.broadcasted_iota(I32, shape, 2)

        def one(j, carry):
            tile[...] = jnp.where(lane == offset(j), rows[j], tile[...])
            return carry

        lax.fori_loop(0, count, one, I32(0))

    return _edit(pool, rows, edits, lambda ref, tile: ref.at[tile], insert, shape, shape[2],
                 pltpu.VMEM((8, 128), jnp.float32), "kv_write_scales")


def _edit(
    pool: jax.Array, rows: jax.Array, edits: Edits, tile_of: Callable[..., Any], insert: Callable[..., None],
    tile_shape: tuple[int, ...], unit: int, wide: Any, name: str,
) -> jax.Array:
    """Run the edits on `pool`, in place. tile_of(ref, tile): that tile of a pool; insert(tile, rows, count, offset, wide):
    put rows[j] at offset(j) for j < count; tile_shape: of a tile, which takes up to `unit` rows; wide: scratch."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    def program(total, tile, first, source, offset, rows_hbm, pool_in, pool_out, tiles, taken, wide, sem):
        del pool_in  # the same memory as pool_out
        items = total[0]

        def slot_of(item):
            return lax.rem(item, I32(SLOTS))

        def copy_in(item):
            return pltpu.make_async_copy(tile_of(pool_out, tile[item]), tiles.at[slot_of(item)], sem.at[slot_of(item), 0])

        def copy_out(item):
            return pltpu.make_async_copy(tiles.at[slot_of(item)], tile_of(pool_out, tile[item]), sem.at[slot_of(item), 1])

        def each_row(item, act):
            def one(row, carry):
                to = taken.at[slot_of(item), row - first[item]]
                act(pltpu.make_async_copy(rows_hbm.at[source[row]], to, sem.at[slot_of(item), 2]))
                return carry

            lax.fori_loop(first[item], first[item + 1], one, I32(0))

        def fetch(item):
            @pl.when(item < items)
            def _():
                @pl.when(item >= SLOTS)
                def _():
                    copy_out(item - SLOTS).wait()

                copy_in(item).start()
                each_row(item, lambda copy: copy.start())

        def do_item(item, carry):
            fetch(item + SLOTS // 2)
            copy_in(item).wait()
            each_row(item, lambda copy: copy.wait())
            insert(tiles.at[slot_of(item)], taken.at[slot_of(item)], first[item + 1] - first[item],
                   lambda j: offset[first[item] + j], wide)
            copy_out(item).start()
            return carry

        for item in range(SLOTS // 2):
            fetch(I32(item))
        lax.fori_loop(0, items, do_item, I32(0))
        lax.fori_loop(jnp.maximum(items - SLOTS, 0), items, lambda item, carry: (copy_out(item).wait(), carry)[1], I32(0))

    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    scratch = [pltpu.VMEM((SLOTS, *tile_shape), pool.dtype), pltpu.VMEM((SLOTS, unit, *rows.shape[1:]), rows.dtype), wide,
               pltpu.SemaphoreType.DMA((SLOTS, 3))]
    return pl.pallas_call(
        program, out_shape=jax.ShapeDtypeStruct(pool.shape, pool.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(num_scalar_prefetch=len(edits), grid=(1,), in_specs=[anywhere, anywhere],
                                               out_specs=anywhere, scratch_shapes=scratch),
        input_output_aliases={len(edits) + 1: 0}, name=name,
    )(*edits, rows, pool)
