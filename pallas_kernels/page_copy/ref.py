"""The definition of the page moves: whole pools through the canonical form."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ..layout import Pool, from_canonical, pool_dims, to_canonical
from .rope import rotate_pages


def gather_pages(pools: tuple[Pool, ...], pages: jax.Array, *, layout: str) -> jax.Array:
    """See `api.gather_pages`."""
    pages = jnp.clip(pages, 0, pool_dims(pools[0], layout).num_pages - 1)
    return jnp.stack([to_canonical(pool, layout)[pages] for pool in pools], axis=1)


def scatter_pages(
    pools: tuple[Pool, ...], pages: jax.Array, data: jax.Array, *, layout: str
) -> tuple[Pool, ...]:
    """See `api.scatter_pages`."""
    hit = pages[None, :] == jnp.arange(pool_dims(pools[0], layout).num_pages, dtype=jnp.int32)[:, None]  # [N, n]
    written, which = hit.any(axis=1)[:, None, None, None, None], hit.argmax(axis=1)
    return tuple(
        from_canonical(jnp.where(written, data[which, layer], to_canonical(pool, layout)), layout, pool)
        for layer, pool in enumerate(pools)
    )


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
    data = gather_pages(pools, src, layout=layout)  # [n, L, 2, ps, Hkv, D]
    if position_delta is not None and rotate is not None:
        data = jnp.stack([rotate_pages(data[:, i], position_delta, rotate) for i in range(len(pools))], axis=1)
    return scatter_pages(pools, dst, data, layout=layout)
