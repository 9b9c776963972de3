"""What a pool of KV pages looks like in memory: the only file that knows.

One pool = the pages of one layer, keys and values together, as one jax.Array. Lower tiers, copies between machines and
tests use the *canonical* page [2, ps, Hkv, D] (keys, values) in the logical dtype; `to_canonical` and `from_canonical`
translate. Owns no memory and no page numbers.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

LAYOUTS = ("token_major", "head_major")
KV_DTYPES = ("float32", "bfloat16", "float16")

# axes of the page (after the page number) in canonical order (kv, ps, Hkv, D)
_PAGE_AXES = {"token_major": (1, 0, 2, 3), "head_major": (0, 2, 1, 3)}


class PoolDims(NamedTuple):
    """Dimensions read off a pool."""

    num_pages: int
    page_size: int
    kv_heads: int
    head_dim: int


def resolve_layout(layout: str, platform: str) -> str:
    """The layout that "auto" stands for on `platform` ("cpu", "gpu", "tpu"); other names are checked and returned."""
    if layout == "auto":
        return "head_major" if platform == "cpu" else "token_major"
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {('auto', *LAYOUTS)}, got {layout!r}")
    return layout


def storage_dtype(dtype: DTypeLike, platform: str) -> jnp.dtype:
    """The dtype a pool is stored in. bfloat16 on CPU is held as its uint16 bits: XLA:CPU promotes a bfloat16 scatter to
    float32 and copies the whole pool, while integers are written in place."""
    dtype = jnp.dtype(dtype)
    if dtype.name not in KV_DTYPES:
        raise ValueError(f"KV dtype must be one of {KV_DTYPES}, got {dtype.name}")
    return jnp.dtype(jnp.uint16) if platform == "cpu" and dtype == jnp.bfloat16 else dtype


def logical_dtype(dtype: DTypeLike) -> jnp.dtype:
    """The inverse of `storage_dtype`."""
    dtype = jnp.dtype(dtype)
    return jnp.dtype(jnp.bfloat16) if dtype == jnp.uint16 else dtype


def pool_shape(layout: str, num_pages: int, page_size: int, kv_heads: int, head_dim: int) -> tuple[int, ...]:
    """Shape of one layer's pool: token_major [N, ps, 2, Hkv, D], head_major [N, 2, Hkv, ps, D]."""
    if min(num_pages, page_size, kv_heads, head_dim) < 1:
        raise ValueError(f"pool dimensions must be positive, got {num_pages=} {page_size=} {kv_heads=} {head_dim=}")
    page = (2, page_size, kv_heads, head_dim)
    axes = _axes(layout)
    return (num_pages, *(page[axes.index(i)] for i in range(4)))


def kv_head_axis(layout: str) -> int:
    """The pool axis that holds KV heads, which "tp" shards."""
    return 1 + _axes(layout)[2]


def pool_dims(pool: jax.Array, layout: str) -> PoolDims:
    """Dimensions of a pool; ValueError with its shape if it is not one."""
    axes = _axes(layout)
    if pool.ndim != 5 or pool.shape[1 + axes[0]] != 2:
        raise ValueError(f"a {layout} pool has 5 axes with 2 (keys, values) at axis {1 + axes[0]}, got {pool.shape}")
    if logical_dtype(pool.dtype).name not in KV_DTYPES:
        raise ValueError(f"pool dtype must be one of {KV_DTYPES} or uint16 (bfloat16 bits), got {pool.dtype}")
    return PoolDims(pool.shape[0], *(pool.shape[1 + a] for a in axes[1:]))


def to_canonical(pages: jax.Array, layout: str) -> jax.Array:
    """[n, <pool page>] as stored -> [n, 2, ps, Hkv, D] in the logical dtype."""
    return from_storage(pages).transpose(0, *(1 + a for a in _axes(layout)))


def from_canonical(pages: jax.Array, layout: str, dtype: DTypeLike) -> jax.Array:
    """[n, 2, ps, Hkv, D] -> [n, <pool page>] in storage dtype `dtype`."""
    axes = _axes(layout)
    return as_storage(pages.transpose(0, *(1 + axes.index(i) for i in range(4))), dtype)


def take_heads(pool: jax.Array, pages: jax.Array, layout: str) -> tuple[jax.Array, jax.Array]:
    """Keys and values of pages [W, n] (all within the pool) as two [W, Hkv, n * ps, D] in the logical dtype.

    One gather each, of the rows that lie together in memory, straight into head-major order: no transposed copy.
    """
    dims = pool_dims(pool, layout)
    head = jnp.arange(dims.kv_heads, dtype=jnp.int32)
    if layout == "head_major":
        rows = pool.reshape(-1, dims.page_size * dims.head_dim)
        index = pages[:, None, :] * (2 * dims.kv_heads) + head[None, :, None]  # [W, Hkv, n]
    else:
        rows = pool.reshape(-1, dims.head_dim)
        token = pages[:, :, None] * dims.page_size + jnp.arange(dims.page_size, dtype=jnp.int32)[None, None, :]
        index = (token * (2 * dims.kv_heads))[:, None] + head[None, :, None, None]  # [W, Hkv, n, ps]
    shape = (pages.shape[0], dims.kv_heads, pages.shape[1] * dims.page_size, dims.head_dim)
    take = lambda i: from_storage(rows.at[i].get(mode="promise_in_bounds")).reshape(shape)  # noqa: E731
    return take(index), take(index + dims.kv_heads)


def as_storage(x: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Values cast to the logical dtype of a pool stored as `dtype`, in its storage form."""
    x = x.astype(logical_dtype(dtype))
    return jax.lax.bitcast_convert_type(x, jnp.uint16) if jnp.dtype(dtype) == jnp.uint16 else x


def from_storage(x: jax.Array) -> jax.Array:
    """Stored values in their logical dtype."""
    return jax.lax.bitcast_convert_type(x, jnp.bfloat16) if x.dtype == jnp.uint16 else x


def _axes(layout: str) -> tuple[int, ...]:
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {LAYOUTS}, got {layout!r}")
    return _PAGE_AXES[layout]
