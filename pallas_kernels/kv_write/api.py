"""Public `kv_write`: validation and choice of implementation."""

from __future__ import annotations

import jax

from ..dispatch import dispatch
from ..layout import Pool, pool_dims
from . import mosaic_tpu, ref, xla

IMPLEMENTATIONS = {"xla": xla.kv_write, "ref": ref.kv_write, "mosaic_tpu": mosaic_tpu.kv_write}


def kv_write(
    pool: Pool, k: jax.Array, v: jax.Array, slots: jax.Array, *, layout: str, impl: str = "auto"
) -> Pool:
    """Write one key and value row per token into a layer's pool; in place when the pool is donated.

    pool: see `layout.Pool`; k, v: [T, Hkv, D], cast to the pool's logical dtype or quantised row by row (`quant`);
    slots: [T] int32, page * ps + offset. A slot outside [0, N * ps) drops its row (padding); two rows must not name the
    same slot. Returns the pool.
    ValueError: shapes that do not belong together.
    """
    dims = pool_dims(pool, layout)
    if k.ndim != 3 or k.shape != v.shape or k.shape[1:] != (dims.kv_heads, dims.head_dim):
        raise ValueError(f"k and v must be [T, {dims.kv_heads}, {dims.head_dim}] for pool {dims} ({layout}), "
                         f"got {k.shape} and {v.shape}")
    if slots.shape != k.shape[:1] or slots.dtype != "int32":
        raise ValueError(f"slots must be int32 [{k.shape[0]}] to match k {k.shape}, got {slots.dtype} {slots.shape}")
    return dispatch("kv_write", IMPLEMENTATIONS, impl, pool, k, v, slots, layout=layout)
