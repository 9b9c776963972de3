"""Noise that is a pure function of (seed, child, position, token): no step, slot, batch or padding enters it.

Two stages. A threefry chain (``jax.random.fold_in``) makes one 64-bit key per row. A keyed integer hash makes the
numbers of the row's V tokens from it: 0.5 ms for 64 x 32,000 on 2 cores against 13-17 ms of threefry bits. The hash
is the two-round xorshift-multiply finaliser with the constants 0x21f0aaad, 0x735a2d97 (found by TheIronBorn's search
with github.com/skeeto/hash-prospector, "lowbias32" successor), applied twice with key material in between. It is
integer arithmetic, hence bit-identical on every backend and in every batch.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax


def row_keys(seed_lo: jax.Array, seed_hi: jax.Array, child: jax.Array, position: jax.Array) -> jax.Array:
    """u32 [R, 2] from four i32 [R]."""

    def key(seed: jax.Array, child: jax.Array, position: jax.Array) -> jax.Array:
        base = jax.random.wrap_key_data(seed, impl="threefry2x32")
        return jax.random.key_data(jax.random.fold_in(jax.random.fold_in(base, child), position))

    seed = lax.bitcast_convert_type(jnp.stack([seed_lo, seed_hi], axis=1), jnp.uint32)
    return jax.vmap(key)(seed, child, position)


def token_bits(keys: jax.Array, vocab: int) -> jax.Array:
    """Hash of (key, token), u32 [R, V], from keys u32 [R, 2]."""
    token = lax.broadcasted_iota(jnp.uint32, (keys.shape[0], vocab), 1)
    return _mix(_mix(token * jnp.uint32(0x9E3779B9) + keys[:, :1]) + keys[:, 1:])


def exponential(keys: jax.Array, vocab: int) -> jax.Array:
    """Standard exponential noise f32 [R, V], positive and finite.

    -log(1 - v) with v in (0, 1) of 31 bits; a series where v is small, as the smallest values decide the race for
    unlikely tokens and log(1 - v) has lost their digits (relative error below 2^-17 everywhere).
    """
    v = (token_bits(keys, vocab) >> 1).astype(jnp.int32).astype(jnp.float32) * 2.0**-31 + 2.0**-32
    v = jnp.minimum(v, 1.0 - 2.0**-24)
    return jnp.where(v < 2.0**-6, v * (1.0 + v * (0.5 + v * (1.0 / 3.0))), -jnp.log(1.0 - v))


def _mix(x: jax.Array) -> jax.Array:
    x = (x ^ (x >> 16)) * jnp.uint32(0x21F0AAAD)
    x = (x ^ (x >> 15)) * jnp.uint32(0x735A2D97)
    return x ^ (x >> 15)
