"""What a pool of KV pages looks like in memory: the only file that knows.

One pool = the pages of one layer, keys and values together, as one jax.Array, or as a `QuantPool` when they are quantised.
Lower tiers, copies between machines and tests use the *canonical* page [2, ps, Hkv, C] (keys, values): C = D numbers in the
logical dtype, or for quantised KV C = D + 4 bytes (int8), a row's values and then its float32 scale, so that such a page
moves as it is stored. `to_canonical` and `from_canonical` translate. Owns no memory and no page numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.layout import Format, Layout
from jax.sharding import Sharding
from jax.typing import DTypeLike

LAYOUTS = ("token_major", "head_major", "paired")
KV_DTYPES = ("float32", "bfloat16", "float16")
QUANT_DTYPES = ("int8", "float8_e4m3fn")
SCALE_BYTES = 4
TPU_LANES, TPU_SUBLANES = 128, 8  # of the tiles that TPU memory is made of

_BITS = {"bfloat16": jnp.dtype(jnp.uint16), "float8_e4m3fn": jnp.dtype(jnp.uint8)}  # how CPU stores them
# axes of the page (after the page number) in canonical order (kv, ps, Hkv, D)
_PAGE_AXES = {"token_major": (1, 0, 2, 3), "head_major": (0, 2, 1, 3), "paired": (0, 2, 1, 3)}


class QuantPool(NamedTuple):
    """Quantised keys and values: `values` as `pool_shape` says, in one of `QUANT_DTYPES` (uint8 bits of float8 on CPU), and
    `scales` float32 in the same shape without D (of a paired pool as of a head_major one). A row stands for values * scale."""

    values: jax.Array
    scales: jax.Array


Pool = jax.Array | QuantPool


class PoolDims(NamedTuple):
    """Dimensions read off a pool."""

    num_pages: int
    page_size: int
    kv_heads: int
    head_dim: int


def resolve_layout(layout: str, head_dim: int, platform: str) -> str:
    """The layout that "auto" stands for. head_major: a page of one head is one tile [ps, D], which is what gathers on CPU,
    TMA on GPU and DMA on TPU like best; paired on TPU where a key and a value fit one row of a tile, which would be padded
    otherwise. Other names are checked and returned."""
    if layout == "auto":
        return "paired" if platform == "tpu" and 2 * head_dim <= TPU_LANES else "head_major"
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
    if jnp.dtype(dtype).name not in QUANT_DTYPES:
        return values
    return QuantPool(values, jnp.zeros(_scales_shape(shape, layout), jnp.float32))


def pool_format(ndim: int, sharding: Sharding, platform: str) -> Format | Sharding:
    """Where an array of a pool lies and, on TPU, in which order: row by row, as the kernels address it, its last axis padded
    to whole tiles. XLA would make pages the last axis of rows that are no multiple of 128 lanes (head_dim 64, scales), which
    pads nothing, and copy the whole pool around every kernel."""
    return Format(Layout(tuple(range(ndim))), sharding) if platform == "tpu" else sharding


def pool_page_bytes(layout: str, page_size: int, kv_heads: int, head_dim: int, dtype: DTypeLike, platform: str) -> int:
    """Bytes that one page of one layer with these heads takes in the memory of a device, padding of TPU tiles included."""
    page = jax.eval_shape(lambda: zero_pool(layout, 1, page_size, kv_heads, head_dim, dtype, platform))
    return sum(_device_bytes(x.shape, x.dtype, platform) for x in jax.tree.leaves(page))


def _device_bytes(shape: tuple[int, ...], dtype: jnp.dtype, platform: str) -> int:
    """On TPU a tile is 128 lanes wide and a power of two rows high: what the rows need, at least 32 bits, at most eight."""
    *lead, rows, lanes = shape
    if platform == "tpu":
        tile = min(TPU_SUBLANES, max(4 // dtype.itemsize, 1 << (rows - 1).bit_length()))
        rows, lanes = -(-rows // tile) * tile, -(-lanes // TPU_LANES) * TPU_LANES
    return math.prod(lead) * rows * lanes * dtype.itemsize


def pool_shape(layout: str, num_pages: int, page_size: int, kv_heads: int, head_dim: int) -> tuple[int, ...]:
    """Shape of one layer's pool: token_major [N, ps, 2, Hkv, D], head_major [N, 2, Hkv, ps, D], paired [N, 1, Hkv, ps, 2 * D],
    a token's key and then its value."""
    if min(num_pages, page_size, kv_heads, head_dim) < 1:
        raise ValueError(f"pool dimensions must be positive, got {num_pages=} {page_size=} {kv_heads=} {head_dim=}")
    axes = _axes(layout)
    page = (1, page_size, kv_heads, 2 * head_dim) if layout == "paired" else (2, page_size, kv_heads, head_dim)
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
        if pool.scales.shape != (want := _scales_shape(values.shape, layout)) or pool.scales.dtype != "float32":
            raise ValueError(f"scales must be float32 {want}, got {pool.scales.dtype} {pool.scales.shape}")
    parts, width = (1, 2) if layout == "paired" else (2, 1)
    if values.ndim != 5 or values.shape[1 + axes[0]] != parts or values.shape[-1] % width:
        raise ValueError(f"a {layout} pool has 5 axes with {parts} (keys, values) at axis {1 + axes[0]} and rows of a multiple "
                         f"of {width}, got {values.shape}")
    if logical_dtype(values.dtype).name not in known:
        raise ValueError(f"pool dtype must be one of {known} (or their bits), got {values.dtype}")
    _, page_size, kv_heads, row = (values.shape[1 + a] for a in axes)
    return PoolDims(values.shape[0], page_size, kv_heads, row // width)


def to_canonical(pages: Pool, layout: str) -> jax.Array:
    """[n, <pool page>] as stored -> [n, 2, ps, Hkv, C]."""
    if layout == "paired":
        pages = _on_values(lambda x: jnp.concatenate(jnp.split(x, 2, axis=-1), axis=1), pages)
    if isinstance(pages, QuantPool):
        values, scales = (jax.lax.bitcast_convert_type(x, jnp.int8) for x in pages)
        pages = jnp.concatenate([values, scales], axis=-1)
    return from_storage(pages).transpose(0, *(1 + a for a in _axes(layout)))


def from_canonical(pages: jax.Array, layout: str, like: Pool) -> Pool:
    """[n, 2, ps, Hkv, C] -> [n, <pool page>] as the pool `like` is stored."""
    axes = _axes(layout)
    pages = pages.transpose(0, *(1 + axes.index(i) for i in range(4)))
    if isinstance(like, QuantPool):
        values, scales = pages[..., :-SCALE_BYTES], pages[..., -SCALE_BYTES:]
        stored: Pool = QuantPool(jax.lax.bitcast_convert_type(values, like.values.dtype),
                                 jax.lax.bitcast_convert_type(scales, jnp.float32))
    else:
        stored = as_storage(pages, like.dtype)
    return _on_values(pair, stored) if layout == "paired" else stored


def pair(x: jax.Array) -> jax.Array:
    """Keys and then values along axis 1 of x [n, 2 * m, ..., D], put side by side: [n, m, ..., 2 * D]."""
    return jnp.concatenate(jnp.split(x, 2, axis=1), axis=-1)


def take_heads(pool: Pool, pages: jax.Array, layout: str) -> tuple[jax.Array, jax.Array]:
    """Keys and values of pages [W, n] (all within the pool) as two [W, Hkv, n * ps, D] in the logical dtype, quantised
    ones as float32.

    One gather each, of the rows that lie together in memory, straight into head-major order: no transposed copy.
    """
    dims = pool_dims(pool, layout)
    head = jnp.arange(dims.kv_heads, dtype=jnp.int32)
    if layout != "token_major":
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

    values = pool.values if isinstance(pool, QuantPool) else pool
    if layout == "paired":
        pairs = pages[:, None, :] * dims.kv_heads + head[None, :, None]
        keys_values = jnp.split(take(values, 2 * dims.head_dim, pairs), 2, axis=-1)
    else:
        keys_values = [take(values, dims.head_dim, i) for i in (index, index + dims.kv_heads)]
    if isinstance(pool, QuantPool):
        keys_values = [x.astype(jnp.float32) * take(pool.scales, 1, i)
                       for x, i in zip(keys_values, (index, index + dims.kv_heads))]
    return keys_values[0], keys_values[1]


def as_storage(x: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Values cast to the logical dtype of a pool stored as `dtype`, in its storage form."""
    x, dtype = x.astype(logical_dtype(dtype)), jnp.dtype(dtype)
    return x if x.dtype == dtype else jax.lax.bitcast_convert_type(x, dtype)


def from_storage(x: jax.Array) -> jax.Array:
    """Stored values in their logical dtype."""
    dtype = logical_dtype(x.dtype)
    return x if x.dtype == dtype else jax.lax.bitcast_convert_type(x, dtype)


def _on_values(change: Callable[[jax.Array], jax.Array], pool: Pool) -> Pool:
    return pool._replace(values=change(pool.values)) if isinstance(pool, QuantPool) else change(pool)


def _scales_shape(values: tuple[int, ...], layout: str) -> tuple[int, ...]:
    return (values[0], 2, *values[2:-1]) if layout == "paired" else values[:-1]


def _axes(layout: str) -> tuple[int, ...]:
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {LAYOUTS}, got {layout!r}")
    return _PAGE_AXES[layout]
