"""The attention kernel: one program walks over tiles of packed queries and, within a tile, over blocks of its keys.

All copies are manual and double buffered across tiles, so a batch of short decodes keeps the memory busy: while a block is
multiplied, the next block is on its way, and so are the next tile's queries and the previous tile's output. Softmax is
online in float32 VMEM scratch (Milakov and Gimelshein; FlashAttention); tiles start and stop at the blocks that causality
and window leave (paged as in vLLM's PagedAttention). Query heads of a KV head are rows of one matrix product.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .blocks import LANES, BlockShape, Fetcher
from .packing import Tiles

I32 = jnp.int32
EMPTY = -1e30  # a score that no key has
LOG2_E = math.log2(math.e)


class Static(NamedTuple):
    """What is compiled in: matrix rows of a tile (height * group), query rows per packed row, and the call's options."""

    rows: int
    group: int
    block: BlockShape
    scale: float
    window: int | None
    soft_cap: float | None
    product: Any  # dtype of the matrix products

    @property
    def precision(self) -> lax.Precision | None:
        return lax.Precision.HIGHEST if self.product == jnp.float32 else None


class Scratch(NamedTuple):
    """VMEM of one program. By slot: KV blocks, their scales, queries; of the tile: output, lse, and the softmax's weighted
    sum, highest score (in all lanes) and sum (spread over lanes)."""

    kv: Any
    scales: Any
    q: Any
    out: Any
    lse: Any
    acc: Any
    top: Any
    total: Any
    kv_sem: Any
    q_sem: Any
    out_sem: Any


def attend(
    tiles: Tiles, table: jax.Array, q: jax.Array, pool: jax.Array, scales: jax.Array | None,
    prior: tuple[jax.Array, jax.Array] | None, static: Static, out_dtype: jnp.dtype,
) -> tuple[jax.Array, jax.Array]:
    """Attention of the rows of `tiles`: packed outputs [Hkv, R * G, W], log-sum-exp [R * G, 128] float32 (lane h: KV head h).

    table: [S * P] pages within the pool; q: packed [Hkv, R * G, W]; pool: head_major [N, 2, Hkv, ps, W = D] or paired
    [N, 1, Hkv, ps, W = 2 * D]; scales: [N, 2, Hkv, ps] float32 or None. prior: outputs to go on with, in place. Rows of no
    tile are undefined or prior's.
    """
    kv_heads, packed, width = q.shape
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    inputs = [q, pool] + [scales] * (scales is not None) + list(prior or ())
    scalars = (*tiles, table)
    first_prior = len(scalars) + len(inputs) - 2
    shape = static.block
    vmem, sem = pltpu.VMEM, pltpu.SemaphoreType.DMA((2,))
    scratch = Scratch(
        kv=vmem((2, shape.pages, pool.shape[1], kv_heads, shape.page_size, width), pool.dtype),
        scales=None if scales is None else vmem((2, shape.pages, 2, kv_heads, shape.page_size), jnp.float32),
        q=vmem((2, kv_heads, static.rows, width), q.dtype),
        out=vmem((kv_heads, static.rows, width), out_dtype),
        lse=vmem((static.rows, LANES), jnp.float32),
        acc=vmem((kv_heads, static.rows, width), jnp.float32),
        top=vmem((kv_heads, static.rows, LANES), jnp.float32),
        total=vmem((kv_heads, static.rows, LANES), jnp.float32),
        kv_sem=sem, q_sem=sem, out_sem=sem)
    return pl.pallas_call(
        functools.partial(_program, static, scales is not None, prior is not None),
        out_shape=(jax.ShapeDtypeStruct((kv_heads, packed, width), out_dtype),
                   jax.ShapeDtypeStruct((packed, LANES), jnp.float32)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars), grid=(1,), in_specs=[anywhere] * len(inputs),
            out_specs=(anywhere, anywhere), scratch_shapes=[s for s in scratch if s is not None]),
        input_output_aliases={first_prior: 0, first_prior + 1: 1} if prior else {},
        name=f"ragged_paged_attention_{static.rows}",
    )(*scalars, *inputs)


