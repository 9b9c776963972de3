"""Page moves on Hopper in Mosaic GPU: TMA copies through a ring in shared memory, many in flight.

A page is moved in *pieces* that are boxes both in the pool and in canonical form: token_major [tokens, Hkv, D] of keys or of
values, head_major [tokens, D] of one KV head, of at most `PIECE_BYTES`. TMA does the change of layout: its boxes are strided on
the side that needs it. Every thread block moves pieces of one layer, so a layer is one branch of the kernel.

Scatters write into the pools themselves. Mosaic GPU has no input_output_aliases, but `pl.kernel` over its mesh takes mutable
references (`jax.new_ref`), whose buffer is the pool's own when the caller donates it (`plgpu.kernel` does not: its vmap rule
knows no references). The dtype does not matter: bytes are moved.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ..compiler import refuse_other_gpus
from ..layout import Pool, QuantPool, as_storage, from_storage, pool_dims

PIECE_BYTES = 32 * 1024
RING_BYTES = 96 * 1024  # per thread block, two of which share a multiprocessor
MAX_STAGES = 16
SMS = 132


class MoveShape(NamedTuple):
    """Static facts of a move. tokens: of a piece; heads: KV heads of a piece; dtype: as moved."""

    layout: str
    pages: int
    layers: int
    num_pages: int
    page_size: int
    kv_heads: int
    head_dim: int
    dtype: str
    tokens: int

    @property
    def piece(self) -> tuple[int, ...]:
        rows = (self.tokens, self.head_dim)
        return rows if self.layout == "head_major" else (self.tokens, self.kv_heads, self.head_dim)

    @property
    def piece_bytes(self) -> int:
        return math.prod(self.piece) * jnp.dtype(self.dtype).itemsize

    @property
    def heads(self) -> int:
        """Pieces that one run of tokens makes."""
        return self.kv_heads if self.layout == "head_major" else 1

    @property
    def pieces(self) -> int:
        """Of one page of one layer."""
        return 2 * self.heads * (self.page_size // self.tokens)

    @property
    def stages(self) -> int:
        return min(MAX_STAGES, RING_BYTES // self.piece_bytes)


def gather_pages(pools: tuple[Pool, ...], pages: jax.Array, *, layout: str, interpret: Any = False) -> jax.Array:
    """See `api.gather_pages`. NotImplementedError: what TMA cannot address."""
    shape = _shape(pools, pages, layout, interpret)
    out = jax.ShapeDtypeStruct(_flat_data(shape), shape.dtype)
    data = _kernel(shape, False, out, interpret)(pages, *_stored(shape, pools))
    return data.reshape(_data(shape))


def scatter_pages(
    pools: tuple[Pool, ...], pages: jax.Array, data: jax.Array, *, layout: str, interpret: Any = False
) -> tuple[Pool, ...]:
    """See `api.scatter_pages`. NotImplementedError: what TMA cannot address."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    shape = _shape(pools, pages, layout, interpret)
    refs = tuple(jax.new_ref(pool, memory_space=plgpu.GMEM) for pool in _stored(shape, pools))
    _kernel(shape, True, (), interpret)(pages, data.reshape(_flat_data(shape)), *refs)
    like = jax.tree.leaves(pools[0])[0]
    return tuple(as_storage(jax.freeze(ref), like.dtype).reshape(like.shape) for ref in refs)


def _kernel(shape: MoveShape, scatter: bool, out_type: Any, interpret: Any):
    """The kernel (pages, <data and pools, or pools and data as output>)."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    workers = min(max(1, 2 * SMS // shape.layers), shape.pages * shape.pieces)  # of a layer

    def page_copy(pages, *refs) -> None:
        data, pools = (refs[0], refs[1:]) if scatter else (refs[-1], refs[:-1])
        pl.run_scoped(
            lambda ring, ready: _move(shape, scatter, workers, pages, data, pools, ring, ready),
            plgpu.SMEM((shape.stages, *shape.piece), jnp.dtype(shape.dtype)), plgpu.Barrier(num_barriers=shape.stages),
            collective_axes=())

    return pl.kernel(
        page_copy, out_type=out_type, mesh=plgpu.Mesh(grid=(shape.layers, workers), grid_names=("layer", "worker")),
        interpret=interpret, compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup))


def _move(shape: MoveShape, scatter: bool, workers: int, pages, data, pools, ring, ready) -> None:
    """One thread block: every `workers`-th piece of one layer. While a piece is written, `stages` - 1 others are read."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    layer, worker = lax.axis_index("layer"), lax.axis_index("worker")
    mine = lax.div(shape.pages * shape.pieces - worker + workers - 1, np.int32(workers))

    def places(i: jax.Array, pool) -> tuple[Any, Any, jax.Array]:
        """Source and destination of this block's i-th piece, and whether there is such a page."""
        piece = worker + i * workers
        number, part = lax.div(piece, np.int32(shape.pieces)), lax.rem(piece, np.int32(shape.pieces))
        page = pages[number]
        there = (page >= 0) & (page < shape.num_pages)
        stored, canonical = _boxes(shape, layer, number, jnp.clip(page, 0, shape.num_pages - 1), part, pool, data)
        return (canonical, stored, there) if scatter else (stored, canonical, there)

    def read(i: jax.Array, pool) -> None:
        slot = lax.rem(i, np.int32(shape.stages))
        plgpu.copy_gmem_to_smem(places(i, pool)[0], ring.at[slot], ready.at[slot])

    for number, pool in enumerate(pools):
        @pl.when(layer == number)
        def _(pool=pool):
            @pl.loop(0, jnp.minimum(mine, shape.stages))
            def fill(i):
                read(i, pool)

            @pl.loop(0, mine)
            def step(i):
                slot = lax.rem(i, np.int32(shape.stages))
                plgpu.barrier_wait(ready.at[slot])
                _, to, there = places(i, pool)

                @pl.when(there | (not scatter))
                def write():
                    plgpu.copy_smem_to_gmem(ring.at[slot], to, commit_group=False)

                plgpu.commit_smem_to_gmem_group()
                plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # the piece before this one has left its stage

                @pl.when((i > 0) & (i - 1 + shape.stages < mine))
                def refill():
                    read(i - 1 + shape.stages, pool)

            plgpu.wait_smem_to_gmem(0)


