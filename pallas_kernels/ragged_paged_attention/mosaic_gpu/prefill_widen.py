"""The widener of the prefill kernel: quantised keys and values in the dtype of the queries; see `prefill_kernel`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from ...lazy import LazyModule
from .prefill_shape import I32, TILE, Job, PrefillShape, Ring

plgpu = LazyModule("jax.experimental.pallas.mosaic_gpu")


def widen(
    shape: PrefillShape, job: Job, done: jax.Array, raw: tuple[Ring, Ring, Ring], wide: tuple[Ring, Ring], scales
) -> jax.Array:
    """Write the blocks of a job from the `raw` rings (the last one of scales) into the `wide` ones. done: blocks before;
    returns those after. scales: [2, keys] of shared memory."""

    def block(i: jax.Array, _: None) -> None:
        count, start = done + i - job.begin, i * shape.blocks.keys
        slot = lax.rem(count, shape.blocks.stages)
        *narrow, pieces = raw
        plgpu.barrier_wait(pieces.ready.at[slot])
        _join(shape, pieces.stages.at[slot], scales)
        plgpu.barrier_arrive(pieces.free.at[slot])
        for number, (source, target) in enumerate(zip(narrow, wide, strict=True)):
            @pl.when(count >= shape.blocks.stages)
            def _(target=target):
                plgpu.barrier_wait(target.free.at[slot])

            plgpu.barrier_wait(source.ready.at[slot])
            _write(shape, source.stages.at[slot], scales.at[number], target.stages.at[slot], job.first - start,
                   job.kv_len - start)
            plgpu.commit_smem()
            plgpu.barrier_arrive(source.free.at[slot])
            plgpu.barrier_arrive(target.ready.at[slot])

    lax.fori_loop(job.begin, job.end, block, None)
    return done + job.end - job.begin


def _join(shape: PrefillShape, pieces, scales) -> None:
    """Scales of a block [copies, 2, span] as [2, keys]."""
    for copy in range(shape.copies):
        for number in range(2):
            piece = pieces[copy, number]
            piece = piece if shape.interpret else plgpu.layout_cast(piece, plgpu.Layout.WGMMA.reduce(0))
            scales[number, pl.ds(copy * shape.span, shape.span)] = piece
    plgpu.commit_smem()


def _write(shape: PrefillShape, source, scales, target, first: jax.Array, stop: jax.Array) -> None:
    """One block, values times scales; zeros in the rows outside first <= row < stop, whose scales may be NaN."""
    for row in range(0, shape.blocks.keys, TILE):
        rows = pl.ds(row, TILE)
        factor = scales[rows]
        for column in range(0, shape.head_dim, shape.columns):
            size = (TILE, shape.columns)
            values = source[rows, pl.ds(column, shape.columns)]
            if values.dtype == jnp.float8_e4m3fn:
                values = values.astype(jnp.float16)  # all that the hardware turns float8 into
            index = row + lax.broadcasted_iota(I32, size, 0)
            scaled = values.astype(jnp.float32) * lax.broadcast_in_dim(factor, size, [0])
            kept = jnp.where((index >= first) & (index < stop), scaled, 0.0)
            target[rows, pl.ds(column, shape.columns)] = kept.astype(target.dtype)
