"""`kv_write` as one XLA scatter, which updates a donated pool in place."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ..layout import as_storage, pool_dims


def kv_write(pool: jax.Array, k: jax.Array, v: jax.Array, slots: jax.Array, *, layout: str) -> jax.Array:
    """See `api.kv_write`."""
    dims = pool_dims(pool, layout)
    rows = as_storage(jnp.stack([k, v], axis=1), pool.dtype)  # [T, 2, Hkv, D]
    slots = jnp.where(slots < 0, dims.num_pages * dims.page_size, slots)
    if layout == "token_major":
        flat = pool.reshape(dims.num_pages * dims.page_size, 2, dims.kv_heads, dims.head_dim)
        return flat.at[slots].set(rows, mode="drop").reshape(pool.shape)
    page, offset = jnp.divmod(slots, dims.page_size)
    return pool.at[page, :, :, offset].set(rows, mode="drop")
