"""The definition of `kv_write`: through the canonical form, copying the pool."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ..layout import Pool, QuantPool, from_canonical, logical_dtype, pool_dims, to_canonical
from ..quant import quantize_rows


def kv_write(pool: Pool, k: jax.Array, v: jax.Array, slots: jax.Array, *, layout: str) -> Pool:
    """See `api.kv_write`."""
    dims = pool_dims(pool, layout)
    pages = to_canonical(pool, layout)  # [N, 2, ps, Hkv, C]
    tokens = pages.swapaxes(1, 2).reshape(-1, 2, dims.kv_heads, pages.shape[-1])  # [N * ps, 2, Hkv, C]
    slots = jnp.where(slots < 0, tokens.shape[0], slots)
    rows = jnp.stack([k, v], axis=1)
    if isinstance(pool, QuantPool):
        values, scales = quantize_rows(rows, logical_dtype(pool.values.dtype))
        rows = jnp.concatenate([jax.lax.bitcast_convert_type(x, jnp.int8) for x in (values, scales)], axis=-1)
    tokens = tokens.at[slots].set(rows.astype(tokens.dtype), mode="drop")
    pages = tokens.reshape(dims.num_pages, dims.page_size, 2, dims.kv_heads, pages.shape[-1]).swapaxes(1, 2)
    return from_canonical(pages, layout, pool)
