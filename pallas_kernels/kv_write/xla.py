"""`kv_write` as XLA scatters, which update a donated pool in place."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ..layout import Pool, QuantPool, as_storage, logical_dtype, pair, pool_dims
from ..quant import quantize_rows


def kv_write(pool: Pool, k: jax.Array, v: jax.Array, slots: jax.Array, *, layout: str) -> Pool:
    """See `api.kv_write`."""
    dims = pool_dims(pool, layout)
    rows = jnp.stack([k, v], axis=1)  # [T, 2, Hkv, D]
    slots = jnp.where(slots < 0, dims.num_pages * dims.page_size, slots)

    def write(part: jax.Array, rows: jax.Array) -> jax.Array:
        rows = as_storage(rows, part.dtype)
        if layout == "token_major":
            flat = part.reshape(dims.num_pages * dims.page_size, *rows.shape[1:])
            return flat.at[slots].set(rows, mode="drop").reshape(part.shape)
        if part.shape[1] == 1:  # values of a paired pool
            rows = pair(rows)
        page, offset = jnp.divmod(slots, dims.page_size)
        return part.at[page, :, :, offset].set(rows, mode="drop")

    if isinstance(pool, QuantPool):
        return QuantPool(*map(write, pool, quantize_rows(rows, logical_dtype(pool.values.dtype))))
    return write(pool, rows)
