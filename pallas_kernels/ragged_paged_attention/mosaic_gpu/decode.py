"""Flash-decoding on Hopper: the items of a plan, each a tile of at most 64 query rows against a run of paged keys.

Tricks: all query rows of one KV head (tokens x G heads) fill one wgmma tile, so a page is read once for them; keys and values
come page by page through TMA into a ring of shared-memory stages; blocks of one warpgroup each walk their share of the
balanced list, several to an SM, so that one waits while another computes. The warpgroup that computes also issues the copies:
with more than one block per SM a producer warp would only cost registers. A partial result is the normalised output and
log2-sum-exp of one item.

The probabilities pass through shared memory, because the interpreter has no wgmma with a register operand. That of jax 0.10
has none with a transposed operand either: there alone the scores come from a dot of loaded tiles.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ...layout import Pool
from .plan import ROW_ALIGN, TILE_ROWS
from .quantised import scales_of, widen
from .shape import EMPTY, LOG2E, DecodeShape, tanh, tiled


def decode_partials(
    shape: DecodeShape, items: jax.Array, worker_items: jax.Array, table: jax.Array, q_rows: jax.Array, pool: Pool,
) -> tuple[jax.Array, jax.Array]:
    """Partial outputs float32 [Hkv, partial rows, D] and log2-sum-exp float32 [Hkv, (items + 1) * 64] of all items.

    items, worker_items: of a `Plan`; table: [S, P] int32; q_rows: [Hkv, R + 64, D], queries in the row space; pool:
    head-major, [N, 2, Hkv, ps, D] or quantised. Only the rows that an item has are defined.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    spec, dim = shape.spec, shape.head_dim
    cols, dtype, out_cols = shape.columns, jnp.dtype(shape.dtype), math.gcd(shape.store_width, 32)
    kv = jnp.dtype(shape.kv_dtype)
    block = lambda width: plgpu.SMEM((shape.stages, shape.block_keys, width), kv, transforms=tiled(shape.kv_columns, kv))  # noqa: E731
    units = shape.block_keys // spec.unit_keys
    values, *scales = jax.tree.leaves(pool)
    scratch = dict(
        wide_smem=plgpu.SMEM((shape.block_keys, dim), dtype, transforms=tiled(cols, dtype)),
        scales=plgpu.SMEM((shape.stages, units, 2, spec.unit_keys), jnp.float32)) if shape.quantised else {}
    if shape.scaled_values:
        scratch["v_scales"] = plgpu.SMEM((shape.block_keys,), jnp.float32)
    return plgpu.kernel(
        lambda items, workers, table, q, *refs, **smem: _work(
            shape, items, workers, table, q, refs[:-2], *refs[-2:], **smem),
        out_type=(jax.ShapeDtypeStruct((shape.kv_heads, spec.partial_rows, dim), jnp.float32),
                  jax.ShapeDtypeStruct((shape.kv_heads, (spec.items + 1) * TILE_ROWS), jnp.float32)),
        grid=(shape.kv_heads, spec.workers, shape.slices),
        grid_names=("head", "worker", "slice"),
        scratch_types=dict(
            q_smem=plgpu.SMEM((TILE_ROWS, dim), dtype, transforms=tiled(cols, dtype)),
            k_smem=block(dim), v_smem=block(shape.width),
            p_smem=plgpu.SMEM((TILE_ROWS, shape.block_keys), dtype, transforms=tiled(cols, dtype)),
            o_smem=plgpu.SMEM((TILE_ROWS, shape.store_width), jnp.float32, transforms=tiled(out_cols, jnp.float32)),
            lse_smem=plgpu.SMEM((TILE_ROWS,), jnp.float32),
            q_ready=plgpu.Barrier(),
            k_ready=plgpu.Barrier(num_arrivals=units * (1 + shape.quantised), num_barriers=shape.stages),
            v_ready=plgpu.Barrier(num_arrivals=units, num_barriers=shape.stages),
            **scratch,
        ),
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=shape.interpret,
    )(items, worker_items, table, q_rows, values.reshape(-1, *values.shape[3:]), *scales)


class _Item(NamedTuple):
    """Scalars of an item: see `Plan.items`; blocks: of keys."""

    number: jax.Array
    row: jax.Array
    chunks: jax.Array
    reader: jax.Array
    first: jax.Array
    stop: jax.Array
    position: jax.Array
    step: jax.Array
    out: jax.Array
    blocks: jax.Array


def _work(shape: DecodeShape, items, worker_items, table, q_rows, pages, o_ref, lse_ref, **smem) -> None:
    """One thread block: its worker's items for its KV head."""
    from jax.experimental import pallas as pl

    head, worker = jax.lax.axis_index("head"), jax.lax.axis_index("worker")

    @pl.loop(worker_items[worker], worker_items[worker + 1])
    def _(number):
        fields = [items[number, f] for f in range(8)]
        blocks = (fields[4] - fields[3] + shape.block_keys - 1) // shape.block_keys
        _attend(shape, head, _Item._make([number, *fields, blocks]), table, q_rows, pages, o_ref, lse_ref, **smem)


