"""Ragged paged attention on TPU, as Pallas kernels over a head_major or paired pool.

This file says which calls they serve.
"""

from __future__ import annotations

import jax

from ...layout import Pool, QuantPool, pool_dims
from ..params import AttentionParams
from .entry import run


def ragged_paged_attention(
    q: jax.Array,
    pool: Pool,
    page_table: jax.Array,
    kv_lens: jax.Array,
    cu_q_lens: jax.Array,
    sinks: jax.Array | None,
    plan: jax.Array | None,
    *,
    params: AttentionParams,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """See `api.ragged_paged_attention`; `plan` is not used. NotImplementedError: what `_check` refuses."""
    del plan
    _check(q, pool, params)
    return run(q, pool, page_table, kv_lens, cu_q_lens, sinks, params)


def _check(q: jax.Array, pool: Pool, params: AttentionParams) -> None:
    dims = pool_dims(pool, params.layout)
    values = pool.values if isinstance(pool, QuantPool) else pool
    if params.layout == "token_major":
        raise NotImplementedError(f"the TPU kernel reads pools with pages of tiles, head_major or paired, got {params.layout}")
    if q.dtype.name not in ("float32", "bfloat16"):
        raise NotImplementedError(f"TPU has no {q.dtype.name} (queries)")
    if values.dtype.name not in ("float32", "bfloat16", "int8", "float8_e4m3fn"):
        raise NotImplementedError(f"the TPU kernel reads no {values.dtype.name} pools")
    if dims.page_size % 16:
        raise NotImplementedError(f"page size must be a multiple of 16, got {dims.page_size}")
    if isinstance(pool, QuantPool) and dims.page_size % 128 and 128 % dims.page_size:
        raise NotImplementedError(f"scales of pages of {dims.page_size} tokens do not tile 128 lanes")
    if dims.kv_heads > 128:
        raise NotImplementedError(f"more than 128 KV heads: {dims.kv_heads}")
