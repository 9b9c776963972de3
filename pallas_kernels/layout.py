"""What a pool of KV pages looks like in memory: the only file that knows.

One pool = the pages of one layer, keys and values together, as one jax.Array, or as a `QuantPool` when they are quantised.
Lower tiers, copies between machines and tests use the *canonical* page [2, ps, Hkv, C] (keys, values): C = D numbers in the
logical dtype, or for quantised KV C = D + 4 bytes (int8), a row's values and then its float32 scale, so that such a page
moves as it is stored. `to_canonical` and `from_canonical` translate. Owns no memory and no page numbers.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.layout import Format, Layout
from jax.sharding import Sharding
from jax.typing import DTypeLike

LAYOUTS = ("token_major", "head_major")
KV_DTYPES = ("float32", "bfloat16", "float16")
QUANT_DTYPES = ("int8", "float8_e4m3fn")
SCALE_BYTES = 4
TPU_LANES, TPU_SUBLANES = 128, 8  # of the tiles that TPU memory is made of

_BITS = {"bfloat16": jnp.dtype(jnp.uint16), "float8_e4m3fn": jnp.dtype(jnp.uint8)}  # how CPU stores them
# axes of the page (after the page number) in canonical order (kv, ps, Hkv, D)
_PAGE_AXES = {"token_major": (1, 0, 2, 3), "head_major": (0, 2, 1, 3)}


class QuantPool(NamedTuple):
    """Quantised keys and values: `values` as `pool_shape` says, in one of `QUANT_DTYPES` (uint8 bits of float8 on CPU), and
    `scales` float32 in the same shape without D. A row stands for values * scale."""

    values: jax.Array
    scales: jax.Array


Pool = jax.Array | QuantPool


class PoolDims(NamedTuple):
    """Dimensions read off a pool."""

    num_pages: int
    page_size: int
    kv_heads: int
    head_dim: int


def resolve_layout(layout: str) -> str:
    """The layout that "auto" stands for, head_major: a page of one head is one tile [ps, D], which is what gathers on CPU,
    TMA on GPU and DMA on TPU like best. Other names are checked and returned."""
    if layout == "auto":
        return "head_major"
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {('auto', *LAYOUTS)}, got {layout!r}")
    return layout


def storage_dtype(dtype: DTypeLike, platform: str) -> jnp.dtype:
    """The dtype a pool is stored in. bfloat16 and float8 on CPU are held as their bits: XLA:CPU promotes such a scatter to
    float32 and copies the whole pool, while integers are written in place."""
    dtype = jnp.dtype(dtype)
    if dtype.name not in KV_DTYPES + QUANT_DTYPES:
        raise ValueError(f"KV dtype must be one of {KV_DTYPES + QUANT_DTYPES}, got {dtype.name}")
    return jnp.dtype(_BITS.get(dtype.name, dtype)) if platform == "cpu" else dtype


def logical_dtype(dtype: DTypeLike) -> jnp.dtype:
    """The inverse of `storage_dtype`."""
    dtype = jnp.dtype(dtype)
    return next((jnp.dtype(name) for name, bits in _BITS.items() if dtype == bits), dtype)


def canonical_row(dtype: DTypeLike, head_dim: int) -> tuple[int, jnp.dtype]:
    """C and dtype of a canonical row of KV in the logical dtype `dtype`."""
    dtype = jnp.dtype(dtype)
    return (head_dim + SCALE_BYTES, jnp.dtype(jnp.int8)) if dtype.name in QUANT_DTYPES else (head_dim, dtype)


def zero_pool(
    layout: str, num_pages: int, page_size: int, kv_heads: int, head_dim: int, dtype: DTypeLike, platform: str
) -> Pool:
    """An empty pool for KV in the logical dtype `dtype`."""
    shape = pool_shape(layout, num_pages, page_size, kv_heads, head_dim)
    values = jnp.zeros(shape, storage_dtype(dtype, platform))
    return QuantPool(values, jnp.zeros(shape[:-1], jnp.float32)) if jnp.dtype(dtype).name in QUANT_DTYPES else values


def pool_format(ndim: int, sharding: Sharding, platform: str) -> Format | Sharding:
    """Where an array of a pool lies and, on TPU, in which order: row by row, as the kernels address it, its last axis padded
    to whole tiles. XLA would make pages the last axis of rows that are no multiple of 128 lanes (head_dim 64, scales), which
    pads nothing, and copy the whole pool around every kernel."""
    return Format(Layout(tuple(range(ndim))), sharding) if platform == "tpu" else sharding


def pool_page_bytes(
    layout: str, page_size: int, kv_heads: int, head_dim: int, dtype: DTypeLike, platform: str
) -> int:
    """What one page of one layer with these heads takes in the memory of a device, padding of TPU tiles included."""
    page = jax.eval_shape(lambda: zero_pool(layout, 1, page_size, kv_heads, head_dim, dtype, platform))
    return sum(_device_bytes(x.shape, x.dtype, platform) for x in jax.tree.leaves(page))


def _device_bytes(shape: tuple[int, ...], dtype: jnp.dtype, platform: str) -> int:
    """On TPU tiles are as many sublanes high as they need be, a power of two, but at least 32 bits and at most eight rows."""
    *lead, rows, lanes = shape
    if platform == "tpu":
        tile = min(TPU_SUBLANES, max(4 // dtype.itemsize, 1 << (rows - 1).bit_length()))
        rows, lanes = -(-rows // tile) * tile, -(-lanes // TPU_LANES) * TPU_LANES
    return math.prod(lead) * rows * lanes * dtype.itemsize


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


def pool_dims(pool: Pool, layout: str) -> PoolDims:
    """Dimensions of a pool; ValueError with its shape if it is not one."""
    axes = _axes(layout)
    values = pool.values if isinstance(pool, QuantPool) else pool
    known: tuple[str, ...] = KV_DTYPES
    if isinstance(pool, QuantPool):
        known = QUANT_DTYPES
        if pool.scales.shape != values.shape[:-1] or pool.scales.dtype != "float32":
            raise ValueError(f"scales must be float32 {values.shape[:-1]}, got {pool.scales.dtype} {pool.scales.shape}")
    if values.ndim != 5 or values.shape[1 + axes[0]] != 2:
        raise ValueError(f"a {layout} pool has 5 axes with 2 (keys, values) at axis {1 + axes[0]}, got {values.shape}")
    if logical_dtype(values.dtype).name not in known:
        raise ValueError(f"pool dtype must be one of {known} (or their bits), got {values.dtype}")
    return PoolDims(values.shape[0], *(values.shape[1 + a] for a in axes[1:]))


def to_canonical(pages: Pool, layout: str) -> jax.Array:
    """[n, <pool page>] as stored -> [n, 2, ps, Hkv, C]."""
    if isinstance(pages, QuantPool):
        values, scales = (jax.lax.bitcast_convert_type(x, jnp.int8) for x in pages)
        pages = jnp.concatenate([values, scales], axis=-1)
    return from_storage(pages).transpose(0, *(1 + a for a in _axes(layout)))


def from_canonical(pages: jax.Array, layout: str, like: Pool) -> Pool:
    """[n, 2, ps, Hkv, C] -> [n, <pool page>] as the pool `like` is stored."""
    axes = _axes(layout)
    pages = pages.transpose(0, *(1 + axes.index(i) for i in range(4)))
    if not isinstance(like, QuantPool):
        return as_storage(pages, like.dtype)
    values, scales = pages[..., :-SCALE_BYTES], pages[..., -SCALE_BYTES:]
    return QuantPool(jax.lax.bitcast_convert_type(values, like.values.dtype),
                     jax.lax.bitcast_convert_type(scales, jnp.float32))


def take_heads(pool: Pool, pages: jax.Array, layout: str) -> tuple[jax.Array, jax.Array]:
    """Keys and values of pages [W, n] (all within the pool) as two [W, Hkv, n * ps, D] in the logical dtype, quantised
    ones as float32.

    One gather each, of the rows that lie together in memory, straight into head-major order: no transposed copy.
    """
    dims = pool_dims(pool, layout)
    head = jnp.arange(dims.kv_heads, dtype=jnp.int32)
    if layout == "head_major":
        together = dims.page_size
        index = pages[:, None, :] * (2 * dims.kv_heads) + head[None, :, None]  # [W, Hkv, n]
    else:
        together = 1
        token = pages[:, :, None] * dims.page_size + jnp.arange(dims.page_size, dtype=jnp.int32)[None, None, :]
        index = (token * (2 * dims.kv_heads))[:, None] + head[None, :, None, None]  # [W, Hkv, n, ps]
    shape = (pages.shape[0], dims.kv_heads, pages.shape[1] * dims.page_size)

    def take(x: jax.Array, width: int, index: jax.Array) -> jax.Array:
        rows = x.reshape(-1, together * width).at[index].get(mode="promise_in_bounds")
        return from_storage(rows).reshape(*shape, width)

    def both(index: jax.Array) -> jax.Array:
        if isinstance(pool, QuantPool):
            return take(pool.values, dims.head_dim, index).astype(jnp.float32) * take(pool.scales, 1, index)
        return take(pool, dims.head_dim, index)

    return both(index), both(index + dims.kv_heads)


def as_storage(x: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Values cast to the logical dtype of a pool stored as `dtype`, in its storage form."""
    x, dtype = x.astype(logical_dtype(dtype)), jnp.dtype(dtype)
    return x if x.dtype == dtype else jax.lax.bitcast_convert_type(x, dtype)


def from_storage(x: jax.Array) -> jax.Array:
    """Stored values in their logical dtype."""
    dtype = logical_dtype(x.dtype)
    return x if x.dtype == dtype else jax.lax.bitcast_convert_type(x, dtype)


def _axes(layout: str) -> tuple[int, ...]:
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {LAYOUTS}, got {layout!r}")
    return _PAGE_AXES[layout]
