"""Log-probabilities of the raw distribution: of the model's logits, before penalties, temperature and truncation."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxkv.params import MAX_LOGPROBS
from pallas_kernels.sampling.rows import largest_rows, sum_rows


class TokenLogprobs(NamedTuple):
    """Of n tokens; zeros where nothing was asked for."""

    logprob: jax.Array  # f32 [n]
    rank: jax.Array  # i32 [n]: 1 + the number of strictly likelier tokens
    top_ids: jax.Array  # i32 [n, MAX_LOGPROBS], best first, lowest id first among equals; -1 past the vocabulary
    top_logprobs: jax.Array  # f32 [n, MAX_LOGPROBS]; -inf past the vocabulary


def empty_logprobs(n: int) -> TokenLogprobs:
    """All zeros."""
    f32, i32 = jnp.zeros((n,), jnp.float32), jnp.zeros((n,), jnp.int32)
    return TokenLogprobs(f32, i32, jnp.zeros((n, MAX_LOGPROBS), jnp.int32), jnp.zeros((n, MAX_LOGPROBS), jnp.float32))


def token_logprobs(logits: jax.Array, tokens: jax.Array) -> TokenLogprobs:
    """Of ``tokens`` i32 [n] (each in [0, V)) under ``logits`` f32 [n, V]."""
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=1)
    best = jnp.max(logits, axis=1, keepdims=True)
    log_total = best + jnp.log(jnp.sum(jnp.exp(logits - best), axis=1, keepdims=True))
    rank = 1 + sum_rows((logits > chosen).astype(jnp.int32))
    values, ids = largest_rows(logits, min(MAX_LOGPROBS, logits.shape[1]))
    missing = ((0, 0), (0, MAX_LOGPROBS - values.shape[1]))
    return TokenLogprobs((chosen - log_total)[:, 0], rank, jnp.pad(ids, missing, constant_values=-1),
                         jnp.pad(values - log_total, missing, constant_values=-jnp.inf))


def prompt_logprobs(
    states: tuple[jax.Array, ...], targets: jax.Array, logits_fn: Callable[..., jax.Array], rows: int = 64
) -> TokenLogprobs:
    """Of ``targets`` i32 [T] (-1: not wanted, its result is unspecified) given ``states``, each [T, ...].

    ``logits_fn(*states [r, ...]) -> f32 [r, V]`` runs on slices of ``rows`` positions, only on those that hold a target:
    [T, V] never exists, and a step without targets pays for one reduction.
    """
    num_tokens = targets.shape[0]
    rows = min(rows, num_tokens)
    wanted = targets >= 0
    last = jnp.max(jnp.where(wanted, lax.iota(jnp.int32, num_tokens), -1))

    def one_slice(i: jax.Array, out: TokenLogprobs) -> TokenLogprobs:
        start = jnp.minimum(i * rows, num_tokens - rows)  # the last slice may overlap the one before: same values
        cut = lambda x: lax.dynamic_slice_in_dim(x, start, rows)  # noqa: E731

        def compute() -> TokenLogprobs:
            new = token_logprobs(logits_fn(*map(cut, states)), jnp.maximum(cut(targets), 0))
            return jax.tree.map(lambda a, b: lax.dynamic_update_slice_in_dim(a, b, start, 0), out, new)

        return lax.cond(jnp.any(cut(wanted)), compute, lambda: out)

    return lax.fori_loop(0, (last + rows) // rows, one_slice, empty_logprobs(num_tokens))
