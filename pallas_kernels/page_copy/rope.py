"""Moving keys that are stored rotated: rotation by a difference of positions."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def rotate_pages(pages: jax.Array, delta: jax.Array, inv_freq: jax.Array) -> jax.Array:
    """Keys of canonical pages [n, 2, ps, Hkv, D] rotated by delta [n] positions; values as they are.

    Rotations of one plane add up, so R(p + delta) k = R(delta) R(p) k. Channel i turns with channel i + rotary_dim / 2.
    """
    half = inv_freq.shape[0]
    angle = (delta.astype(jnp.float32)[:, None] * inv_freq.astype(jnp.float32)[None, :])[:, None, None, :]
    cos, sin = jnp.cos(angle), jnp.sin(angle)  # [n, 1, 1, half]
    keys = pages[:, 0].astype(jnp.float32)  # [n, ps, Hkv, D]
    a, b, rest = keys[..., :half], keys[..., half : 2 * half], keys[..., 2 * half :]
    keys = jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1)
    return pages.at[:, 0].set(keys.astype(pages.dtype))
