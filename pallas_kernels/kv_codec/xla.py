"""The codec as XLA reductions and elementwise passes over neighbouring layers of one level."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ..layout import canonical_row
from .quant import dequantize, quantize
from .spec import LEVELS, CodecSpec, encoded_shape


def encode_pages(spec: CodecSpec, pages: jax.Array) -> jax.Array:
    """See `api.encode_pages`."""
    x = pages.transpose(0, 4, 1, 2, 3, 5)  # [n, Hkv, L, 2, ps, C]
    return jnp.concatenate([_encode(level, x[:, :, layers]) for level, layers in spec.runs()], axis=-1)


def decode_pages(spec: CodecSpec, encoded: jax.Array, page_shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """See `api.decode_pages`."""
    parts, at = [], 0
    for level, layers in spec.runs():
        count = layers.stop - layers.start
        size = encoded_shape(CodecSpec((level,) * count), (count, *page_shape[1:]), dtype)[1]
        data = encoded[..., at : at + size].reshape(*encoded.shape[:2], count, -1)
        parts.append(_decode(level, data, page_shape[2], page_shape[4], dtype))
        at += size
    return jnp.concatenate(parts, axis=2).transpose(0, 2, 3, 4, 1, 5)


def _encode(level: str, x: jax.Array) -> jax.Array:
    """[n, Hkv, l, 2, ps, C] -> [n, Hkv, bytes of l layers]"""
    if level == "exact":
        return _bytes(x, 2)
    keys, *key_ends = quantize(x[:, :, :, 0], -2, LEVELS[level])
    values, *value_ends = quantize(x[:, :, :, 1], -1, LEVELS[level])
    numbers = [keys | values << 4] if level == "int4" else [keys, values]
    layers = jnp.concatenate([_bytes(part, 3) for part in (*numbers, *key_ends, *value_ends)], axis=-1)
    return layers.reshape(*x.shape[:2], -1)


def _decode(level: str, data: jax.Array, tokens: int, width: int, dtype: jnp.dtype) -> jax.Array:
    """[n, Hkv, l, bytes of a layer] -> [n, Hkv, l, 2, ps, C]"""
    lead, count, dtype = data.shape[:3], tokens * width, canonical_row(dtype, width)[1]
    if level == "exact":
        return _numbers(data, dtype).reshape(*lead, 2, tokens, width)
    if level == "int4":
        keys, values, ends = data[..., :count] & 15, data[..., :count] >> 4, data[..., count:]
    else:
        keys, values, ends = data[..., :count], data[..., count : 2 * count], data[..., 2 * count :]
    ends = _numbers(ends, dtype)
    of_keys = ends[..., : 2 * width].reshape(*lead, 2, 1, width)
    of_values = ends[..., 2 * width :].reshape(*lead, 2, tokens, 1)
    return jnp.stack([dequantize(x.reshape(*lead, tokens, width), of[:, :, :, 0], of[:, :, :, 1], LEVELS[level])
                      for x, of in ((keys, of_keys), (values, of_values))], axis=3)


def _bytes(x: jax.Array, axes: int) -> jax.Array:
    """Everything after the first `axes` axes as bytes."""
    return jax.lax.bitcast_convert_type(x, jnp.uint8).reshape(*x.shape[:axes], -1)


def _numbers(data: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Bytes along the last axis as numbers."""
    split = data if dtype.itemsize == 1 else data.reshape(*data.shape[:-1], -1, dtype.itemsize)
    return jax.lax.bitcast_convert_type(split, dtype)
