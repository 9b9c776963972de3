"""Argmax over the vocabulary."""

from __future__ import annotations

import jax
import jax.numpy as jnp

_BLOCK = 128


def argmax_rows(x: jax.Array) -> jax.Array:
    """Index i32 [R] of the largest value of f32 [R, V], the lowest index among equals; with NaN some index of the row.

    The maximum of blocks first, then the block: XLA's CPU maximum is vectorised and threaded, its argmax is not
    (0.3 ms against 9 ms at 64 x 32,000), and nothing of size [R, V] is written.
    """
    num_rows, vocab = x.shape
    if vocab % _BLOCK:
        x = jnp.pad(x, ((0, 0), (0, -vocab % _BLOCK)), constant_values=-jnp.inf)
    blocks = x.reshape(num_rows, -1, _BLOCK)
    block = jnp.argmax(jnp.max(blocks, axis=2), axis=1).astype(jnp.int32)
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    return jnp.minimum(block * _BLOCK + jnp.argmax(inside, axis=1).astype(jnp.int32), vocab - 1)
