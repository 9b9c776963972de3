"""What top-k, top-p and min-p keep, in integers, so that every implementation draws the same border.

A token is its ``order_key``, the bits of |z|: an integer order that is the order of -z. A kept set is a ``limit``: kept
are the tokens with a key below it, so ties at a border are kept together. Probability mass is counted in ``token_units``
of 2^-29 to 2^-30 of the row's total, truncated: integer sums do not depend on their order. Their scale is a power of two;
the order of the float sum behind it matters only where that sum is a power of two to within rounding.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

NOTHING = 0x7F800000  # key of z = -inf: never kept
EVERYTHING = jnp.iinfo(jnp.int32).max  # a target of mass that is never reached


def order_key(z: jax.Array) -> jax.Array:
    """i32, smaller for likelier, from f32 z <= 0; NaN: above NOTHING."""
    return lax.bitcast_convert_type(jnp.abs(z), jnp.int32)


def key_to_z(key: jax.Array) -> jax.Array:
    """The reverse of ``order_key``."""
    return -lax.bitcast_convert_type(key, jnp.float32)


def min_p_limit(min_p: jax.Array) -> jax.Array:
    """Limit i32 [R] of min_p f32 [R] (0: off): exp(z) >= min_p."""
    return jnp.where(min_p > 0.0, order_key(jnp.minimum(jnp.log(min_p), 0.0)) + 1, NOTHING)


def unit_scale(total: jax.Array) -> jax.Array:
    """The power of two f32 [R] that brings ``total`` f32 [R], the row's sum of exp(z) >= 1, into [2^29, 2^30)."""
    exponent = (lax.bitcast_convert_type(jnp.maximum(total, 1.0), jnp.int32) >> 23) - 127
    return lax.bitcast_convert_type((127 + 29 - exponent) << 23, jnp.float32)


def token_units(z: jax.Array, scale: jax.Array) -> jax.Array:
    """Mass i32 [R, n] of tokens with z f32 [R, n] under ``scale`` f32 [R]."""
    return (jnp.exp(z) * scale[:, None]).astype(jnp.int32)


def target_units(top_p: jax.Array, total: jax.Array) -> jax.Array:
    """A token is kept if the mass strictly above it is less than this, i32 [R]; top_p f32 [R] (1 or more: off).

    ``total`` i32 [R]: the mass that min_p and top_k have left. At least one unit, so the likeliest token is kept.
    """
    target = jnp.minimum(jnp.ceil(top_p * total.astype(jnp.float32)).astype(jnp.int32), total)
    return jnp.where(top_p < 1.0, jnp.maximum(target, 1), EVERYTHING)
