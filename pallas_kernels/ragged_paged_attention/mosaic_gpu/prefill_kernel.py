"""The prefill kernel on Hopper: FlashAttention-3's schedule over pages, in Mosaic GPU.

A block of threads per multiprocessor walks the jobs (see `prefill_jobs`) of all groups of query heads. A job is two tiles of 64
query rows, one per consumer warpgroup; a tile packs `pack` query heads of one KV head with 64 / pack tokens each, so that
short chunks fill it. One producer warpgroup with few registers brings keys and values by TMA, page by page, into rings of
stages, and runs ahead into the next job. Scores live in registers: wgmma, online softmax in base 2, wgmma with the weights
as register operand. The consumers take turns ("ping-pong"): one multiplies while the other one exponentiates. Blocks that no
query sees are skipped; only those on the diagonal and at the window's edge are masked.

Quantised keys and values come into rings of their own; a fourth warpgroup, the widener, writes them times their scales into the
rings of the consumers, in the dtype of the queries.

Keys and values that do not exist may be NaN, and 0 * NaN is NaN: in the block where a sequence ends (or its window starts)
the first consumer (of quantised KV the widener) overwrites such values with zeros in shared memory.

With `interpret` the two products go through jnp.dot: the interpreter of jax 0.10.2 has neither transposed references
(TransposeTransform), nor register operands of wgmma, nor run_state. Everything else runs as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .prefill_consumer import consume
from .prefill_jobs import FIELDS
from .prefill_shape import CONSUMERS, PRODUCER, TILE, WIDENER, Job, PrefillShape, Ring, registers
from .prefill_widen import widen
from .shape import tiled


def prefill_kernel(
    shape: PrefillShape, q: jax.Array, pages: list[jax.Array], page_table: jax.Array, total: jax.Array, jobs: jax.Array,
    interpret: Any,
) -> tuple[jax.Array, jax.Array]:
    """q: [R, Hq, D] packed; pages: [N * 2 * Hkv, ps, D] and of a quantised pool the scales [N, 2, Hkv, ps]; page_table:
    [S, P]; total: [1], jobs: [J, 6], see `Jobs`.

    Returns out [R, Hq, D], defined in the rows of jobs, and lse [J, Hq / pack, 2, 64] float32, whose last axes are a
    job's tiles and their rows, heads before tokens.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    dim, (keys, stages, own_output, ctas), dtype = shape.head_dim, shape.blocks, q.dtype
    layout, copies = tiled(shape.columns, dtype), shape.copies
    tiles = plgpu.SMEM((CONSUMERS, TILE, dim), dtype, transforms=layout)
    once, brought, used = (plgpu.Barrier(num_arrivals=n, num_barriers=stages) for n in (1, copies, CONSUMERS))
    ring = Ring(plgpu.SMEM((stages, keys, dim), dtype, transforms=layout), once if shape.quantised else brought, used)
    scratch: dict[str, Any] = dict(
        q_tiles=tiles, lse_rows=plgpu.SMEM((CONSUMERS, TILE), jnp.float32),
        q_ready=plgpu.Barrier(num_arrivals=shape.pack, num_barriers=CONSUMERS),
        k_ring=ring, v_ring=ring,
        turn=plgpu.Barrier(num_arrivals=CONSUMERS), cleaned=plgpu.Barrier(num_arrivals=1),
    )
    if own_output:
        scratch["out_tiles"] = tiles
    if shape.quantised:
        values = plgpu.SMEM((stages, keys, dim), pages[0].dtype, transforms=tiled(shape.columns, pages[0].dtype))
        pieces = plgpu.SMEM((stages, copies, 2, shape.span), jnp.float32)
        scratch |= dict(raw=tuple(Ring(x, brought, once) for x in (values, values, pieces)),
                        scales=plgpu.SMEM((2, keys), jnp.float32))
    return plgpu.kernel(
        lambda *refs, **memory: _body(shape, *refs, **memory),
        out_type=(jax.ShapeDtypeStruct(q.shape, dtype),
                  jax.ShapeDtypeStruct((jobs.shape[0], shape.groups, CONSUMERS, TILE), jnp.float32)),
        grid=(min(ctas, jobs.shape[0] * shape.groups),), grid_names=("cta",), num_threads=CONSUMERS + 1 + shape.quantised,
        thread_name="wg",
        scratch_types=scratch, interpret=interpret,
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )(q, page_table, total, jobs, *pages)


