"""Softmax attention in parts.

A *partial* is what a set of keys contributes to a query: float32 [..., D + 2] = the weighted sum of values, the highest
score m and the sum of exp(score - m). Partials of disjoint sets combine in any order; `EMPTY` is m of the empty one.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

EMPTY = -1e30


def empty_partials(shape: tuple[int, ...], head_dim: int) -> jax.Array:
    """Partials [*shape, D + 2] that no key has contributed to."""
    column = jnp.where(jnp.arange(head_dim + 2, dtype=jnp.int32) == head_dim, jnp.float32(EMPTY), jnp.float32(0))
    return jnp.broadcast_to(column, (*shape, head_dim + 2))


def partial_attention(q: jax.Array, k: jax.Array, v: jax.Array, ok: jax.Array | None, soft_cap: float | None) -> jax.Array:
    """Partials [..., M, D + 2] of queries q [..., M, D], already scaled, over keys k and values v [..., B, D].

    ok: bool, broadcastable to [..., M, B], which keys each query sees (None: all). Values must be finite, keys need not be.
    """
    scores = jnp.einsum("...md,...kd->...mk", q, k, preferred_element_type=jnp.float32)
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    if ok is not None:
        scores = jnp.where(ok, scores, -jnp.inf)
    top = jnp.maximum(scores.max(axis=-1, keepdims=True), EMPTY)
    weights = jnp.exp(scores - top)
    acc = jnp.einsum("...mk,...kd->...md", weights, v, preferred_element_type=jnp.float32)
    return jnp.concatenate([acc, top, weights.sum(axis=-1, keepdims=True)], axis=-1)


def combine(a: jax.Array, b: jax.Array) -> jax.Array:
    """The partials of the union of two disjoint key sets."""
    m = a.shape[-1] - 2
    top_a, top_b = a[..., m : m + 1], b[..., m : m + 1]
    top = jnp.maximum(top_a, top_b)
    sums = a * jnp.exp(top_a - top) + b * jnp.exp(top_b - top)
    return jnp.concatenate([sums[..., :m], top, sums[..., m + 1 :]], axis=-1)


def finish(partial: jax.Array, sinks: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Outputs [T, Hq, D] and log-sum-exp [T, Hq] of partials [T, Hq, D + 2]; empty ones give 0 and -inf.

    sinks: [Hq], joins the softmax denominator of the rows that are not empty.
    """
    acc, top, total = partial[..., :-2], partial[..., -2], partial[..., -1]
    real = total != 0  # NaN is no emptiness: it must reach the logits, where it is found
    if sinks is not None:
        sink = jnp.broadcast_to(sinks.astype(jnp.float32)[None], top.shape)
        new_top = jnp.maximum(top, sink)
        shrink = jnp.exp(top - new_top)
        acc, total, top = acc * shrink[..., None], total * shrink + jnp.exp(sink - new_top), new_top
    safe = jnp.where(real, total, 1.0)
    return jnp.where(real[..., None], acc / safe[..., None], 0.0), jnp.where(real, top + jnp.log(safe), -jnp.inf)
