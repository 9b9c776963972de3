"""Page moves for TPU: every page of every layer is one DMA from HBM to HBM, all layers in one kernel, pools in place.

A page is a run of whole tiles in every layout, so nothing passes through VMEM or a register. Between pools and canonical
pages lies a buffer of pages as they are stored; XLA turns one into the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ..layout import Pool, QuantPool, from_canonical, pool_dims, to_canonical
from .rope import rotate_pages

I32 = jnp.int32


def gather_pages(pools: tuple[Pool, ...], pages: jax.Array, *, layout: str) -> jax.Array:
    """See `api.gather_pages`. NotImplementedError: what `_check` refuses."""
    _check(pools, pages, layout)
    return _canonical(_take(pools, pages), layout)


def scatter_pages(
    pools: tuple[Pool, ...], pages: jax.Array, data: jax.Array, *, layout: str
) -> tuple[Pool, ...]:
    """See `api.scatter_pages`. NotImplementedError: what `_check` refuses."""
    _check(pools, pages, layout)
    return _put(pools, pages, _stored(data, layout, pools[0]))


def copy_pages(
    pools: tuple[Pool, ...],
    src: jax.Array,
    dst: jax.Array,
    *,
    layout: str,
    position_delta: jax.Array | None = None,
    rotate: jax.Array | None = None,
) -> tuple[Pool, ...]:
    """See `api.copy_pages`. NotImplementedError: what `_check` refuses."""
    _check(pools, src, layout)
    staged = _take(pools, src)
    if position_delta is not None and rotate is not None:
        pages = _canonical(staged, layout)
        layers = [rotate_pages(pages[:, i], position_delta, rotate) for i in range(len(pools))]
        staged = _stored(jnp.stack(layers, axis=1), layout, pools[0])
    return _put(pools, dst, staged)


def _check(pools: tuple[Pool, ...], pages: jax.Array, layout: str) -> None:
    pool_dims(pools[0], layout)
    if not pages.shape[0]:
        raise NotImplementedError(f"the TPU kernel moves at least one page, got {pages.shape}")
    for x in jax.tree.leaves(pools[0]):
        if x.dtype.name not in ("float32", "bfloat16", "int8", "float8_e4m3fn"):
            raise NotImplementedError(f"the TPU kernel moves no pages of {x.dtype.name}")


def _canonical(staged: Pool, layout: str) -> jax.Array:
    """Stored pages [n, L, <pool page>] -> [n, L, 2, ps, Hkv, C]."""
    n, layers = jax.tree.leaves(staged)[0].shape[:2]
    pages = to_canonical(jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), staged), layout)
    return pages.reshape(n, layers, *pages.shape[1:])


def _stored(data: jax.Array, layout: str, like: Pool) -> Pool:
    """[n, L, 2, ps, Hkv, C] -> stored pages [n, L, <pool page>]."""
    n, layers = data.shape[:2]
    pages = from_canonical(data.reshape(-1, *data.shape[2:]), layout, like)
    return jax.tree.map(lambda x: x.reshape(n, layers, *x.shape[1:]), pages)


def _take(pools: tuple[Pool, ...], pages: jax.Array) -> Pool:
    """Stored pages [n, L, <pool page>]."""
    return _by_part(pools, lambda parts: _gather(parts, jnp.clip(pages, 0, parts[0].shape[0] - 1)))


def _put(pools: tuple[Pool, ...], pages: jax.Array, staged: Pool) -> tuple[Pool, ...]:
    if not isinstance(staged, QuantPool):
        return _scatter(pools, pages, staged)  # type: ignore[arg-type]  # pools are as `staged` is
    parts = (_scatter(tuple(pool[i] for pool in pools), pages, staged[i]) for i in range(2))
    return tuple(map(QuantPool, *parts))


def _by_part(pools: tuple[Pool, ...], op: Any) -> Pool:
    """op(arrays of all layers), for values and scales each if the pools are quantised."""
    if isinstance(pools[0], QuantPool):
        return QuantPool(*(op(tuple(pool[i] for pool in pools)) for i in range(2)))
    return op(pools)


def _gather(pools: tuple[jax.Array, ...], pages: jax.Array) -> jax.Array:
    """L arrays [N, *page], pages [n] within them -> [n, L, *page]."""

    def program(pages, *refs):
        staged, sem = refs[-2:]
        _move(pages, refs[: len(pools)], staged, sem, into_pools=False)

    shape = (pages.shape[0], len(pools), *pools[0].shape[1:])
    return _call(program, "gather_pages", (pages, *pools), jax.ShapeDtypeStruct(shape, pools[0].dtype), {})


def _scatter(pools: tuple[jax.Array, ...], pages: jax.Array, staged: jax.Array) -> tuple[jax.Array, ...]:
    """L arrays [N, *page] with staged [n, L, *page] at pages [n], where they are within them."""

    def program(pages, staged, *refs):
        _move(pages, refs[len(pools) : -1], staged, refs[-1], into_pools=True)

    shapes = tuple(jax.ShapeDtypeStruct(pool.shape, pool.dtype) for pool in pools)
    return _call(program, "scatter_pages", (pages, staged, *pools), shapes, {2 + i: i for i in range(len(pools))})


def _move(pages: Any, pools: Sequence[Any], staged: Any, sem: Any, *, into_pools: bool) -> None:
    """Between pools[layer][pages[i]] and staged[i, layer], two i under way at a time."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    def each(i, act):
        @pl.when((pages[i] >= 0) & (pages[i] < pools[0].shape[0]))
        def _():
            for layer, pool in enumerate(pools):
                ends = (pool.at[pages[i]], staged.at[i, layer])
                act(pltpu.make_async_copy(*(ends[::-1] if into_pools else ends), sem.at[lax.rem(i, I32(2))]))

    def step(i, carry):
        each(i, lambda copy: copy.start())

        @pl.when(i > 0)
        def _():
            each(i - 1, lambda copy: copy.wait())

        return carry

    count = staged.shape[0]
    lax.fori_loop(0, count, step, I32(0))
    each(I32(count - 1), lambda copy: copy.wait())


def _call(program: Any, name: str, args: tuple[jax.Array, ...], out_shape: Any, aliases: dict[int, int]) -> Any:
    """`program` with args[0] in scalar memory and everything else where it is."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    grid_spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1, grid=(1,), in_specs=[anywhere] * (len(args) - 1),
        out_specs=jax.tree.map(lambda _: anywhere, out_shape), scratch_shapes=[pltpu.SemaphoreType.DMA((2,))])
    return pl.pallas_call(program, out_shape=out_shape, grid_spec=grid_spec, input_output_aliases=aliases, name=name)(*args)
