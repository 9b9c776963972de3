"""What a decode kernel and its companions are compiled for, and how their registers and shared memory are laid out."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .plan import PlanSpec

EMPTY = -1e30  # stands for minus infinity where a difference is taken
LOG2E = math.log2(math.e)


class DecodeShape(NamedTuple):
    """What a compiled decode kernel depends on."""

    spec: PlanSpec
    kv_heads: int
    head_dim: int
    page_size: int
    block_keys: int
    stages: int
    most_width: int
    scale: float
    window: int | None
    soft_cap: float | None
    dtype: str  # of the queries
    kv_dtype: str  # of the pool
    interpret: Any = False  # InterpretGPUParams: run on CPU

    def place(self, x: jax.Array, layout: Any = None) -> jax.Array:
        """x in the registers of the warpgroup, by default as a wgmma leaves its result. The interpreter knows no layouts."""
        from jax.experimental.pallas import mosaic_gpu as plgpu

        return x if self.interpret else plgpu.layout_cast(x, plgpu.Layout.WGMMA if layout is None else layout)

    def iota(self, shape: tuple[int, ...], axis: int, layout: Any = None) -> jax.Array:
        """int32 `shape`, its index along `axis`, placed."""
        return self.place(jax.lax.broadcasted_iota(jnp.int32, shape, axis), layout)

    @property
    def quantised(self) -> bool:
        return self.kv_dtype != self.dtype

    @property
    def scaled_values(self) -> bool:
        """Whether values are scaled as they are widened, not the weights, which as float16 would underflow."""
        return self.quantised and self.dtype == "float16"

    @property
    def columns(self) -> int:
        """Elements of a row in one swizzled tile of shared memory."""
        return next(n for n in (64, 32, 16) if self.head_dim % n == 0)

    @property
    def kv_columns(self) -> int:
        """The same of a tile as it lies in the pool; quantised rows of 80 bytes are not tiled, as no swizzle divides them."""
        return next(n for n in (128, 64, 32, 80) if self.width % n == 0) if self.quantised else self.columns

    @property
    def width(self) -> int:
        """Output columns of one thread block. Several share a head of 256: the registers of one would not do."""
        return min(self.head_dim, self.most_width)

    @property
    def slices(self) -> int:
        """Thread blocks that share a head."""
        return self.head_dim // self.width

    @property
    def store_width(self) -> int:
        """Output columns that leave through shared memory together."""
        return next(n for n in (64, 48, 40, 32) if self.width % n == 0)


def tanh(x: jax.Array, factor: float) -> jax.Array:
    """tanh(factor * x) by exp2, as the hardware's own errs by 5e-4."""
    return 1.0 - 2.0 / (1.0 + jnp.exp2(x * (2 * LOG2E * factor)))


def tiled(columns: int, dtype: Any) -> tuple[Any, ...]:
    """The transforms of shared memory that wgmma and TMA agree on, tiles being `columns` wide; none where no swizzle is as
    narrow."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    size = columns * jnp.dtype(dtype).itemsize
    return () if size % 32 else (plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(size))