def _body(shape, q, table, total, jobs, *refs, k_ring: Ring, v_ring: Ring, raw=None, scales=None, **memory) -> None:
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    *pages, out, lse = refs
    wide = k_ring, v_ring
    brought = raw if shape.quantised else wide
    consumer_registers, producer_registers, widener_registers = registers(shape.head_dim, shape.quantised)
    wg = lax.axis_index("wg")
    cta, ctas = lax.axis_index("cta"), min(shape.blocks.ctas, jobs.shape[0] * shape.groups)

    def mine() -> jax.Array:
        """How many jobs this thread block has. Each role reads it for itself: shared, it would be spilled."""
        return lax.div(total[0] * shape.groups - cta + ctas - 1, ctas)

    def job_of(i: jax.Array) -> Job:
        work = cta + i * ctas
        number = lax.div(work, shape.groups)
        row, rows, seq, position, first, kv_len = (jobs[number, field] for field in range(FIELDS))
        begin = jnp.int32(0)
        if shape.window is not None:
            begin = lax.div(jnp.maximum(position - shape.window + 1, 0), shape.blocks.keys)
        end = lax.div(position + rows + shape.blocks.keys - 1, shape.blocks.keys)
        return Job(number, lax.rem(work, shape.groups), row, rows, seq, position, first, kv_len, begin, end)

    def walk(work: Callable[[Job, jax.Array], jax.Array], rings: tuple[Ring, ...]) -> None:
        """`work` on all jobs, given how many blocks went before; then leaves no phase of a barrier unobserved."""
        done = lax.fori_loop(0, mine(), lambda i, done: work(job_of(i), done), jnp.int32(0))

        @pl.loop(jnp.maximum(done - shape.blocks.stages, 0), done)
        def _(count):
            for ring in rings:
                plgpu.barrier_wait(ring.free.at[lax.rem(count, shape.blocks.stages)])

    @pl.when(wg == PRODUCER)
    def _produce():
        plgpu.set_max_registers(producer_registers, action="decrease")
        walk(lambda job, done: _bring(shape, job, done, pages, table, brought), brought)

    if shape.quantised:
        @pl.when(wg == WIDENER)
        def _widen():
            plgpu.set_max_registers(widener_registers, action="decrease")
            walk(lambda job, done: widen(shape, job, done, raw, wide, scales), wide)

    @pl.when(wg < CONSUMERS)
    def _consume():
        plgpu.set_max_registers(consumer_registers, action="increase")
        consume(shape, wg, mine(), job_of, q, out, lse, *wide, **memory)


def _bring(shape: PrefillShape, job: Job, done: jax.Array, pages, table, rings: tuple[Ring, ...]) -> jax.Array:
    """Copy the job's blocks into the rings, as stages come free. done: blocks brought before; returns those after."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    keys, stages = shape.blocks.keys, shape.blocks.stages
    last = lax.div(job.kv_len - 1, shape.page_size)
    low = lax.div(job.first, shape.page_size)
    kv_head = lax.div(job.group, shape.groups // shape.kv_heads)

    def block(i: jax.Array, _: None) -> None:
        count = done + i - job.begin
        slot = lax.rem(count, stages)
        places = []
        for part in range(shape.copies):
            key = i * keys + part * shape.span
            page = table[job.seq, jnp.clip(lax.div(key, shape.page_size), low, last)]
            offset = pl.multiple_of(lax.rem(key, shape.page_size), shape.span)
            places.append((part, page, pl.ds(offset, shape.span)))
        for number, ring in enumerate(rings):
            @pl.when(count >= stages)
            def _(ring=ring):
                plgpu.barrier_wait(ring.free.at[slot])

            for part, page, keys_of_page in places:
                if number < 2:
                    source = pages[0].at[page * (2 * shape.kv_heads) + number * shape.kv_heads + kv_head, keys_of_page]
                    target = ring.stages.at[slot, pl.ds(part * shape.span, shape.span)]
                else:  # of keys and values in one copy: those of 16 tokens are half of the 128 bytes that TMA aligns to
                    source, target = pages[1].at[page, :, kv_head, keys_of_page], ring.stages.at[slot, part]
                plgpu.copy_gmem_to_smem(source, target, ring.ready.at[slot])

    lax.fori_loop(job.begin, job.end, block, None)
    return done + job.end - job.begin