def _attend(
    shape: DecodeShape, head, item: _Item, table, q_rows, pages, o_ref, lse_ref, *, q_smem, k_smem, v_smem, p_smem, o_smem,
    lse_smem, q_ready, k_ready, v_ready, wide_smem=None, scales=None, v_scales=None,
) -> None:
    """One item from its first copy to its stored partial."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    def fetch(block) -> None:
        _fetch(shape, head, item, block, table, pages, k_smem, v_smem, scales, k_ready, v_ready)

    plgpu.copy_gmem_to_smem(q_rows.at[head, pl.ds(item.row, TILE_ROWS)], q_smem, q_ready)
    pl.loop(0, jnp.minimum(item.blocks, shape.stages))(fetch)
    plgpu.barrier_wait(q_ready)

    row_layout = plgpu.Layout.WGMMA.reduce(1)
    state = lambda value: shape.place(jnp.full((TILE_ROWS,), value, jnp.float32), row_layout)  # noqa: E731
    acc = shape.place(jnp.zeros((TILE_ROWS, shape.width), jnp.float32))
    own_token = shape.iota((TILE_ROWS,), 0, row_layout) // shape.spec.groups
    last_seen = item.position + own_token * item.step

    def block_step(block, carry):
        acc, top, total = carry
        stage = jax.lax.rem(block, np.int32(shape.stages))
        first = item.first + block * shape.block_keys
        plgpu.barrier_wait(k_ready.at[stage])
        if shape.quantised:
            widen(shape, k_smem.at[stage], wide_smem, lambda keys: keys)
            if shape.scaled_values:
                v_scales[...] = scales_of(shape, scales.at[stage, :, 1])
            plgpu.commit_smem()
            scores = scores_of(shape, q_smem, wide_smem, _by_key(shape, scales.at[stage, :, 0]))
        else:
            scores = scores_of(shape, q_smem, k_smem.at[stage])
        scores = jnp.where(_visible(shape, first, last_seen, item), scores, -jnp.inf)
        new_top = jnp.maximum(top, scores.max(axis=1))
        weights = jnp.exp2(scores - jax.lax.broadcast_in_dim(new_top, scores.shape, [0]))
        shrink = jnp.exp2(top - new_top)
        total = total * shrink + weights.sum(axis=1)
        plgpu.barrier_wait(v_ready.at[stage])
        if shape.quantised and not shape.scaled_values:
            weights = jnp.where(weights == 0, 0.0, weights * _by_key(shape, scales.at[stage, :, 1]))  # unseen scales may be NaN
        p_smem[...] = weights.astype(p_smem.dtype)
        if shape.quantised:
            v_block = wide_smem.at[:, pl.ds(0, shape.width)]
            factor = shape.place(v_scales[...], row_layout) if shape.scaled_values else None
            widen(shape, v_smem.at[stage], v_block, lambda values: _known(shape, first, item, _times(values, factor)))
        else:
            v_block = v_smem.at[stage]
            _clear_values(shape, first, item, v_block)
        plgpu.commit_smem()
        acc = acc * jax.lax.broadcast_in_dim(shrink, acc.shape, [0]) + _weighted_values(shape, p_smem, v_block)
        pl.when(block + shape.stages < item.blocks)(lambda: fetch(block + shape.stages))
        return acc, new_top, total

    acc, top, total = jax.lax.fori_loop(np.int32(0), item.blocks, block_step, (acc, state(EMPTY), state(0.0)))
    _store(shape, head, item, acc, top, total, o_ref, lse_ref, o_smem, lse_smem)


def _fetch(
    shape: DecodeShape, head, item: _Item, block, table, pages, k_smem, v_smem, scales, k_ready, v_ready
) -> None:
    """Bring one block of keys and values; past the last unit of the item that one again, which costs no bandwidth. The scales
    of both come in one copy, as those of 16 tokens are half of the 128 bytes that TMA aligns to."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    stage, unit = jax.lax.rem(block, np.int32(shape.stages)), shape.spec.unit_keys
    columns = pl.ds(jax.lax.axis_index("slice") * shape.width, shape.width)
    last = (item.stop - 1) // unit * unit
    for i in range(shape.block_keys // unit):
        key = jnp.minimum(item.first + block * shape.block_keys + i * unit, last)
        number = table[item.reader, key // shape.page_size]
        page = number * (2 * shape.kv_heads) + head
        rows, offset = pl.ds(i * unit, unit), pl.ds(jax.lax.rem(key, np.int32(shape.page_size)), unit)
        plgpu.copy_gmem_to_smem(pages[0].at[page, offset], k_smem.at[stage, rows], k_ready.at[stage])
        plgpu.copy_gmem_to_smem(pages[0].at[page + shape.kv_heads, offset, columns], v_smem.at[stage, rows], v_ready.at[stage])
        if shape.quantised:
            plgpu.copy_gmem_to_smem(pages[1].at[number, :, head, offset], scales.at[stage, i], k_ready.at[stage])


def scores_of(shape: DecodeShape, a_smem, b_smem, factor: jax.Array | None = None) -> jax.Array:
    """a b^T [M, N] float32, times `factor`, scaled and capped, in units of log2: of queries and keys, in either order."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    def product(acc):
        plgpu.wgmma(acc, a_smem, plgpu.transpose_ref(b_smem, (1, 0)))
        return acc[...]

    if shape.interpret and jax.__version_info__ < (0, 11):
        scores = jax.lax.dot_general(a_smem[...], b_smem[...], (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    else:
        scores = pl.run_scoped(product, plgpu.ACC((a_smem.shape[0], b_smem.shape[0]), jnp.float32))
    if factor is not None:
        scores = scores * factor
    if shape.soft_cap is None:
        return scores * (shape.scale * LOG2E)
    return tanh(scores, shape.scale / shape.soft_cap) * (shape.soft_cap * LOG2E)


def _visible(shape: DecodeShape, first, last_seen: jax.Array, item: _Item) -> jax.Array:
    """Which keys of a block each row sees, [64, block keys]."""

    tile = (TILE_ROWS, shape.block_keys)
    key = first + shape.iota(tile, 1)
    last = jax.lax.broadcast_in_dim(jnp.minimum(last_seen, item.stop - 1), tile, [0])
    seen = key <= last
    if shape.window is not None:
        seen &= key > jax.lax.broadcast_in_dim(last_seen, tile, [0]) - shape.window
    return seen


def _by_key(shape: DecodeShape, pieces) -> jax.Array:
    """Scales as they came as a factor of scores."""
    return shape.place(jax.lax.broadcast_in_dim(scales_of(shape, pieces), (TILE_ROWS, shape.block_keys), [1]))


def _times(values: jax.Array, factor: jax.Array | None) -> jax.Array:
    """`values` [keys, .] times the factor of their row, if there is one."""
    if factor is None:
        return values
    return (values.astype(jnp.float32) * jax.lax.broadcast_in_dim(factor, values.shape, [0])).astype(values.dtype)


def _clear_values(shape: DecodeShape, first, item: _Item, v_smem) -> None:
    """Zero the values of a block that no row sees: they may be NaN, and 0 * NaN would reach the sum."""
    from jax.experimental import pallas as pl

    @pl.when((first + shape.block_keys > item.stop) | (first < _lowest(shape, item)))
    def _():
        v_smem[...] = _known(shape, first, item, shape.place(v_smem[...]))


def _known(shape: DecodeShape, first, item: _Item, values: jax.Array) -> jax.Array:
    """`values` [block keys, .], 0 where no row sees them."""
    key = first + shape.iota(values.shape, 0)
    return jnp.where((key >= _lowest(shape, item)) & (key < item.stop), values, jnp.zeros_like(values))


def _lowest(shape: DecodeShape, item: _Item):
    return np.int32(0) if shape.window is None else item.position - (shape.window - 1)


def _weighted_values(shape: DecodeShape, p_smem, v_smem) -> jax.Array:
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    def product(acc):
        plgpu.wgmma(acc, p_smem, v_smem)
        return acc[...]

    return pl.run_scoped(product, plgpu.ACC((TILE_ROWS, shape.width), jnp.float32))


def _store(shape: DecodeShape, head, item: _Item, acc, top, total, o_ref, lse_ref, o_smem, lse_smem) -> None:
    """Normalise, and write the rows of the tile eight at a time."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    part, safe = jax.lax.axis_index("slice"), jnp.where(total == 0, 1.0, total)  # NaN stays
    lse_smem[...] = jnp.where(total == 0, EMPTY, top + jnp.log(safe) * LOG2E)
    out = acc / jax.lax.broadcast_in_dim(safe, acc.shape, [0])
    for at in range(0, shape.width, shape.store_width):
        plgpu.wait_smem_to_gmem(0)
        o_smem[...] = out[:, at : at + shape.store_width]
        plgpu.commit_smem()

        @pl.loop(0, item.chunks)
        def _(chunk, at=at):
            rows, place = pl.ds(chunk * ROW_ALIGN, ROW_ALIGN), pl.ds(item.out + chunk * ROW_ALIGN, ROW_ALIGN)
            columns = pl.ds(part * shape.width + at, shape.store_width)
            plgpu.copy_smem_to_gmem(o_smem.at[rows], o_ref.at[head, place, columns])

    @pl.when(part == 0)
    def _():
        plgpu.copy_smem_to_gmem(lse_smem, lse_ref.at[head, pl.ds(item.number * TILE_ROWS, TILE_ROWS)])

    plgpu.wait_smem_to_gmem(0)
