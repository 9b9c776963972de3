"""Page moves as XLA gathers and scatters of whole pages; scatters update donated pools in place."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ..layout import from_canonical, to_canonical
from .rope import rotate_pages


def gather_pages(pools: tuple[jax.Array, ...], pages: jax.Array, *, layout: str) -> jax.Array:
    """See `api.gather_pages`."""
    return jnp.stack([to_canonical(_take(pool, pages), layout) for pool in pools], axis=1)


def scatter_pages(
    pools: tuple[jax.Array, ...], pages: jax.Array, data: jax.Array, *, layout: str
) -> tuple[jax.Array, ...]:
    """See `api.scatter_pages`."""
    return tuple(_put(pool, pages, from_canonical(data[:, i], layout, pool.dtype)) for i, pool in enumerate(pools))


def copy_pages(
    pools: tuple[jax.Array, ...],
    src: jax.Array,
    dst: jax.Array,
    *,
    layout: str,
    position_delta: jax.Array | None = None,
    rotate: jax.Array | None = None,
) -> tuple[jax.Array, ...]:
    """See `api.copy_pages`."""

    def copy(pool: jax.Array) -> jax.Array:
        rows = _take(pool, src)
        if position_delta is not None and rotate is not None:
            rows = from_canonical(rotate_pages(to_canonical(rows, layout), position_delta, rotate), layout, pool.dtype)
        return _put(pool, dst, rows)

    return tuple(copy(pool) for pool in pools)


def _take(pool: jax.Array, pages: jax.Array) -> jax.Array:
    return pool.at[jnp.clip(pages, 0, pool.shape[0] - 1)].get(mode="promise_in_bounds")


def _put(pool: jax.Array, pages: jax.Array, rows: jax.Array) -> jax.Array:
    return pool.at[jnp.where(pages < 0, pool.shape[0], pages)].set(rows, mode="drop")
