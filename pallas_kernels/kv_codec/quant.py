"""Quantising a group of numbers between its two ends, decoded to the same bits by every backend.

The ends are elements of the group, so the KV's own dtype holds them exactly, and they decode to themselves. What was
decoded therefore encodes and decodes to itself: a page loses something the first time only, however often it moves. The
step is rounded up to 16 significant bits: times a quantised number of at most 8 bits it is exact in float32, and whether
a compiler fuses that product with the sum changes nothing. (An encoder whose division is not IEEE's may choose the other
neighbour where two are as near.) All is done on halves, so that no difference overflows.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def quantize(x: jax.Array, axis: int, largest: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Numbers 0..largest as uint8, shaped like x, and the ends of the groups that lie along `axis`, kept as 1, like x.

    An element is off by at most half a step, (high - low) / largest / 2 * (1 + 2**-14), and the rounding of x's dtype.
    Numbers must be finite.
    """
    low, high = x.min(axis, keepdims=True), x.max(axis, keepdims=True)
    half, step = _half(low), _half_step(low, high, largest)
    return jnp.round((_half(x) - half) / jnp.where(step > 0, step, 1)).astype(jnp.uint8), low, high


def dequantize(numbers: jax.Array, low: jax.Array, high: jax.Array, largest: int) -> jax.Array:
    """The reverse, in the dtype of the ends."""
    x = 2 * (_half(low) + numbers.astype(jnp.float32) * _half_step(low, high, largest))
    return jnp.minimum(x, high.astype(jnp.float32)).astype(low.dtype)


def _half(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32) * 0.5


def _half_step(low: jax.Array, high: jax.Array, largest: int) -> jax.Array:
    bits = jax.lax.bitcast_convert_type((_half(high) - _half(low)) * (1 / largest), jnp.int32)
    return jax.lax.bitcast_convert_type((bits + 0x102) & ~0xFF, jnp.float32)  # up, by more than the product's two roundings
