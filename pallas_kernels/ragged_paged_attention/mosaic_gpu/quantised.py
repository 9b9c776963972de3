"""Quantised keys and values in shared memory, for the kernels of decodes and of mass; the prefill kernel has its widener.

TMA aligns to 128 bytes, and the scales of 16 tokens are 64. So those of the keys and of the values of a page, which lie as
far apart as its heads are wide, come in one copy, and a block's scales are pieces [units, 2, unit keys].
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from ...lazy import LazyModule
from .shape import DecodeShape

plgpu = LazyModule("jax.experimental.pallas.mosaic_gpu")


def widen(shape: DecodeShape, source, target, change: Callable[[jax.Array], jax.Array]) -> None:
    """Write `source` [keys, columns] to `target` in the dtype of the queries, exactly, and `change`d, some columns at a time.
    The hardware turns float8 into float16 only."""
    for begin in range(0, source.shape[1], shape.kv_columns):
        narrow = shape.place(source[:, pl.ds(begin, shape.kv_columns)])
        for at in range(0, shape.kv_columns, shape.columns):
            values = narrow[:, at : at + shape.columns]
            if values.dtype == jnp.float8_e4m3fn and shape.dtype != "float16":
                values = values.astype(jnp.float16).astype(jnp.float32)
            target[:, pl.ds(begin + at, shape.columns)] = change(values.astype(shape.dtype))


def scales_of(shape: DecodeShape, pieces) -> jax.Array:
    """Scales [units, unit keys] of a block as [block keys], laid out as columns of a wgmma result."""
    pieces = pieces if pieces.shape[0] > 1 else pieces.at[0]
    return shape.place(pieces[...], plgpu.Layout.WGMMA.reduce(0)).reshape(shape.block_keys)
