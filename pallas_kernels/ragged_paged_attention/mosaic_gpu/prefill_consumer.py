"""What a consumer warpgroup of the prefill kernel does with a job; see `prefill_kernel`."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from ...lazy import LazyModule
from .prefill_shape import EMPTY, I32, LOG2E, TILE, Job, PrefillShape, Ring
from .shape import tanh

plgpu = LazyModule("jax.experimental.pallas.mosaic_gpu")
State = tuple[jax.Array, jax.Array, jax.Array]  # weighted values [64, D], highest score and sum of weights [64]


def consume(
    shape: PrefillShape, wg: jax.Array, mine: jax.Array, job_of: Callable[[jax.Array], Job], q, out, lse, k_ring: Ring,
    v_ring: Ring, *, q_tiles, lse_rows, q_ready, turn, cleaned, out_tiles=None,
) -> None:
    """Attend to the keys of `mine` jobs, one after the other, as warpgroup `wg`."""
    own_output = out_tiles is not None
    q_tile, out_tile = q_tiles.at[wg], (out_tiles if own_output else q_tiles).at[wg]

    def load_queries(i: jax.Array) -> None:
        @pl.when(i < mine)
        def _():
            job = job_of(i)
            for h in range(shape.pack):
                rows = pl.ds(pl.multiple_of(job.row + wg * shape.tokens, 8), shape.tokens)
                plgpu.copy_gmem_to_smem(q.at[rows, job.group * shape.pack + h],
                                        q_tile.at[pl.ds(h * shape.tokens, shape.tokens)], q_ready.at[wg])

    def step(i: jax.Array, done: jax.Array) -> jax.Array:
        read = lambda: job_of(i)  # noqa: E731
        plgpu.barrier_wait(q_ready.at[wg])
        state, done = _attend(shape, read, wg, done, q_tile, turn, (k_ring, v_ring, cleaned))
        if own_output:
            load_queries(i + 1)
            plgpu.wait_smem_to_gmem(0)
        _store(shape, read(), wg, state, out_tile, lse_rows.at[wg], out, lse)
        if not own_output:
            plgpu.wait_smem_to_gmem(0)
            load_queries(i + 1)
        return done

    load_queries(jnp.int32(0))
    lax.fori_loop(0, mine, step, jnp.int32(0))
    plgpu.wait_smem_to_gmem(0)


def _attend(
    shape: PrefillShape, read: Callable[[], Job], wg, done, q_tile, turn, rings
) -> tuple[State, jax.Array]:
    """One job, after `done` blocks of earlier ones. `read` gives its fields: reading them again where they are rarely
    needed costs fewer registers than keeping them."""
    keys, job = shape.blocks.keys, read()
    position = job.position + wg * shape.tokens  # of the tile's first query
    last = jnp.minimum(position + shape.tokens, job.position + job.rows) - 1

    ahead = done - job.begin

    def take_turn() -> None:
        plgpu.barrier_arrive(turn)
        plgpu.barrier_wait(turn)

    def blocks(masked: bool):
        return lambda i, state: _block(shape, read, wg, i, i + ahead, position, state, q_tile, take_turn, masked, *rings)

    # blocks before `clear` end before the first query, and before kv_len: a tile without queries lies beyond it
    clear = jnp.clip(lax.div(jnp.minimum(position + 1, job.kv_len), keys), job.begin, job.end)
    opened = job.begin
    if shape.window is not None:  # blocks from it on begin in the last query's window
        opened = jnp.clip(lax.div(jnp.maximum(last - shape.window + keys, 0), keys), job.begin, clear)

    pl.when(wg == 1)(take_turn)
    state = (jnp.zeros((TILE, shape.head_dim), jnp.float32), jnp.full((TILE,), EMPTY, jnp.float32),
             jnp.zeros((TILE,), jnp.float32))
    if shape.window is not None:
        state = lax.fori_loop(job.begin, opened, blocks(True), state)
    state = lax.fori_loop(opened, clear, blocks(False), state)
    state = lax.fori_loop(clear, job.end, blocks(True), state)
    pl.when(wg == 0)(take_turn)
    return state, ahead + job.end


def _block(
    shape: PrefillShape, read: Callable[[], Job], wg, i, count, position, state: State, q_tile, take_turn, masked: bool,
    k_ring: Ring, v_ring: Ring, cleaned,
) -> State:
    """One block of keys: number `i` of the sequence, `count` of this thread block."""
    keys = shape.blocks.keys
    acc, top, total = state
    slot = lax.rem(count, shape.blocks.stages)
    cleaning = masked and not shape.quantised
    if cleaning:  # before the scores take their registers
        job = read()
        dirty = (i * keys < job.first) | ((i + 1) * keys > job.kv_len)
        plgpu.barrier_wait(v_ring.ready.at[slot])

        @pl.when(dirty & (wg == 0))
        def _():
            _zero(shape, v_ring.stages.at[slot], job.first - i * keys, job.kv_len - i * keys)
            plgpu.barrier_arrive(cleaned)

        @pl.when(dirty & (wg == 1))
        def _():  # this early, that the turn after the scores separates it from the next arrival
            plgpu.barrier_wait(cleaned)

    plgpu.barrier_wait(k_ring.ready.at[slot])
    scores = _scores(shape, q_tile, k_ring.stages.at[slot], take_turn)
    plgpu.barrier_arrive(k_ring.free.at[slot])

    to_log2 = shape.scale * LOG2E
    if shape.soft_cap is not None:
        scores, to_log2 = tanh(scores, shape.scale / shape.soft_cap), shape.soft_cap * LOG2E
    if masked:
        scores = jnp.where(_visible(shape, position - i * keys), scores, -jnp.inf)
    new_top = jnp.maximum(top, scores.max(axis=1) * to_log2)
    shrink = jnp.exp2(top - new_top)
    weights = jnp.exp2(scores * to_log2 - lax.broadcast_in_dim(new_top, scores.shape, [0]))
    total = total * shrink + weights.sum(axis=1)
    acc = acc * lax.broadcast_in_dim(shrink, acc.shape, [0])
    weights = weights.astype(v_ring.stages.dtype)
    acc, new_top, total, weights = lax.optimization_barrier((acc, new_top, total, weights))

    if not cleaning:
        plgpu.barrier_wait(v_ring.ready.at[slot])
    take_turn()
    acc = _add_values(shape, acc, weights, v_ring.stages.at[slot])
    plgpu.barrier_arrive(v_ring.free.at[slot])
    return acc, new_top, total


def _scores(shape: PrefillShape, q_tile, k_block, take_turn) -> jax.Array:
    """q k^T, float32 [64, keys]; gives the turn away once the product is under way."""
    if shape.interpret:
        product = jnp.dot(q_tile[...], k_block[...].T, preferred_element_type=jnp.float32)
        plgpu.commit_smem()  # unlike wgmma these loads are not ordered before the copy that comes next into the stage
        take_turn()
        return product

    def multiply(acc) -> jax.Array:
        plgpu.wgmma(acc, q_tile, k_block.transpose((1, 0)))
        take_turn()
        return acc[...]

    return pl.run_scoped(multiply, plgpu.ACC((TILE, shape.blocks.keys), jnp.float32))


def _add_values(shape: PrefillShape, acc: jax.Array, weights: jax.Array, v_block) -> jax.Array:
    """acc + weights v."""
    if shape.interpret:
        product = jnp.dot(weights, v_block[...], preferred_element_type=jnp.float32)
        plgpu.commit_smem()
        return acc + product
    return pl.run_state(lambda ref: plgpu.wgmma(ref, weights, v_block))(plgpu.ACC.init(acc))


def _visible(shape: PrefillShape, position: jax.Array) -> jax.Array:
    """Which keys of a block each row sees, bool [64, keys]; position: of the first query, relative to the block."""
    size = (TILE, shape.blocks.keys)
    key = lax.broadcasted_iota(I32, size, 1)
    last = lax.broadcast_in_dim((lax.iota(I32, TILE) & (shape.tokens - 1)) + position, size, [0])
    return key <= last if shape.window is None else (key <= last) & (key > last - shape.window)


def _zero(shape: PrefillShape, v_block, first: jax.Array, stop: jax.Array) -> None:
    """Zeros in the rows of a block outside first <= row < stop."""
    for row in range(0, shape.blocks.keys, TILE):
        for column in range(0, shape.head_dim, shape.columns):
            part = (pl.ds(row, TILE), pl.ds(column, shape.columns))
            index = row + lax.broadcasted_iota(I32, (TILE, shape.columns), 0)
            values = v_block[part]
            v_block[part] = jnp.where((index >= first) & (index < stop), values, jnp.zeros_like(values))
    plgpu.commit_smem()


def _store(shape: PrefillShape, job: Job, wg, state: State, out_tile, lse_row, out, lse) -> None:
    """Normalise and write the rows that the job has, 8 at a time, and the log-sum-exp of the whole tile."""
    acc, top, total = state
    total = jnp.where(total == 0, 1.0, total)
    out_tile[...] = (acc * lax.broadcast_in_dim(1 / total, acc.shape, [0])).astype(out.dtype)
    lse_row[...] = top * math.log(2) + jnp.log(total)
    plgpu.commit_smem()
    rows = jnp.clip(job.rows - wg * shape.tokens, 0, shape.tokens)

    @pl.when(rows > 0)
    def _():
        plgpu.copy_smem_to_gmem(lse_row, lse.at[job.number, job.group, wg])

    @pl.loop(0, lax.div(rows + 7, 8))
    def _(chunk):
        for h in range(shape.pack):
            row = pl.multiple_of(job.row + wg * shape.tokens + chunk * 8, 8)
            plgpu.copy_smem_to_gmem(out_tile.at[pl.ds(pl.multiple_of(h * shape.tokens + chunk * 8, 8), 8)],
                                    out.at[pl.ds(row, 8), job.group * shape.pack + h])
