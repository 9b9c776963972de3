"""One attention call on Hopper: short sequences to the decode kernel and its merge, longer ones to the prefill kernel.

Refused, so that another implementation serves the call: GPUs other than Hopper's, float32 (wgmma would round to TF32),
token-major pools, page sizes that are not a multiple of 8, head dimensions without a tuning entry, for quantised KV pages that
are not a multiple of 16 tokens, and chunks that the prefill kernel refuses (of quantised KV those with head_dim 256).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from ...compiler import refuse_other_gpus
from ...layout import Pool, QuantPool, from_storage, logical_dtype, pool_dims
from ..params import AttentionParams
from ..tuning import CHIPS, Chip, decode_tuning
from .decode import decode_partials
from .mass import token_mass
from .merge import merge_partials
from .plan import TILE_ROWS, Plan, PlanSpec, device_plan, plan_spec, unpack
from .prefill import prefill_attention
from .shape import LOG2E, DecodeShape


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
    chip: Chip = CHIPS["h100"],
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """See `api.ragged_paged_attention`. plan: of `plan.make_plan` for this batch, window and `plan_spec`, or None to make one
    in the jit. interpret: InterpretGPUParams to run on CPU. NotImplementedError: what the kernels cannot serve."""
    spec, shape = _shape(q, pool, page_table, params, chip, interpret)
    if plan is None or not plan.size:
        made = device_plan(spec, cu_q_lens, kv_lens, params.window)
    else:
        made = unpack(plan, spec)
    pool = jax.tree.map(from_storage, pool)
    out, lse = _decode(shape, made, q, pool, page_table)
    if spec.prefill:
        chunk = prefill_attention(q, pool, page_table, kv_lens, cu_q_lens, made.prefill, params=params._replace(mass=None),
                                  interpret=interpret)
        short = (made.token_slot >= 0)[:, None]
        out = jnp.where(short[..., None], out, chunk[0].astype(jnp.float32))
        lse = jnp.where(short, lse, chunk[1])
    real = (jnp.arange(q.shape[0], dtype=jnp.int32) < cu_q_lens[-1])[:, None]
    if sinks is not None:
        sink = jnp.broadcast_to(sinks.astype(jnp.float32)[None], lse.shape)
        total = jnp.logaddexp(lse, sink)
        out, lse = out * jnp.exp(lse - total)[..., None], total
    out, lse = jnp.where(real[..., None], out, 0.0).astype(q.dtype), jnp.where(real, lse, -jnp.inf)
    mass = None
    if params.mass is not None:
        mass = token_mass(shape, q, pool, page_table, kv_lens, cu_q_lens, lse)
        if params.mass == "page":
            mass = mass.reshape(*mass.shape[:2], page_table.shape[1], shape.page_size).sum(axis=3)
    return out, lse, mass


def _shape(
    q: jax.Array, pool: Pool, page_table: jax.Array, params: AttentionParams, chip: Chip, interpret: Any
) -> tuple[PlanSpec, DecodeShape]:
    """What the kernels are compiled for; NotImplementedError with the reason if they cannot be."""
    if not interpret:
        refuse_other_gpus()
    if params.layout != "head_major":
        raise NotImplementedError(f"pool layout {params.layout}: a page of one KV head must lie together (head_major)")
    quantised = isinstance(pool, QuantPool)
    dims, dtype = pool_dims(pool, params.layout), logical_dtype(jax.tree.leaves(pool)[0].dtype)
    if q.dtype not in ("bfloat16", "float16") or not (quantised or q.dtype == dtype):
        raise NotImplementedError(f"queries {q.dtype} with a pool of {dtype}: both must be bfloat16 or both float16, or the "
                                  "pool quantised")
    if quantised and dims.page_size % 16:
        raise NotImplementedError(f"quantised pool with page_size {dims.page_size}: must be a multiple of 16 (scales come in "
                                  "copies of 128 bytes)")
    tuning = decode_tuning(chip, dims.head_dim, dims.page_size, dtype.name)
    small, large = sorted((dims.page_size, tuning.block_keys))
    if dims.page_size % 8 or large % small:
        raise NotImplementedError(f"page_size {dims.page_size}: must be a multiple of 8 that divides {tuning.block_keys} keys, "
                                  "or is a multiple of it")
    spec = plan_spec(q.shape[0], page_table.shape[0], q_heads=q.shape[1], kv_heads=dims.kv_heads, head_dim=dims.head_dim,
                     page_size=dims.page_size, kv_dtype=dtype.name, max_q_len=params.max_q_len, chip=chip)
    return spec, DecodeShape(spec, dims.kv_heads, dims.head_dim, dims.page_size, tuning.block_keys, tuning.stages,
                             tuning.width, params.scale, params.window, params.soft_cap, q.dtype.name, dtype.name, interpret)


def _decode(
    shape: DecodeShape, plan: Plan, q: jax.Array, pool: Pool, page_table: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Output float32 [T, Hq, D] and natural log-sum-exp [T, Hq], without sinks; rows of other sequences undefined."""
    tokens, q_heads, dim = q.shape
    heads, groups = shape.kv_heads, shape.spec.groups
    source = jnp.pad(jnp.maximum(plan.row_token, 0), (0, TILE_ROWS))
    head = jnp.arange(heads, dtype=jnp.int32)[:, None] * groups
    rows = q.reshape(tokens * q_heads, dim)[(source // groups * q_heads + source % groups)[None] + head]  # [Hkv, R + 64, D]
    partial = decode_partials(shape, plan.items, plan.worker_items, page_table, rows, pool)
    merged, lse = merge_partials(shape, plan.items, plan.tiles, *partial)
    slot = jnp.maximum(plan.token_slot, 0)[:, None] + jnp.arange(groups, dtype=jnp.int32)[None]  # [T, G]
    row = plan.tiles[slot // TILE_ROWS, 0] + slot % TILE_ROWS
    out = merged[:, row].transpose(1, 0, 2, 3).reshape(tokens, q_heads, dim)
    return out, lse[:, slot].transpose(1, 0, 2).reshape(tokens, q_heads) / LOG2E
