"""Merges the partial results of each sequence's items by their log-sum-exp, in the order of the plan: no atomics, so the
same inputs give the same bits.

One small thread block per sequence, KV head and slice of columns walks over the sequence's items and those of the prefix it
shares, with a ring of copies in flight. Registers are laid out for few rows: each warp holds whole rows of every eight.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .plan import ROW_ALIGN, TILE_ROWS
from .shape import EMPTY, LOG2E, DecodeShape


class _Blocks(NamedTuple):
    """rows, columns: of the outputs that a block merges; stages: items in flight."""

    rows: int
    columns: int
    stages: int

    @property
    def chunks(self) -> int:
        return self.rows // ROW_ALIGN

    def layout(self) -> Any:
        """Warp w has rows 2w and 2w + 1 of every eight; a warp's load covers 32 columns of one, or 16 of both."""
        from jax.experimental.pallas import mosaic_gpu as plgpu

        lanes = math.gcd(self.columns, 32)
        tiling = plgpu.Tiling(((ROW_ALIGN, lanes), (2, lanes), (1,)))
        lane_dims = (-2,) if lanes == 32 else (-3, -2)
        return plgpu.Layout.TILED(tiling, warp_dims=(-5,), lane_dims=lane_dims, vector_dim=-1)


class _Tile(NamedTuple):
    """Scalars: see `Plan.tiles`."""

    row: jax.Array
    chunks: jax.Array
    begin: jax.Array
    own: jax.Array
    shared_begin: jax.Array
    shared: jax.Array
    place: jax.Array


def merge_partials(
    shape: DecodeShape, items: jax.Array, tiles: jax.Array, partials: jax.Array, partial_lse: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Outputs float32 [Hkv, R, D] in the row space and log2-sum-exp float32 [Hkv, S * 64] by sequence and row of its tile.

    partials, partial_lse: of `decode_partials`. Only rows of sequences that have rows are defined.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    spec = shape.spec
    blocks = _Blocks(spec.own_rows, shape.width, 4 if spec.own_rows <= 16 else 2)
    return plgpu.kernel(
        lambda *refs, **scratch: _merge(shape, blocks, *refs, **scratch),
        out_type=(jax.ShapeDtypeStruct((shape.kv_heads, spec.rows, shape.head_dim), jnp.float32),
                  jax.ShapeDtypeStruct((shape.kv_heads, spec.seqs * TILE_ROWS), jnp.float32)),
        grid=(shape.kv_heads, spec.seqs, shape.head_dim // blocks.columns),
        grid_names=("head", "seq", "slice"),
        scratch_types=dict(
            o_smem=plgpu.SMEM((blocks.stages, blocks.rows, blocks.columns), jnp.float32),
            lse_smem=plgpu.SMEM((blocks.stages, TILE_ROWS), jnp.float32),
            o_ready=plgpu.Barrier(num_barriers=blocks.stages * blocks.chunks),
            lse_ready=plgpu.Barrier(num_barriers=blocks.stages),
        ),
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=shape.interpret,
    )(items, tiles, partials, partial_lse)


def _merge(
    shape: DecodeShape, blocks: _Blocks, items, tiles, partials, partial_lse, out, lse, *, o_smem, lse_smem, o_ready, lse_ready
) -> None:
    """One thread block."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    head, seq, part = jax.lax.axis_index("head"), jax.lax.axis_index("seq"), jax.lax.axis_index("slice")
    row, chunks, begin, end, shared_begin, shared_end, place = (tiles[seq, f] for f in range(7))
    tile = _Tile(row, chunks, begin, end - begin, shared_begin, shared_end - shared_begin, place)
    columns = pl.ds(part * blocks.columns, blocks.columns)
    count = tile.own + tile.shared

    def each_chunk(do) -> None:
        for chunk in range(blocks.chunks):
            pl.when(chunk < tile.chunks)(partial(do, chunk, pl.ds(chunk * ROW_ALIGN, ROW_ALIGN)))

    def fetch(number) -> None:
        stage, own = jax.lax.rem(number, np.int32(blocks.stages)), number < tile.own
        item = jnp.where(own, tile.begin + number, tile.shared_begin + number - tile.own)
        place = jnp.where(own, 0, tile.place)
        first = items[item, 7] + place
        each_chunk(lambda chunk, rows: plgpu.copy_gmem_to_smem(
            partials.at[head, pl.ds(first + chunk * ROW_ALIGN, ROW_ALIGN), columns], o_smem.at[stage, rows],
            o_ready.at[stage * blocks.chunks + chunk]))
        plgpu.copy_gmem_to_smem(partial_lse.at[head, pl.ds(item * TILE_ROWS + place, TILE_ROWS)], lse_smem.at[stage],
                                lse_ready.at[stage])

    layout = blocks.layout()
    row_layout, rows = layout.reduce(1), pl.ds(0, blocks.rows)
    state = lambda value: shape.place(jnp.full((blocks.rows,), value, jnp.float32), row_layout)  # noqa: E731

    def spread(x: jax.Array) -> jax.Array:
        return shape.place(jax.lax.broadcast_in_dim(x, (blocks.rows, blocks.columns), [0]), layout)

    def step(number, carry):
        acc, top, total = carry
        stage = jax.lax.rem(number, np.int32(blocks.stages))
        plgpu.barrier_wait(lse_ready.at[stage])
        each_chunk(lambda chunk, rows: plgpu.barrier_wait(o_ready.at[stage * blocks.chunks + chunk]))
        new_lse, new = shape.place(lse_smem[stage, rows], row_layout), shape.place(o_smem[stage], layout)
        plgpu.commit_smem()  # all warps have read the stage before it is written again
        pl.when(number + blocks.stages < count)(lambda: fetch(number + blocks.stages))
        new_top = jnp.maximum(top, new_lse)
        shrink, weight = jnp.exp2(top - new_top), jnp.exp2(new_lse - new_top)
        return acc * spread(shrink) + new * spread(weight), new_top, total * shrink + weight

    @pl.when(tile.chunks > 0)
    def _():
        for number in range(blocks.stages):
            pl.when(number < count)(partial(fetch, np.int32(number)))
        zero = shape.place(jnp.zeros((blocks.rows, blocks.columns), jnp.float32), layout)
        acc, top, total = jax.lax.fori_loop(np.int32(0), count, step, (zero, state(EMPTY), state(0.0)))
        safe = jnp.where(total == 0, 1.0, total)
        o_smem[0] = acc / spread(safe)
        lse_smem[0, rows] = top + jnp.log(safe) * LOG2E
        plgpu.commit_smem()
        each_chunk(lambda chunk, rows: plgpu.copy_smem_to_gmem(
            o_smem.at[0, rows], out.at[head, pl.ds(tile.row + chunk * ROW_ALIGN, ROW_ALIGN), columns]))
        pl.when(part == 0)(lambda: plgpu.copy_smem_to_gmem(lse_smem.at[0], lse.at[head, pl.ds(seq * TILE_ROWS, TILE_ROWS)]))
        plgpu.wait_smem_to_gmem(0)
