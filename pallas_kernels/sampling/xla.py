"""`truncated_argmax` without a sort of the vocabulary, in plain XLA.

top-k: its border is among the 64 largest, found by blocks; a larger k is bisected over the bits of z by counting, at
most 31 passes. top-p: the border is never searched for. The best of the race is kept if the mass strictly above its z is
short of the target; if it is not, neither it nor anything below it is kept, and the best of what is above comes next
(rejection sampling, as in FlashInfer's sorting-free sampling, but with the race of every token fixed beforehand, which
makes the outcome that of the sort). A round rejects with probability <= 1 - top_p if ``race`` is random; 1 to 3 rounds
serve a typical batch, V at worst.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from .border import NOTHING, min_p_limit, order_key, target_units, token_units, unit_scale
from .rows import any_of, argmax_rows, largest_values, sum_rows

_HEAD = 64  # a larger top_k is bisected


class _Search(NamedTuple):
    token: jax.Array  # i32 [R], best of the race below ``limit``
    limit: jax.Array  # i32 [R]
    target: jax.Array  # i32 [R], -1 before the first round
    more: jax.Array  # bool: tokens have changed and are to be judged


def truncated_argmax(
    race: jax.Array, z: jax.Array, top_k: jax.Array, top_p: jax.Array, min_p: jax.Array
) -> jax.Array:
    """See `api.truncated_argmax`."""
    rows = jnp.zeros(z.shape[:1], jnp.int32)
    use_k = (top_k > 0) & (top_k < z.shape[1])
    wants_k, wants_p = any_of(use_k, top_p < 1.0)
    limit = jnp.minimum(min_p_limit(min_p), NOTHING)
    limit = lax.cond(wants_k, lambda: jnp.where(use_k, jnp.minimum(limit, _kth_limit(z, top_k)), limit), lambda: limit)
    scale = lax.cond(wants_p, lambda: unit_scale(jnp.sum(jnp.exp(z), axis=1)), lambda: rows.astype(jnp.float32))

    def mass_above(key: jax.Array) -> jax.Array:
        return sum_rows(jnp.where(order_key(z) < key[:, None], token_units(z, scale), 0))

    def judge(s: _Search) -> _Search:
        """The first round, which has no token, sets the target: one place in the program for each of the two passes.

        A row that is done is judged again, to the same end. Limits fall, so the search ends whatever the race is.
        """
        first = s.target < 0
        key = jnp.where(first, s.limit, order_key(jnp.take_along_axis(z, s.token[:, None], axis=1))[:, 0])
        mass = lax.cond(wants_p, lambda: mass_above(key), lambda: rows)
        target = jnp.where(first, target_units(top_p, mass), s.target)
        rejected = first | (mass >= target) & (key < s.limit)
        limit = jnp.where(rejected, key, s.limit)
        (more,) = any_of(rejected)
        best = lambda: argmax_rows(jnp.where(order_key(z) < limit[:, None], race, -jnp.inf))  # noqa: E731
        return _Search(lax.cond(more, best, lambda: s.token), limit, target, more)

    return lax.while_loop(lambda s: s.more, judge, _Search(rows, limit, rows - 1, jnp.bool_(True))).token


def _kth_limit(z: jax.Array, k: jax.Array) -> jax.Array:
    """A limit that keeps what the k-th likeliest token's key keeps, ties included, i32 [R]; anything where k <= 0."""
    head = order_key(largest_values(z, min(_HEAD, z.shape[1])))
    size = head.shape[1]
    kth = jnp.take_along_axis(head, jnp.clip(k - 1, 0, size - 1)[:, None], axis=1)[:, 0]
    high = jnp.where(k <= size, kth, NOTHING)  # keys up to ``high`` are k or more
    low = jnp.where(k <= size, high, jnp.minimum(kth, high)) - 1  # keys up to ``low`` are fewer

    def halve(bracket: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bracket
        mid = low + ((high - low) >> 1)
        kept = sum_rows((order_key(z) <= mid[:, None]).astype(jnp.int32))
        low = jnp.where(kept > k, low, jnp.where(kept == k, mid - 1, mid))  # an exact hit ends the row's search
        return low, jnp.where(kept >= k, mid, high)

    return lax.while_loop(lambda b: any_of(b[1] - b[0] > 1)[0], halve, (low, high))[1] + 1
