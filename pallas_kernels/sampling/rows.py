"""Argmax, sum and the n largest along the last axis of [R, V], V in the thousands: in two stages, blocks first.

A maximum of short blocks is vectorised and threaded on CPU where XLA's own argmax is not, and of what is left (V / block
per row) little is to be done; a top-k of the whole row would be a sort on GPU. Vocabularies that a block divides are the
fast ones, others are padded.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax

_WIDTH = 128  # of a block: the lanes of a TPU register


def argmax_rows(x: jax.Array) -> jax.Array:
    """Index i32 [R] of the largest value of f32 [R, V], the lowest index among equals; with NaN some index of the row."""
    vocab = x.shape[1]
    width = next((w for w in (_WIDTH, _WIDTH // 2, _WIDTH // 4) if vocab % w == 0), _WIDTH)
    block = jnp.argmax(jnp.max(_blocks(x, width), axis=2), axis=1).astype(jnp.int32)
    inside = jnp.argmax(_block_values(x, block[:, None], width), axis=1).astype(jnp.int32)
    return jnp.minimum(block * width + inside, vocab - 1)


def sum_rows(x: jax.Array) -> jax.Array:
    """Sum [R] of i32 [R, V], which must not overflow."""
    return lax.platform_dependent(x, cpu=_sum_on_cpu, default=lambda x: jnp.sum(x, axis=1))


def largest_rows(x: jax.Array, n: int) -> tuple[jax.Array, jax.Array]:
    """``lax.top_k(x, n)`` of f32 [R, V], n <= V: values f32 and ids i32 [R, n], best first, lowest id among equals.

    Exact hierarchical selection, as in LightSeq (Wang et al., 2021): the n largest values lie in the n blocks with the
    largest maxima. Blocks are visited in the order of their ids, so that ties come out as without them.
    """
    blocks = _best_blocks(x, n)
    if blocks is None:
        values, ids = lax.top_k(x, n)
        return values, ids.astype(jnp.int32)
    blocks = jnp.sort(blocks, axis=1)
    values, place = lax.top_k(_block_values(x, blocks, _WIDTH), n)
    return values, jnp.take_along_axis(blocks, place // _WIDTH, axis=1) * _WIDTH + place.astype(jnp.int32) % _WIDTH


def largest_values(x: jax.Array, n: int) -> jax.Array:
    """The values of ``largest_rows``."""
    blocks = _best_blocks(x, n)
    return lax.top_k(x if blocks is None else _block_values(x, blocks, _WIDTH), n)[0]


def any_of(*masks: jax.Array) -> tuple[jax.Array, ...]:
    """``jnp.any`` of each bool [R], as bits of one reduction: a reduction, however small, costs compile time."""
    bits = sum((mask.astype(jnp.int32) << i for i, mask in enumerate(masks)), jnp.int32(0))
    width = math.gcd(bits.shape[0], 32)
    square = lax.optimization_barrier(bits.reshape(-1, width))  # one loop on CPU, see _sum_on_cpu
    found = lax.reduce(square, jnp.int32(0), lax.bitwise_or, (0, 1))
    return tuple((found >> i) & 1 != 0 for i in range(len(masks)))


def _sum_on_cpu(x: jax.Array) -> jax.Array:
    """XLA's CPU compiler splits a reduction over more than 32 elements of one axis into a chain of them and does not fuse
    the first with its input. Here no axis is longer (for V up to 32^4), and a barrier keeps the shape."""
    rows, vocab = x.shape
    width = next((w for w in (32, 16) if vocab % w == 0), None)
    if width is None:
        return jnp.sum(x, axis=1)
    blocks = jnp.sum(_blocks(x, width), axis=2)
    side = math.ceil(round((vocab // width) ** (1 / 3), 6))
    cube = jnp.pad(blocks, ((0, 0), (0, side**3 - vocab // width))).reshape(rows, side, side, side)
    return jnp.sum(lax.optimization_barrier(cube), axis=(1, 2, 3))


def _best_blocks(x: jax.Array, n: int) -> jax.Array | None:
    """Ids i32 [R, n] of the n blocks that hold the n largest values; None if that spares little."""
    if x.shape[1] <= 2 * n * _WIDTH:
        return None
    return lax.top_k(jnp.max(_blocks(x, _WIDTH), axis=2), n)[1].astype(jnp.int32)


def _blocks(x: jax.Array, width: int) -> jax.Array:
    """[R, V] as [R, blocks, width], padded with -inf (floats that are not a multiple of ``width``)."""
    if x.shape[1] % width:
        x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % width)), constant_values=-jnp.inf)
    return x.reshape(x.shape[0], -1, width)


def _block_values(x: jax.Array, blocks: jax.Array, width: int) -> jax.Array:
    """The values f32 [R, n * width] of blocks i32 [R, n], -inf past the end of a row; padding is not written for it."""
    rows, vocab = x.shape
    if vocab % width == 0:  # whole blocks: a gather by element takes a TPU's compiler minutes
        inside = jnp.take_along_axis(x.reshape(rows, -1, width), blocks[:, :, None], axis=1, mode="clip")
        return inside.reshape(rows, -1)
    ids = (blocks[:, :, None] * width + lax.iota(jnp.int32, width)[None, None, :]).reshape(rows, -1)
    return jnp.take_along_axis(x, ids, axis=1, mode="fill", fill_value=-jnp.inf)
