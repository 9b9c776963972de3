"""The definition of `kv_write`: through the canonical form, copying the pool."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ..layout import from_canonical, pool_dims, to_canonical


def kv_write(pool: jax.Array, k: jax.Array, v: jax.Array, slots: jax.Array, *, layout: str) -> jax.Array:
    """See `api.kv_write`."""
    dims = pool_dims(pool, layout)
    pages = to_canonical(pool, layout)  # [N, 2, ps, Hkv, D]
    tokens = pages.swapaxes(1, 2).reshape(-1, 2, dims.kv_heads, dims.head_dim)  # [N * ps, 2, Hkv, D]
    slots = jnp.where(slots < 0, tokens.shape[0], slots)
    tokens = tokens.at[slots].set(jnp.stack([k, v], axis=1).astype(tokens.dtype), mode="drop")
    pages = tokens.reshape(dims.num_pages, dims.page_size, 2, dims.kv_heads, dims.head_dim).swapaxes(1, 2)
    return from_canonical(pages, layout, pool.dtype)
