"""Public page moves: whole pages of all layers of a KV group, out of, into and within the pools."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax

from ..dispatch import dispatch
from ..layout import Pool, QuantPool, canonical_row, logical_dtype, pool_dims
from . import mosaic_gpu, mosaic_tpu, ref, xla

GATHER = {"xla": xla.gather_pages, "ref": ref.gather_pages, "mosaic_gpu": mosaic_gpu.gather_pages,
          "mosaic_tpu": mosaic_tpu.gather_pages}
SCATTER = {"xla": xla.scatter_pages, "ref": ref.scatter_pages, "mosaic_gpu": mosaic_gpu.scatter_pages,
           "mosaic_tpu": mosaic_tpu.scatter_pages}
COPY = {"xla": xla.copy_pages, "ref": ref.copy_pages, "mosaic_tpu": mosaic_tpu.copy_pages}
IMPLEMENTATIONS: dict[str, dict[str, Callable[..., Any]]] = {"gather": GATHER, "scatter": SCATTER, "copy": COPY}

Pools = Sequence[Pool]


def gather_pages(pools: Pools, pages: jax.Array, *, layout: str, impl: str = "auto") -> jax.Array:
    """Copy pages out of L pools: -> [n, L, 2, ps, Hkv, C], the canonical form (see `layout`).

    pages: [n] int32; an entry outside [0, N) gives some finite or stored garbage page (padding).
    """
    _check(pools, layout, pages=pages)
    return dispatch("gather_pages", GATHER, impl, tuple(pools), pages, layout=layout)


def scatter_pages(
    pools: Pools, pages: jax.Array, data: jax.Array, *, layout: str, impl: str = "auto"
) -> tuple[Pool, ...]:
    """The reverse: write canonical `data` [n, L, 2, ps, Hkv, C] to `pages` [n] of each pool; in place when donated.

    A page outside [0, N) is dropped (padding); pages must not repeat.
    """
    dims = _check(pools, layout, pages=pages)
    width, dtype = canonical_row(logical_dtype(jax.tree.leaves(pools[0])[0].dtype), dims.head_dim)
    want = (pages.shape[0], len(pools), 2, dims.page_size, dims.kv_heads, width)
    if data.shape != want or data.dtype != dtype:
        raise ValueError(f"data must be {dtype} {want} for {len(pools)} pools {dims} ({layout}), got {data.dtype} "
                         f"{data.shape}")
    return dispatch("scatter_pages", SCATTER, impl, tuple(pools), pages, data, layout=layout)


def copy_pages(
    pools: Pools,
    src: jax.Array,
    dst: jax.Array,
    *,
    layout: str,
    position_delta: jax.Array | None = None,
    rotate: jax.Array | None = None,
    impl: str = "auto",
) -> tuple[Pool, ...]:
    """Copy page src[i] to page dst[i] within each of L pools; in place when donated. All reads come before all writes.

    src, dst: [n] int32; a dst outside [0, N) is dropped (padding), dst must not repeat. With `position_delta` [n] int32,
    keys are re-rotated as if their tokens stood that many positions later; `rotate` is then the RoPE inverse
    frequencies, [rotary_dim / 2] float32 (rotary_dim <= D leading channels, half-rotation convention of HF Llama).
    Quantised keys cannot be rotated without quantising them again: ValueError.
    """
    dims = _check(pools, layout, src=src, dst=dst)
    if src.shape != dst.shape:
        raise ValueError(f"src and dst must have one shape, got {src.shape} and {dst.shape}")
    if position_delta is not None and isinstance(pools[0], QuantPool):
        raise ValueError("position_delta needs keys that are not quantised")
    if (position_delta is None) != (rotate is None):
        raise ValueError("position_delta and rotate go together: give both or none")
    if position_delta is not None and (position_delta.shape != src.shape or position_delta.dtype != "int32"):
        raise ValueError(f"position_delta must be int32 {src.shape}, got {position_delta.dtype} {position_delta.shape}")
    if rotate is not None and (rotate.ndim != 1 or 2 * rotate.shape[0] > dims.head_dim):
        raise ValueError(f"rotate must be [at most head_dim / 2 = {dims.head_dim // 2}] frequencies, got {rotate.shape}")
    return dispatch("copy_pages", COPY, impl, tuple(pools), src, dst, layout=layout, position_delta=position_delta,
                    rotate=rotate)


def _check(pools: Pools, layout: str, **indices: jax.Array):
    if not pools:
        raise ValueError("pools is empty: give one pool per layer")
    kinds = {tuple((x.shape, str(x.dtype)) for x in jax.tree.leaves(pool)) for pool in pools}
    if len(kinds) > 1:
        raise ValueError(f"pools must be alike, got {sorted(kinds)}")
    for name, index in indices.items():
        if index.ndim != 1 or index.dtype != "int32":
            raise ValueError(f"{name} must be int32 [n], got {index.dtype} {index.shape}")
    return pool_dims(pools[0], layout)
