"""Where the attention went: the softmax weight of every cached token, from a second pass over the keys alone.

Once the log-sum-exp of each row is known, exp(score - lse) is final, so nothing has to be kept per page while attending and no
partial rescaled later; a call that wants mass reads half as much again. Scores are computed transposed, keys x rows, so that
the sum over rows stays within a warp. One thread block per sequence, KV head and `BLOCKS` blocks of keys.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from ...layout import Pool
from .decode import scores_of
from .plan import ROW_ALIGN, TILE_ROWS
from .quantised import scales_of, widen
from .shape import LOG2E, DecodeShape, tiled

BLOCKS = 4


def token_mass(
    shape: DecodeShape, q: jax.Array, pool: Pool, page_table: jax.Array, kv_lens: jax.Array, cu_q_lens: jax.Array,
    lse: jax.Array,
) -> jax.Array:
    """float32 [S, Hkv, P * ps]: softmax weights summed over the queries of each sequence and the query heads of each KV head.

    q: [T, Hq, D]; lse: [T, Hq] float32, natural, with the sinks; any q_lens. 0 for tokens that no query sees.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    (tokens, q_heads, dim), seqs, groups = q.shape, page_table.shape[0], shape.spec.groups
    heads, i32 = shape.kv_heads, jnp.int32
    rows = (cu_q_lens[1:] - cu_q_lens[:-1]) * groups
    starts = jnp.cumsum((rows + ROW_ALIGN - 1) // ROW_ALIGN * ROW_ALIGN, dtype=i32)
    starts = jnp.concatenate([jnp.zeros(1, i32), starts])
    number = jnp.arange((-(-tokens * groups // ROW_ALIGN) + seqs) * ROW_ALIGN + TILE_ROWS, dtype=i32)
    seq = jnp.clip(jnp.searchsorted(starts, number, side="right").astype(i32) - 1, 0, seqs - 1)
    source = jnp.clip(cu_q_lens[seq] * groups + number - starts[seq], 0, tokens * groups - 1)
    head = jnp.arange(heads, dtype=i32)[:, None] * groups
    index = (source // groups * q_heads + source % groups)[None] + head  # [Hkv, rows]
    keys, dtype = shape.block_keys * BLOCKS, jnp.dtype(shape.dtype)
    chunks = -(-page_table.shape[1] * shape.page_size // keys)
    kv, units = jnp.dtype(shape.kv_dtype), shape.block_keys // shape.spec.unit_keys
    values, *scales = jax.tree.leaves(pool)
    tile = lambda n: plgpu.SMEM((n, dim), dtype, transforms=tiled(shape.columns, dtype))  # noqa: E731
    scratch = dict(
        wide_smem=tile(shape.block_keys), scales=plgpu.SMEM((keys,), jnp.float32),
        pieces=plgpu.SMEM((BLOCKS, units, 2, shape.spec.unit_keys), jnp.float32)) if shape.quantised else {}
    mass = plgpu.kernel(
        lambda *refs, **smem: _work(shape, refs, **smem),
        out_type=jax.ShapeDtypeStruct((seqs, heads, chunks * keys), jnp.float32),
        grid=(heads, seqs, chunks),
        grid_names=("head", "seq", "chunk"),
        scratch_types=dict(
            q_smem=tile(TILE_ROWS),
            k_smem=plgpu.SMEM((BLOCKS, shape.block_keys, dim), kv, transforms=tiled(shape.kv_columns, kv)),
            lse_smem=plgpu.SMEM((TILE_ROWS,), jnp.float32), mass_smem=plgpu.SMEM((keys,), jnp.float32),
            q_ready=plgpu.Barrier(num_arrivals=2),
            k_ready=plgpu.Barrier(num_arrivals=units * (1 + shape.quantised), num_barriers=BLOCKS),
            **scratch,
        ),
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=shape.interpret,
    )(starts, rows, kv_lens, page_table, q.reshape(-1, dim)[index], lse.reshape(-1)[index] * LOG2E,
      values.reshape(-1, shape.page_size, dim), *scales)
    return mass[:, :, : page_table.shape[1] * shape.page_size]


def _work(
    shape: DecodeShape, refs, *, q_smem, k_smem, lse_smem, mass_smem, q_ready, k_ready, wide_smem=None, scales=None,
    pieces=None,
) -> None:
    """One thread block."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    starts, row_counts, kv_lens, table, q, lse, *pages, out = refs
    head, seq, chunk = jax.lax.axis_index("head"), jax.lax.axis_index("seq"), jax.lax.axis_index("chunk")
    rows, kv_len, keys = row_counts[seq], kv_lens[seq], shape.block_keys * BLOCKS
    first, position = chunk * keys, kv_len - rows // shape.spec.groups
    low = np.int32(0) if shape.window is None else jnp.maximum(position - (shape.window - 1), 0)
    live = (rows > 0) & (first < kv_len) & (first + keys > low)

    def read(block: int) -> jax.Array:
        return (first + block * shape.block_keys < kv_len) & (first + (block + 1) * shape.block_keys > low)

    def fetch(block: int) -> None:
        unit = shape.spec.unit_keys
        for i in range(shape.block_keys // unit):
            key = jnp.clip(first + block * shape.block_keys + i * unit, low // unit * unit, (kv_len - 1) // unit * unit)
            page = table[seq, key // shape.page_size]
            offset = pl.ds(jax.lax.rem(key, np.int32(shape.page_size)), unit)
            plgpu.copy_gmem_to_smem(pages[0].at[page * (2 * shape.kv_heads) + head, offset],
                                    k_smem.at[block, pl.ds(i * unit, unit)], k_ready.at[block])
            if shape.quantised:
                plgpu.copy_gmem_to_smem(pages[1].at[page, :, head, offset], pieces.at[block, i], k_ready.at[block])

    mass_smem[...] = shape.place(jnp.zeros((keys,), jnp.float32), plgpu.Layout.WGMMA.reduce(1))

    @pl.when(live)
    def _():
        for block in range(BLOCKS):
            pl.when(read(block))(partial(fetch, block))
        for block in range(BLOCKS):
            pl.when(read(block))(partial(plgpu.barrier_wait, k_ready.at[block]))
            if shape.quantised:
                scales[pl.ds(block * shape.block_keys, shape.block_keys)] = scales_of(shape, pieces.at[block, :, 0])

        @pl.loop(0, (rows + TILE_ROWS - 1) // TILE_ROWS)
        def _(tile):
            row = starts[seq] + tile * TILE_ROWS
            plgpu.copy_gmem_to_smem(q.at[head, pl.ds(row, TILE_ROWS)], q_smem, q_ready)
            plgpu.copy_gmem_to_smem(lse.at[head, pl.ds(row, TILE_ROWS)], lse_smem, q_ready)
            plgpu.barrier_wait(q_ready)

            @pl.loop(0, BLOCKS)
            def _(block):
                at = pl.ds(block * shape.block_keys, shape.block_keys)
                keys_of_block, scale = k_smem.at[block], None
                if shape.quantised:
                    widen(shape, keys_of_block, wide_smem, lambda keys: keys)
                    plgpu.commit_smem()
                    keys_of_block, scale = wide_smem, shape.place(scales[at], plgpu.Layout.WGMMA.reduce(1))
                new = _block_mass(shape, first + block * shape.block_keys, tile * TILE_ROWS, rows, position, keys_of_block,
                                  scale, q_smem, lse_smem)
                mass_smem[at] = shape.place(mass_smem[at], plgpu.Layout.WGMMA.reduce(1)) + new

    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(mass_smem, out.at[seq, head, pl.ds(first, keys)])
    plgpu.wait_smem_to_gmem(0)


def _block_mass(shape: DecodeShape, first, row, rows, position, k_smem, scale, q_smem, lse_smem) -> jax.Array:
    """[block keys] float32: what one tile of rows gives the keys from `first` on, whose scale [block keys] may be None."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    tile, layout = (shape.block_keys, TILE_ROWS), plgpu.Layout.WGMMA.reduce(0)
    across = lambda x: shape.place(jax.lax.broadcast_in_dim(x, tile, [1]))  # noqa: E731
    number = row + shape.iota((TILE_ROWS,), 0, layout)
    at = across(jnp.where(number < rows, position + number // shape.spec.groups, -1))
    key = first + shape.iota(tile, 0)
    seen = key <= at
    if shape.window is not None:
        seen &= key > at - shape.window
    factor = None if scale is None else shape.place(jax.lax.broadcast_in_dim(scale, tile, [0]))
    scores = scores_of(shape, k_smem, q_smem, factor) - across(shape.place(lse_smem[...], layout))
    return jnp.where(seen, jnp.exp2(scores), 0.0).sum(axis=1)