def _boxes(shape: MoveShape, layer, number, page, part, pool, data) -> tuple[Any, Any]:
    """Piece `part` of a page as it is stored, and in canonical form."""
    from jax.experimental import pallas as pl

    kv, rest = lax.div(part, np.int32(shape.pieces // 2)), lax.rem(part, np.int32(shape.pieces // 2))
    head, run = lax.rem(rest, np.int32(shape.heads)), lax.div(rest, np.int32(shape.heads))
    tokens = pl.ds(pl.multiple_of(run * shape.tokens, shape.tokens), shape.tokens)
    row = (number * shape.layers + layer) * 2 + kv
    if shape.layout == "head_major":
        return pool.at[(page * 2 + kv) * shape.kv_heads + head, tokens], data.at[row, tokens, head]
    return pool.at[page, tokens, kv], data.at[row, tokens]


def _shape(pools: tuple[Pool, ...], pages: jax.Array, layout: str, interpret: Any) -> MoveShape:
    """NotImplementedError with the reason if the kernel cannot serve the call."""
    if not interpret:
        refuse_other_gpus()
    if layout == "paired":
        raise NotImplementedError("paired pools: a key and its value are one row")
    if isinstance(pools[0], QuantPool):
        raise NotImplementedError("quantised pools: a canonical row holds values and scale, no box that TMA can move")
    dims, dtype = pool_dims(pools[0], layout), from_storage(jnp.zeros((), pools[0].dtype)).dtype
    width = dims.head_dim * dtype.itemsize * (1 if layout == "head_major" else dims.kv_heads)  # bytes of a token in a piece
    if dims.head_dim * dtype.itemsize % 16 or max(dims.head_dim, dims.kv_heads) > 256:
        raise NotImplementedError(f"head_dim={dims.head_dim} of {dtype}, {dims.kv_heads} KV heads: TMA moves boxes of rows "
                                  "of a multiple of 16 bytes and at most 256 elements a side")
    fit = [n for n in range(1, min(dims.page_size, 256) + 1) if dims.page_size % n == 0 and n * width <= PIECE_BYTES]
    tokens = max((n for n in fit if n * width % 128 == 0), default=None)
    if tokens is None:
        raise NotImplementedError(f"page_size={dims.page_size}: no part of a page of {width} bytes per token is a multiple of "
                                  f"128 bytes and at most {PIECE_BYTES}")
    if pages.shape[0] == 0:
        raise NotImplementedError("no pages to move: pages is empty")
    return MoveShape(layout, pages.shape[0], len(pools), dims.num_pages, dims.page_size, dims.kv_heads, dims.head_dim,
                     dtype.name, tokens)


def _stored(shape: MoveShape, pools: tuple[Pool, ...]) -> list[jax.Array]:
    """Pools as the kernel addresses them, with at most five axes: head_major [N * 2 * Hkv, ps, D]."""
    arrays = [from_storage(array) for array in jax.tree.leaves(pools)]
    return [x.reshape(-1, shape.page_size, shape.head_dim) if shape.layout == "head_major" else x for x in arrays]


def _data(shape: MoveShape) -> tuple[int, ...]:
    return (shape.pages, shape.layers, 2, shape.page_size, shape.kv_heads, shape.head_dim)


def _flat_data(shape: MoveShape) -> tuple[int, ...]:
    return (shape.pages * shape.layers * 2, shape.page_size, shape.kv_heads, shape.head_dim)
