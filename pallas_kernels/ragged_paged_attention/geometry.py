"""The integer half of an XLA attention call: which rows, pages and positions belong together.

Everything here depends on the batch only, never on a layer: in a step that unrolls its layers XLA computes it once.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

I32 = jnp.int32


class Decodes(NamedTuple):
    """The sequences of a batch with exactly one query, ordered so that those with a common prefix are neighbours.

    `order`: [S] which sequence stands at each place, `place`: its inverse. The rest is by place: `length`: [S] keys the
    query sees, 0 for a sequence without exactly one query; `low`: [S] first page to be read by the sequence alone;
    `shared`: [S] pages read together with the group, `leader`: [S] place of the group's first member.
    """

    order: jax.Array
    place: jax.Array
    length: jax.Array
    low: jax.Array
    shared: jax.Array
    leader: jax.Array


def rows_of(cu_q_lens: jax.Array, tokens: int) -> jax.Array:
    """Sequence of every row: [T] int32, S for padding rows."""
    rows = jnp.arange(tokens, dtype=I32)
    return jnp.sum((rows[:, None] >= cu_q_lens[None, 1:]).astype(I32), axis=1)


def plain_decodes(kv_lens: jax.Array, q_lens: jax.Array, page_size: int, window: int | None) -> Decodes:
    """Decodes that each read all their own pages."""
    order = jnp.arange(kv_lens.shape[0], dtype=I32)
    length = jnp.where(q_lens == 1, kv_lens, 0)
    low = jnp.zeros_like(length) if window is None else jnp.maximum(length - window, 0) // page_size
    return Decodes(order, order, length, low, jnp.zeros_like(length), order)


def grouped_decodes(
    page_table: jax.Array, kv_lens: jax.Array, q_lens: jax.Array, page_size: int, min_pages: int, min_members: int
) -> Decodes:
    """Decodes grouped by the pages their tables start with, where at least that many share at least that many pages.

    Two sequences are tried as a group if they agree on page number `min_pages` - 1; the pages on which all members agree,
    completely filled in each of them, are the shared ones.
    """
    seqs, pages = page_table.shape
    index = jnp.arange(seqs, dtype=I32)
    length = jnp.where(q_lens == 1, kv_lens, 0)
    full = length // page_size
    key = jnp.where(full >= min_pages, page_table[:, min_pages - 1], -1 - index)  # alone: a key of its own
    same = key[:, None] == key[None, :]
    first = jnp.argmax(same, axis=1).astype(I32)
    equal = page_table == page_table[first]
    agree = jnp.where(equal, pages, jnp.arange(pages, dtype=I32)[None, :]).min(axis=1)  # leading equal entries
    agree = jnp.minimum(agree, full)
    first = jnp.where(agree >= min_pages, first, index)
    member = first[:, None] == first[None, :]
    count = jnp.sum(member.astype(I32), axis=1)
    shared = jnp.where(member, agree[None, :], pages).min(axis=1)
    shared = jnp.where((count >= min_members) & (shared >= min_pages), shared, 0)
    before = (first[None, :] < first[:, None]) | ((first[None, :] == first[:, None]) & (index[None, :] < index[:, None]))
    place = jnp.sum(before.astype(I32), axis=1)
    order = jnp.argmax(place[None, :] == index[:, None], axis=1).astype(I32)
    shared = shared[order]
    return Decodes(order, place, length[order], shared, shared, place[first[order]])


def cumulative(counts: jax.Array) -> jax.Array:
    """[n] -> [n + 1] int32: 0 and the running sums."""
    return jnp.concatenate([jnp.zeros(1, I32), jnp.cumsum(counts, dtype=I32)])


def owner(cumulated: jax.Array, item: jax.Array) -> jax.Array:
    """Which of n owners has each item [...], given `cumulative` counts [n + 1]; n - 1 for items past the end."""
    n = cumulated.shape[0] - 1
    ends = cumulated[1:].reshape((1,) * item.ndim + (n,))
    return jnp.minimum(jnp.sum((ends <= item[..., None]).astype(I32), axis=-1), n - 1)
