"""Attention of long chunks of queries on Hopper: the entry, its limits, and the way in and out of the packed order of rows."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from ...layout import Pool, QuantPool, from_storage, logical_dtype, pool_dims
from ..params import AttentionParams
from .plan import PREFILL_ROWS
from .prefill_jobs import make_jobs
from .prefill_kernel import prefill_kernel
from .prefill_shape import CONSUMERS, TILE, PrefillShape
from .prefill_tuning import PrefillBlocks, blocks_for


def prefill_attention(
    q: jax.Array,
    pool: Pool,
    page_table: jax.Array,
    kv_lens: jax.Array,
    cu_q_lens: jax.Array,
    plan_tiles: jax.Array,
    *,
    params: AttentionParams,
    blocks: PrefillBlocks | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """Arguments as in `api.ragged_paged_attention`; plan_tiles: [n, 4] int32, (sequence, first row of q, rows <= 128, _),
    rows 0 for nothing to do. blocks: instead of the tuned ones. interpret: InterpretGPUParams to run on CPU.

    Returns out [T, Hq, D] in q's dtype and lse [T, Hq] float32 (natural log), defined only in rows of the tiles. Keys and
    values are multiplied with queries and weights in q's dtype and summed in float32, as FlashAttention-3 (Shah et al., 2024)
    does. NotImplementedError: what the kernel cannot serve.
    """
    tokens, heads, head_dim = q.shape
    shape = _shape(q, pool, params, blocks, bool(interpret))
    if plan_tiles.shape[0] == 0:
        return jnp.zeros_like(q), jnp.full((tokens, heads), -jnp.inf, jnp.float32)
    jobs = make_jobs(plan_tiles, kv_lens, cu_q_lens, tokens, CONSUMERS * shape.tokens, params.window)
    values, *scales = map(from_storage, jax.tree.leaves(pool))
    pages = [values.reshape(-1, *values.shape[3:]), *scales]
    out, lse = prefill_kernel(shape, q[jobs.source], pages, page_table, jobs.total, jobs.fields, interpret)
    lse = lse.reshape(-1, shape.groups, CONSUMERS, shape.pack, shape.tokens)
    lse = lse[jobs.job, :, jobs.at // shape.tokens, :, jobs.at % shape.tokens]  # [T, Hq / pack, pack]
    return out[jobs.packed], lse.reshape(tokens, heads)


def _shape(
    q: jax.Array, pool: Pool, params: AttentionParams, blocks: PrefillBlocks | None, interpret: bool
) -> PrefillShape:
    """NotImplementedError with the reason if the kernel cannot serve the call."""
    quantised = isinstance(pool, QuantPool)
    if params.layout != "head_major":
        raise NotImplementedError(f"layout={params.layout!r}: a page of one KV head must be contiguous (head_major)")
    if params.mass is not None:
        raise NotImplementedError(f"mass={params.mass!r}: the weights are not kept")
    if not params.scale > 0:
        raise NotImplementedError(f"scale={params.scale}: the running maximum needs a positive one")
    dims, dtype = pool_dims(pool, params.layout), logical_dtype(jax.tree.leaves(pool)[0].dtype)
    if q.dtype not in ("bfloat16", "float16") or not (quantised or q.dtype == dtype):
        raise NotImplementedError(f"q {q.dtype} and pool {dtype}: both must be bfloat16 or both float16 (wgmma has no exact "
                                  "float32), or the pool quantised")
    if quantised and (dims.page_size % 16 or dims.head_dim > 128):
        raise NotImplementedError(f"quantised pool with page_size={dims.page_size}, head_dim={dims.head_dim}: page_size must "
                                  "be a multiple of 16 (scales come in copies of 128 bytes), head_dim at most 128 "
                                  "(registers and shared memory beside the widener)")
    if blocks is None:
        blocks = blocks_for(dims.head_dim, dtype.name)
        blocks = blocks._replace(ctas=2) if interpret else blocks  # interpreted one after the other
    assert blocks.stages > 1, "the consumers would wait for each other"
    sizes = sorted((dims.page_size, blocks.keys))
    if dims.page_size % 8 or sizes[1] % sizes[0]:
        raise NotImplementedError(f"page_size={dims.page_size}: must be a multiple of 8 that divides, or is a multiple of, "
                                  f"{blocks.keys}")
    groups = q.shape[1] // dims.kv_heads
    pack = next(n for n in (8, 4, 2, 1) if groups % n == 0)
    assert PREFILL_ROWS % (CONSUMERS * TILE // pack) == 0
    columns = next((n for n in (64, 32, 16) if dims.head_dim % n == 0), None)
    if columns is None:
        raise NotImplementedError(f"head_dim={dims.head_dim}: must be a multiple of 16")
    return PrefillShape(q.shape[1], dims.kv_heads, dims.head_dim, dims.page_size, pack, columns, params.scale,
                        params.window, params.soft_cap, blocks, quantised, interpret)
