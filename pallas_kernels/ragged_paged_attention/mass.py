"""Where the attention went: softmax weights summed by page or token, in XLA operations.

A second pass over the keys with the log-sum-exp of the first, a tile of one sequence's queries against a block of pages at
a time. Any implementation that returns a log-sum-exp can end with it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from ..layout import Pool, pool_dims, take_heads
from .geometry import I32, Runs, plain_batch, tile_list
from .params import AttentionParams

KEYS, ROWS = 128, 64  # of a block and of a tile


def attention_mass(
    q: jax.Array, pool: Pool, page_table: jax.Array, kv_lens: jax.Array, cu_q_lens: jax.Array, lse: jax.Array, *,
    params: AttentionParams,
) -> jax.Array | None:
    """The third result of `api.ragged_paged_attention`, given its second; None when params.mass is None.

    Needs [S, Hkv, P * ps] floats: the tokens' mass, from which that of the pages is summed.
    """
    if params.mass is None:
        return None
    tokens, q_heads, head_dim = q.shape
    seqs, pages = page_table.shape
    dims = pool_dims(pool, params.layout)
    batch = plain_batch(page_table, kv_lens, cu_q_lens, tokens)
    tile = 1 if params.max_q_len == 1 else min(ROWS, tokens)
    runs = Runs(batch.first_row, batch.q_lens, jnp.zeros_like(kv_lens), jnp.full(seqs, pages * dims.page_size, I32))
    tiles = tile_list(runs, batch, tile=tile, most=tokens // tile + min(seqs, tokens), window=params.window)
    n = max(1, min(KEYS // dims.page_size, pages))
    block = n * dims.page_size

    rows = lambda x: jnp.pad(x, ((0, tile), *[(0, 0)] * (x.ndim - 1)))  # noqa: E731
    q = rows(q.astype(jnp.float32) * params.scale).reshape(-1, dims.kv_heads, q_heads // dims.kv_heads, head_dim)
    lse = rows(lse).reshape(*q.shape[:3])
    positions = jnp.pad(batch.positions, (0, tile), constant_values=-1)
    table = jnp.clip(jnp.pad(page_table, ((0, 0), (0, n))), 0, dims.num_pages - 1)

    def one_tile(i: jax.Array, mass: jax.Array) -> jax.Array:
        t = jax.tree.map(lambda x: x[i], tiles._replace(total=tiles.row))
        mine, norm = (lax.dynamic_slice_in_dim(x, t.row, tile) for x in (q, lse))
        at = jnp.where(jnp.arange(tile, dtype=I32) < t.rows, lax.dynamic_slice_in_dim(positions, t.row, tile), -1)
        first = t.start // dims.page_size

        def one_block(j: jax.Array, mass: jax.Array) -> jax.Array:
            page = first + j * n
            k, _ = take_heads(pool, lax.dynamic_slice(table, (t.seq, page), (1, n)), params.layout)
            key = page * dims.page_size + jnp.arange(block, dtype=I32)
            ok = (key[None, :] <= at[:, None]) & (key >= t.start)[None, :]
            if params.window is not None:
                ok &= key[None, :] > at[:, None] - params.window
            scores = jnp.einsum("thgd,hkd->thgk", mine, k[0].astype(jnp.float32))
            if params.soft_cap is not None:
                scores = params.soft_cap * jnp.tanh(scores / params.soft_cap)
            weights = jnp.where(ok[:, None, None, :], jnp.exp(scores - norm[..., None]), 0.0).sum(axis=(0, 2))  # [Hkv, B]
            place = (t.seq, 0, page * dims.page_size)
            old = lax.dynamic_slice(mass, place, (1, dims.kv_heads, block))
            return lax.dynamic_update_slice(mass, old + weights[None], place)

        blocks = ((t.stop - 1) // dims.page_size - first) // n + 1
        return lax.fori_loop(0, blocks, one_block, mass)

    mass = jnp.zeros((seqs, dims.kv_heads, pages * dims.page_size + block), jnp.float32)
    mass = lax.fori_loop(0, tiles.total, one_tile, mass)[:, :, : pages * dims.page_size]
    return mass if params.mass == "token" else mass.reshape(*mass.shape[:2], pages, -1).sum(axis=3)
