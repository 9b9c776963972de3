"""`ragged_paged_attention` for TPU: packing, one kernel call per tile height, unpacking."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ...layout import Pool, PoolDims, QuantPool, pool_dims
from ..params import AttentionParams
from .blocks import LANES, BlockShape
from .kernel import Static, attend
from .mass import attention_mass
from .packing import Packing, Tiles, pack, tile_list

SUBLANES = 16  # rows of a 16-bit tile, at multiples of which packed sequences start
MAX_ROWS = 256  # of a tile's matrix
TILE_ELEMENTS = 8 * 256 * 128  # of a tile's queries over all KV heads: 1 MiB in float32 for each buffer of that size
BLOCK_BYTES = 2 << 20  # of a block of KV; two are in VMEM
TALL_KEYS, LOW_KEYS = 256, 512  # of a block, for tiles of many rows (scores take room too) and of few
MAX_PAGE_BYTES = 4 << 20
SMEM_WORDS = 192 << 10  # of page table and tile list, out of 1 MiB


def run(
    q: jax.Array, pool: Pool, page_table: jax.Array, kv_lens: jax.Array, cu_q_lens: jax.Array, sinks: jax.Array | None,
    params: AttentionParams,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """See `ragged_paged_attention`.

    Sequences with few queries, mostly decodes, go through low tiles; the others through tall ones before that, because a
    tall tile also writes the rows behind its sequence.
    """
    dims = pool_dims(pool, params.layout)
    tokens, q_heads, head_dim = q.shape
    seqs, columns = page_table.shape
    values, scales = pool if isinstance(pool, QuantPool) else (pool, None)
    width = values.shape[-1]
    group = _power_of_two(q_heads // dims.kv_heads)
    low = max(1, SUBLANES // group)
    tall = _tall(dims.kv_heads * _lanes(width), group, low, tokens, params.max_q_len)
    packing = pack(cu_q_lens, tokens, low, tall)
    table = jnp.clip(page_table, 0, dims.num_pages - 1).reshape(-1)
    queries = _pack_queries(q, packing.source, dims.kv_heads, group, width)
    product = jnp.dtype(jnp.float32) if q.dtype == jnp.float32 else jnp.dtype(jnp.bfloat16)

    def tiles_of(chosen: jax.Array, height: int, most: int) -> Tiles:
        tiles = tile_list(packing, kv_lens, chosen, height=height, most=max(1, most), window=params.window,
                          context=columns * dims.page_size)
        _check_smem(tiles, table)
        return tiles

    def static_of(height: int) -> Static:
        block = _block_shape(dims, columns, values, LOW_KEYS if height == low else TALL_KEYS)
        return Static(height * group, group, block, params.scale, params.window, params.soft_cap, product)

    def call(chosen: jax.Array, height: int, most_seqs: int, prior: tuple[jax.Array, jax.Array] | None):
        tiles = tiles_of(chosen, height, most_seqs + (tokens - most_seqs) // height)
        return attend(tiles, table, queries, values, scales, prior, static_of(height), q.dtype)

    if tall == low:
        out, lse = call(packing.q_lens > 0, low, min(seqs, tokens), None)
    else:
        parts = call(packing.q_lens > low, tall, min(seqs, tokens // (low + 1)), None)
        out, lse = call(packing.q_lens <= low, low, min(seqs, tokens), parts)
    out, lse = _unpack(out[..., width - head_dim :], lse, packing, dims.kv_heads, group)
    mine = q_heads // dims.kv_heads
    if sinks is not None:
        out, lse = _with_sinks(out, lse, sinks.reshape(dims.kv_heads, mine))
    mass = None
    if params.mass is not None:
        sequences = tiles_of(packing.q_lens > 0, 1 << (tokens - 1).bit_length(), min(seqs, tokens))
        by_token = attention_mass(sequences, table, queries, _pack_lse(lse, packing.source, group), values, scales,
                                  static_of(tall), seqs, mine)[:, :, : columns * dims.page_size]
        mass = by_token if params.mass == "token" else by_token.reshape(seqs, dims.kv_heads, columns, -1).sum(axis=3)
    real = packing.real[:, None]
    out = jnp.where(real[:, :, None], out[:, :, :mine].reshape(q.shape), 0).astype(q.dtype)
    return out, jnp.where(real, lse[:, :, :mine].reshape(tokens, q_heads), -jnp.inf), mass


def _tall(lanes: int, group: int, low: int, tokens: int, max_q_len: int | None) -> int:
    """Rows of a tall tile, a power of two times `low`; `low` if no sequence needs more. lanes: of a row of all KV heads."""
    longest = min(tokens, max_q_len or tokens)
    height = low
    while height < longest and 2 * height * group <= MAX_ROWS and (
            2 * height * group * lanes <= TILE_ELEMENTS):
        height *= 2
    return height


def _block_shape(dims: PoolDims, columns: int, values: jax.Array, most_keys: int) -> BlockShape:
    _, parts, _, _, width = values.shape
    row_bytes = parts * dims.kv_heads * _lanes(width) * values.dtype.itemsize
    if dims.page_size * row_bytes > MAX_PAGE_BYTES:
        raise NotImplementedError(f"a page of {dims} takes {dims.page_size * row_bytes} bytes of VMEM, of which it may have "
                                  f"{MAX_PAGE_BYTES}")
    keys = min(most_keys, BLOCK_BYTES // row_bytes)
    return BlockShape(max(1, keys // dims.page_size), columns, dims.page_size, dims.kv_heads, width)


def _check_smem(tiles: Tiles, table: jax.Array) -> None:
    words = table.size + sum(x.size for x in tiles)
    if words > SMEM_WORDS:
        raise NotImplementedError(f"a page table of {table.size} entries and its tiles are {words} words, more than the "
                                  f"{SMEM_WORDS} that fit scalar memory")


def _pack_queries(q: jax.Array, source: jax.Array, kv_heads: int, group: int, width: int) -> jax.Array:
    """[T, Hq, D] -> [Hkv, R * group, width]; query heads are padded to `group` for each KV head, D to `width`."""
    tokens, q_heads, head_dim = q.shape
    q = q.reshape(tokens, kv_heads, q_heads // kv_heads, head_dim)
    q = jnp.pad(q, ((0, 0), (0, 0), (0, group - q.shape[2]), (0, width - head_dim)))
    return q[source].transpose(1, 0, 2, 3).reshape(kv_heads, -1, width)


def _unpack(
    out: jax.Array, lse: jax.Array, packing: Packing, kv_heads: int, group: int
) -> tuple[jax.Array, jax.Array]:
    """[Hkv, R * group, D] and [R * group, 128] -> [T, Hkv, group, D] and [T, Hkv, group]."""
    out = out.reshape(kv_heads, -1, group, out.shape[-1]).transpose(1, 0, 2, 3)
    lse = lse[:, :kv_heads].reshape(-1, group, kv_heads).swapaxes(1, 2)
    return out[packing.place], lse[packing.place]


def _pack_lse(lse: jax.Array, source: jax.Array, group: int) -> jax.Array:
    """[T, Hkv, group] -> [R * group, 128]."""
    lse = jnp.pad(lse, ((0, 0), (0, LANES - lse.shape[1]), (0, 0)))
    return lse[source].swapaxes(1, 2).reshape(-1, LANES)


def _with_sinks(out: jax.Array, lse: jax.Array, sinks: jax.Array) -> tuple[jax.Array, jax.Array]:
    """out [T, Hkv, group, D] and lse [T, Hkv, group] with sinks [Hkv, at most group] in the denominators.

    A sink shrinks an output by exp(lse - lse with sink): it needs no room in the kernel.
    """
    sinks = jnp.pad(sinks.astype(jnp.float32), ((0, 0), (0, lse.shape[2] - sinks.shape[1])))
    with_sink = jnp.logaddexp(lse, jnp.broadcast_to(sinks[None], lse.shape))
    return out.astype(jnp.float32) * jnp.exp(lse - with_sink)[..., None], with_sink


def _power_of_two(n: int) -> int:
    """The smallest one that is at least n."""
    return 1 << (n - 1).bit_length()


def _lanes(width: int) -> int:
    """What a row takes in VMEM."""
    return -(-width // LANES) * LANES