def _program(static: Static, quantised: bool, has_prior: bool, *arguments: Any) -> None:
    tiles, table, refs = Tiles(*arguments[:7]), arguments[7], list(arguments[8:])
    q_hbm, pool = refs.pop(0), refs.pop(0)
    scales = refs.pop(0) if quantised else None
    del refs[: 2 * has_prior]
    out_hbm, lse_hbm = refs.pop(0), refs.pop(0)
    if not quantised:
        refs.insert(1, None)
    scratch = Scratch(*refs)
    fetch = Fetcher(static.block, table, tiles.seq, tiles.start, tiles.stop, pool, scales, scratch.kv, scratch.scales,
                    scratch.kv_sem)
    total = tiles.total[0]

    def packed_rows(tile):
        return pl.ds(pl.multiple_of(tiles.row[tile] * static.group, 8), static.rows)

    def q_copy(tile):
        slot = lax.rem(tile, I32(2))
        return pltpu.make_async_copy(q_hbm.at[:, packed_rows(tile)], scratch.q.at[slot], scratch.q_sem.at[slot])

    def out_copies(tile):
        return (pltpu.make_async_copy(scratch.out, out_hbm.at[:, packed_rows(tile)], scratch.out_sem.at[0]),
                pltpu.make_async_copy(scratch.lse, lse_hbm.at[packed_rows(tile)], scratch.out_sem.at[1]))

    @pl.when(total > 0)
    def _():
        q_copy(I32(0)).start()
        fetch.start_copy(I32(0), I32(0), I32(0))

    def do_tile(tile, turn):
        blocks = fetch.blocks(tile)

        @pl.when(tile + 1 < total)
        def _():
            q_copy(tile + 1).start()

        scratch.acc[...] = jnp.zeros_like(scratch.acc)
        scratch.top[...] = jnp.full_like(scratch.top, EMPTY)
        scratch.total[...] = jnp.zeros_like(scratch.total)
        q_copy(tile).wait()

        def do_block(block, carry):
            slot = lax.rem(turn + block, I32(2))
            last = block + 1 == blocks
            next_tile, next_block = jnp.where(last, tile + 1, tile), jnp.where(last, 0, block + 1)

            @pl.when(next_tile < total)
            def _():
                fetch.start_copy(next_tile, next_block, 1 - slot)

            fetch.wait_copy(tile, block, slot)
            fetch.clear_unseen_values(tile, block, slot)
            _attend_block(static, fetch, scratch, tile, block, slot, tiles.position[tile] - fetch.key(tile, block))
            return carry

        lax.fori_loop(0, blocks, do_block, I32(0))

        @pl.when(tile > 0)  # the buffers are free, and what this tile writes after its end is in order
        def _():
            for copy in out_copies(tile - 1):
                copy.wait()

        _finish(static, scratch)
        for copy in out_copies(tile):
            copy.start()
        return turn + blocks

    lax.fori_loop(0, total, do_tile, I32(0))

    @pl.when(total > 0)
    def _():
        for copy in out_copies(total - 1):
            copy.wait()


def scores(static: Static, fetch: Fetcher, q: jax.Array, slot: jax.Array, head: int, position: jax.Array) -> jax.Array:
    """Scores times log2(e), [rows, keys] float32, of a tile's queries q [rows, D] with a block's keys, EMPTY where a query may
    not look: powers of 2 are what the hardware has.

    position: of the tile's first row, counted from the block's first key.
    """
    shape = (static.rows, static.block.keys)
    keys = fetch.rows(slot, 0, head, static.product)
    x = lax.dot_general(q.astype(static.product), keys, (((1,), (1,)), ((), ())), precision=static.precision,
                        preferred_element_type=jnp.float32)
    cap = static.soft_cap
    scale = static.scale * LOG2_E if cap is None else static.scale / cap
    x = x * (scale if fetch.scales is None else scale * fetch.row_scales(slot, 0, head))
    if cap is not None:
        x = jnp.tanh(x) * (cap * LOG2_E)
    ahead = lax.shift_right_logical(lax.broadcasted_iota(I32, shape, 0), I32(static.group.bit_length() - 1))
    distance = position + ahead - lax.broadcasted_iota(I32, shape, 1)
    seen = distance >= 0
    if static.window is not None:
        seen &= distance < static.window
    return jnp.where(seen, x, EMPTY)


def _attend_block(
    static: Static, fetch: Fetcher, scratch: Scratch, tile: jax.Array, block: jax.Array, slot: jax.Array, position: jax.Array
) -> None:
    """Let a tile's queries see a block. A row that sees nothing of it before it has seen any key gathers rubbish of top
    EMPTY, which its first key, and its own is always there, wipes out."""
    q_slot = lax.rem(tile, I32(2))
    for head in range(static.block.kv_heads):
        x = scores(static, fetch, scratch.q[q_slot, head], slot, head, position)
        before = scratch.top[head]  # [rows, 128], all lanes alike
        top = jnp.maximum(before, jnp.max(x, axis=1, keepdims=True))
        weights = jnp.exp2(x - widen(top, x.shape[1]))
        shrink = jnp.exp2(before - top)
        scratch.top[head] = top
        scratch.total[head] = scratch.total[head] * shrink + _by_lane(weights)
        if fetch.scales is not None:
            weights = weights * fetch.value_scales(tile, block, slot, head)
        values = fetch.rows(slot, 1, head, static.product)
        new = jnp.dot(weights.astype(static.product), values, precision=static.precision, preferred_element_type=jnp.float32)
        scratch.acc[head] = scratch.acc[head] * widen(shrink, new.shape[1]) + new


def _finish(static: Static, scratch: Scratch) -> None:
    """A tile's outputs and log-sum-exp from its sums."""
    lane = lax.broadcasted_iota(I32, (static.rows, LANES), 1)
    lse = jnp.zeros((static.rows, LANES), jnp.float32)
    for head in range(static.block.kv_heads):
        total = jnp.sum(scratch.total[head], axis=1, keepdims=True)
        scratch.out[head] = (scratch.acc[head] / total).astype(scratch.out.dtype)
        lse = jnp.where(lane == head, scratch.top[head] / LOG2_E + jnp.log(total), lse)
    scratch.lse[...] = lse


def widen(column: jax.Array, width: int) -> jax.Array:
    """[rows, 128], all lanes alike -> [rows, width]; whole registers are reused, not broadcast."""
    if width % LANES:
        return column[:, :width] if width < LANES else jnp.broadcast_to(column[:, :1], (column.shape[0], width))
    return jnp.concatenate([column] * (width // LANES), axis=1)


def _by_lane(x: jax.Array) -> jax.Array:
    """[rows, keys] -> [rows, 128] with the same sum over lanes."""
    if x.shape[1] % LANES:
        lane = lax.broadcasted_iota(I32, (x.shape[0], LANES), 1)
        return jnp.where(lane == 0, jnp.sum(x, axis=1, keepdims=True), 0.0)
    return functools.reduce(jnp.add, (x[:, i : i + LANES] for i in range(0, x.shape[1], LANES)))
