"""Quantising keys and values, a row (one token, one KV head) at a time: no row depends on another, so a page can grow."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0}  # magnitude that the biggest element of a row is scaled to


def quantize_rows(x: jax.Array, dtype: DTypeLike) -> tuple[jax.Array, jax.Array]:
    """Symmetric absmax quantisation of x [..., D]: values [..., D] in `dtype` (int8 or float8_e4m3fn), scales [...] float32."""
    dtype, x = jnp.dtype(dtype), x.astype(jnp.float32)
    largest = LARGEST[dtype.name]
    scales = jnp.max(jnp.abs(x), axis=-1) / largest
    scaled = jnp.clip(x / jnp.where(scales > 0, scales, 1.0)[..., None], -largest, largest)
    return (jnp.round(scaled) if dtype == jnp.int8 else scaled).astype(dtype), scales
