"""Where the attention went: a second kernel that reads the keys again, once the log-sum-exp of every query is known.

The loops are turned around: a block of a sequence's keys stays in VMEM while the sequence's queries pass by, so a key's mass
is complete when its block is left and is written once.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .blocks import LANES, Fetcher
from .kernel import LOG2_E, Static, scores
from .packing import Tiles

I32 = jnp.int32
MAX_BLOCK_BYTES = 4 << 20  # of keys; two blocks are in VMEM


def attention_mass(
    sequences: Tiles, table: jax.Array, q: jax.Array, lse: jax.Array, pool: jax.Array, scales: jax.Array | None,
    static: Static, seqs: int, real_group: int,
) -> jax.Array:
    """Mass by token, [S, Hkv, at least P * ps] float32, 0 for keys that no query saw.

    sequences: a tile list with one tile, of any height, for each; table, q, pool, scales: as for `kernel.attend`; lse:
    [R * G, 128] float32, sinks included; real_group: query heads of a KV head, without padding.
    NotImplementedError: pages of which only too many together are a multiple of 128 keys.
    """
    kv_heads, _, width = q.shape
    unit = LANES // math.gcd(LANES, static.block.page_size)
    shape = static.block._replace(pages=-(-static.block.pages // unit) * unit)
    static = static._replace(block=shape)
    size = shape.keys * kv_heads * -(-width // LANES) * LANES * pool.dtype.itemsize
    if size > MAX_BLOCK_BYTES:
        raise NotImplementedError(f"attention mass needs blocks of a multiple of {LANES} keys: {shape.keys} of page size "
                                  f"{shape.page_size} take {size} bytes of VMEM, of which they may have {MAX_BLOCK_BYTES}")
    sequences = sequences._replace(start=sequences.start // shape.keys * shape.keys)
    context = -(-shape.columns * shape.page_size // shape.keys) * shape.keys
    zeros = jnp.zeros((seqs, kv_heads, context), jnp.float32)
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    inputs = [zeros, q, lse, pool] + [scales] * (scales is not None)
    scalars = (*sequences, table)
    vmem, two = pltpu.VMEM, pltpu.SemaphoreType.DMA((2,))
    scratch = [vmem((2, kv_heads, static.rows, width), q.dtype), vmem((2, static.rows, LANES), jnp.float32),
               vmem((2, kv_heads, shape.keys), jnp.float32), pltpu.SemaphoreType.DMA((2, 2)), two, two,
               vmem((2, shape.pages, 1, kv_heads, shape.page_size, width), pool.dtype)]
    if scales is not None:
        scratch.append(vmem((2, shape.pages, 1, kv_heads, shape.page_size), jnp.float32))
    return pl.pallas_call(
        functools.partial(_program, static, real_group, scales is not None),
        out_shape=jax.ShapeDtypeStruct(zeros.shape, zeros.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars), grid=(1,), in_specs=[anywhere] * len(inputs), out_specs=anywhere,
            scratch_shapes=scratch),
        input_output_aliases={len(scalars): 0},
        name="attention_mass",
    )(*scalars, *inputs)


def _program(static: Static, real_group: int, quantised: bool, *refs: Any) -> None:
    tiles, table, q_hbm, lse_hbm, pool = Tiles(*refs[:7]), refs[7], refs[9], refs[10], refs[11]
    scales, refs = (refs[12] if quantised else None), refs[12 + quantised :]
    out_hbm, q, lse, mass, q_sem, out_sem, kv_sem, keys = refs[:8]
    fetch = Fetcher(static.block, table, tiles.seq, tiles.start, tiles.stop, pool, scales, keys,
                    refs[8] if quantised else None, kv_sem)
    total, height = tiles.total[0], static.rows // static.group

    def query_copies(seq, step):
        slot = lax.rem(step, I32(2))
        at = pl.ds(pl.multiple_of((tiles.row[seq] + step * height) * static.group, 8), static.rows)
        return (pltpu.make_async_copy(q_hbm.at[:, at], q.at[slot], q_sem.at[slot, 0]),
                pltpu.make_async_copy(lse_hbm.at[at], lse.at[slot], q_sem.at[slot, 1]))

    def out_copy(seq, block, slot):
        to = out_hbm.at[tiles.seq[seq], :, pl.ds(pl.multiple_of(fetch.key(seq, block), LANES), static.block.keys)]
        return pltpu.make_async_copy(mass.at[slot], to, out_sem.at[slot])

    @pl.when(total > 0)
    def _():
        fetch.start_copy(I32(0), I32(0), I32(0))

    def do_sequence(seq, turn):
        blocks = fetch.blocks(seq)
        steps = lax.div(tiles.rows[seq] + (height - 1), I32(height))

        def do_block(block, carry):
            slot, key = lax.rem(turn + block, I32(2)), fetch.key(seq, block)
            last = block + 1 == blocks
            next_seq, next_block = jnp.where(last, seq + 1, seq), jnp.where(last, 0, block + 1)
            first = lax.div(jnp.maximum(key - tiles.position[seq], 0), I32(height))  # whose queries see the block

            @pl.when(next_seq < total)
            def _():
                fetch.start_copy(next_seq, next_block, 1 - slot)

            for copy in query_copies(seq, first):
                copy.start()

            @pl.when(turn + block >= 2)
            def _():
                out_copy(seq, block, slot).wait()

            mass[slot] = jnp.zeros_like(mass[slot])
            fetch.wait_copy(seq, block, slot)

            def do_queries(step, carry):
                @pl.when(step + 1 < steps)
                def _():
                    for copy in query_copies(seq, step + 1):
                        copy.start()

                for copy in query_copies(seq, step):
                    copy.wait()
                at = lax.rem(step, I32(2))
                _add(static, real_group, fetch, q.at[at], lse.at[at], mass, slot,
                     tiles.position[seq] + step * height - key, tiles.rows[seq] - step * height)
                return carry

            lax.fori_loop(first, steps, do_queries, I32(0))
            out_copy(seq, block, slot).start()
            return carry

        lax.fori_loop(0, blocks, do_block, I32(0))
        return turn + blocks

    turns = lax.fori_loop(0, total, do_sequence, I32(0))
    lax.fori_loop(0, jnp.minimum(turns, 2), lambda slot, carry: (out_copy(I32(0), I32(0), slot).wait(), carry)[1], I32(0))


def _add(
    static: Static, real_group: int, fetch: Fetcher, q: Any, lse: Any, mass: Any, slot: jax.Array, position: jax.Array,
    rows: jax.Array,
) -> None:
    """Add what queries q [Hkv, rows, D] with lse [rows, 128] put on a block, of them the first `rows` and real heads."""
    row = lax.broadcasted_iota(I32, (static.rows, static.block.keys), 0)
    real = (row < rows * static.group) & ((row & (static.group - 1)) < real_group)
    for head in range(static.block.kv_heads):
        x = scores(static, fetch, q[head], slot, head, position)
        weights = jnp.where(real, jnp.exp2(x - LOG2_E * lse[:, head : head + 1]), 0.0)
        mass[slot, head : head + 1] += jnp.sum(weights, axis=0, keepdims=True)
