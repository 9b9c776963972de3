"""Softmax attention in parts.

A *partial* is what a set of keys contributes to a query: float32 acc [..., D], the weighted sum of values, the highest score
top [..., 1] and the sum total [..., 1] of exp(score - top). It lies in memory as one array [..., D + 2], and is taken
apart while keys are added to it. Partials of disjoint sets combine in any order; `EMPTY` is the top of the empty one.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

EMPTY = -1e30

Parts = tuple[jax.Array, jax.Array, jax.Array]  # acc, top, total


def empty_partials(shape: tuple[int, ...], head_dim: int) -> jax.Array:
    """Partials [*shape, D + 2] that no key has contributed to."""
    column = jnp.where(jnp.arange(head_dim + 2, dtype=jnp.int32) == head_dim, jnp.float32(EMPTY), jnp.float32(0))
    return jnp.broadcast_to(column, (*shape, head_dim + 2))


def split(partial: jax.Array) -> Parts:
    """acc, top and total of partials [..., D + 2]."""
    m = partial.shape[-1] - 2
    return partial[..., :m], partial[..., m : m + 1], partial[..., m + 1 :]


def join(parts: Parts) -> jax.Array:
    """Partials [..., D + 2] of acc, top and total."""
    return jnp.concatenate(parts, axis=-1)


def attend(
    seen: Parts, q: jax.Array, k: jax.Array, v: jax.Array, ok: jax.Array | None, soft_cap: float | None
) -> Parts:
    """Partials of queries q [..., M, D], already scaled, once they have also seen keys k and values v [..., B, D].

    ok: bool, broadcastable to [..., M, B], which keys each query sees (None: all). Values must be finite, keys need not be.
    """
    acc, old, total = seen
    scores = jnp.einsum("...md,...kd->...mk", q, k, preferred_element_type=jnp.float32)
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    if ok is not None:
        scores = jnp.where(ok, scores, -jnp.inf)
    top = jnp.maximum(old, scores.max(axis=-1, keepdims=True))
    weights, shrink = jnp.exp(scores - top), jnp.exp(old - top)
    acc = acc * shrink + jnp.einsum("...mk,...kd->...md", weights, v, preferred_element_type=jnp.float32)
    return acc, top, total * shrink + weights.sum(axis=-1, keepdims=True)


def combine(a: jax.Array, b: jax.Array) -> jax.Array:
    """The partials of the union of two disjoint key sets."""
    (acc_a, top_a, total_a), (acc_b, top_b, total_b) = split(a), split(b)
    top = jnp.maximum(top_a, top_b)
    x, y = jnp.exp(top_a - top), jnp.exp(top_b - top)
    return join((acc_a * x + acc_b * y, top, total_a * x + total_b * y))


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
