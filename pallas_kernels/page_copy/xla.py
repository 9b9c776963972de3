"""Page moves as XLA gathers and scatters of whole pages; scatters update donated pools in place."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ..layout import Pool, from_canonical, to_canonical
from .rope import rotate_pages


def gather_pages(pools: tuple[Pool, ...], pages: jax.Array, *, layout: str) -> jax.Array:
    """See `api.gather_pages`."""
    return jnp.stack([to_canonical(_take(pool, pages), layout) for pool in pools], axis=1)


def scatter_pages(
    pools: tuple[Pool, ...], pages: jax.Array, data: jax.Array, *, layout: str
) -> tuple[Pool, ...]:
    """See `api.scatter_pages`."""
    return tuple(_put(pool, pages, from_canonical(data[:, i], layout, pool)) for i, pool in enumerate(pools))


def copy_pages(
    pools: tuple[Pool, ...],
    src: jax.Array,
    dst: jax.Array,
    *,
    layout: str,
    position_delta: jax.Array | None = None,
    rotate: jax.Array | None = None,
) -> tuple[Pool, ...]:
    """See `api.copy_pages`."""

    def copy(pool: Pool) -> Pool:
        rows = _take(pool, src)
        if position_delta is not None and rotate is not None:
            rows = from_canonical(rotate_pages(to_canonical(rows, layout), position_delta, rotate), layout, pool)
        return _put(pool, dst, rows)

    return tuple(copy(pool) for pool in pools)


def _take(pool: Pool, pages: jax.Array) -> Pool:
    return jax.tree.map(lambda x: x.at[jnp.clip(pages, 0, x.shape[0] - 1)].get(mode="promise_in_bounds"), pool)


def _put(pool: Pool, pages: jax.Array, rows: Pool) -> Pool:
    return jax.tree.map(lambda x, r: x.at[jnp.where(pages < 0, x.shape[0], pages)].set(r, mode="drop"), pool, rows)
