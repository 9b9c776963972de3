"""The static facts of a prefill kernel, and what a job is: shared by `prefill_kernel` and `prefill_consumer`."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .prefill_tuning import PrefillBlocks

TILE = 64  # rows of a wgmma
CONSUMERS, PRODUCER, WIDENER = 2, 2, 3  # warpgroups; the last one for quantised KV only
EMPTY = -1e30  # highest score of no scores: finite, so that differences are
LOG2E = math.log2(math.e)
I32 = jnp.int32


class PrefillShape(NamedTuple):
    """All static facts. heads: query heads; pack: of them in a tile; columns: of a swizzled tile in shared memory."""

    heads: int
    kv_heads: int
    head_dim: int
    page_size: int
    pack: int
    columns: int
    scale: float
    window: int | None
    soft_cap: float | None
    blocks: PrefillBlocks
    quantised: bool
    interpret: bool

    @property
    def tokens(self) -> int:
        """Of a tile."""
        return TILE // self.pack

    @property
    def groups(self) -> int:
        """Groups of query heads that share a tile."""
        return self.heads // self.pack

    @property
    def span(self) -> int:
        """Keys of one TMA copy."""
        return min(self.page_size, self.blocks.keys)

    @property
    def copies(self) -> int:
        """That bring a block."""
        return self.blocks.keys // self.span


def registers(head_dim: int, quantised: bool) -> tuple[int, int, int]:
    """Of a thread of a consumer, of the producer and of the widener. Together no more than the kernel is launched with, which
    is 168 for each of three warpgroups and 128 for each of four: else a consumer waits for its share for ever."""
    if quantised:
        return 200, 48, 64
    return (240, 24, 0) if head_dim > 128 else (232, 40, 0)  # by what spills least


class Ring(NamedTuple):
    """Stages of keys or values in shared memory [stages, keys, D], or of the scales of both [stages, copies, 2, span], and the
    barriers that say that a stage is there and that it is free again."""

    stages: Any
    ready: Any
    free: Any


class Job(NamedTuple):
    """int32 scalars. row: packed; position: of the first query; blocks `begin` <= i < `end` hold keys that it sees."""

    number: jax.Array
    group: jax.Array
    row: jax.Array
    rows: jax.Array
    seq: jax.Array
    position: jax.Array
    first: jax.Array
    kv_len: jax.Array
    begin: jax.Array
    end: jax.Array
