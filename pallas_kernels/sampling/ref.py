"""The definition of `truncated_argmax`: the whole vocabulary sorted."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from .border import NOTHING, key_to_z, min_p_limit, order_key, target_units, token_units, unit_scale


def truncated_argmax(
    race: jax.Array, z: jax.Array, top_k: jax.Array, top_p: jax.Array, min_p: jax.Array
) -> jax.Array:
    """See `api.truncated_argmax`."""
    limit = kept_limit(z, top_k, top_p, min_p)
    return jnp.argmax(jnp.where(order_key(z) < limit[:, None], race, -jnp.inf), axis=1).astype(jnp.int32)


def kept_limit(z: jax.Array, top_k: jax.Array, top_p: jax.Array, min_p: jax.Array) -> jax.Array:
    """Kept are the tokens whose key is below this, i32 [R]."""
    vocab = z.shape[1]
    keys = jnp.sort(order_key(z), axis=1)
    at = lambda index: jnp.take_along_axis(keys, index[:, None], axis=1)[:, 0]  # noqa: E731
    limit = min_p_limit(min_p)
    use_k = (top_k > 0) & (top_k < vocab)
    limit = jnp.where(use_k, jnp.minimum(limit, at(jnp.where(use_k, top_k, 1) - 1) + 1), limit)

    z_sorted = key_to_z(keys)  # mass is a function of the key: only the keys need sorting
    scale = unit_scale(jnp.sum(jnp.exp(z), axis=1))
    mass = jnp.cumsum(jnp.where(keys < limit[:, None], token_units(z_sorted, scale), 0), axis=1)
    target = target_units(top_p, mass[:, -1])
    last = jnp.argmax(mass >= target[:, None], axis=1)  # the first whose mass, its own included, reaches the target
    limit = jnp.where(top_p < 1.0, jnp.minimum(limit, at(last) + 1), limit)
    return jnp.minimum(limit, NOTHING)
