"""The definition of the codec: one layer of one head of one page, for each of them."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from ..layout import canonical_row
from .quant import dequantize, quantize
from .spec import LEVELS, CodecSpec, encoded_shape


def encode_pages(spec: CodecSpec, pages: jax.Array) -> jax.Array:
    """See `api.encode_pages`."""
    each = lambda level: jax.vmap(jax.vmap(partial(_encode, level), in_axes=2))  # noqa: E731  pages, heads
    return jnp.concatenate([each(level)(pages[:, i]) for i, level in enumerate(spec.levels)], axis=-1)


def decode_pages(spec: CodecSpec, encoded: jax.Array, page_shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """See `api.decode_pages`."""
    layers, at = [], 0
    for level in spec.levels:
        size = encoded_shape(CodecSpec((level,)), (1, *page_shape[1:]), dtype)[1]
        one = partial(_decode, level, tokens=page_shape[2], width=page_shape[4], dtype=dtype)
        layers.append(jax.vmap(jax.vmap(one, out_axes=2))(encoded[..., at : at + size]))
        at += size
    return jnp.stack(layers, axis=1)


def _encode(level: str, x: jax.Array) -> jax.Array:
    """[2, ps, C] -> bytes."""
    if level == "exact":
        return _bytes(x)
    keys, *key_ends = quantize(x[0], 0, LEVELS[level])
    values, *value_ends = quantize(x[1], 1, LEVELS[level])
    numbers = [keys | values << 4] if level == "int4" else [keys, values]
    return jnp.concatenate([_bytes(part) for part in (*numbers, *key_ends, *value_ends)])


def _decode(level: str, data: jax.Array, tokens: int, width: int, dtype: jnp.dtype) -> jax.Array:
    """bytes -> [2, ps, C]"""
    count, dtype = tokens * width, canonical_row(dtype, width)[1]
    if level == "exact":
        return _numbers(data, dtype).reshape(2, tokens, width)
    if level == "int4":
        keys, values, ends = data[:count] & 15, data[:count] >> 4, data[count:]
    else:
        keys, values, ends = data[:count], data[count : 2 * count], data[2 * count :]
    ends = _numbers(ends, dtype)
    of_keys, of_values = ends[: 2 * width].reshape(2, 1, width), ends[2 * width :].reshape(2, tokens, 1)
    return jnp.stack([dequantize(x.reshape(tokens, width), of[0], of[1], LEVELS[level])
                      for x, of in ((keys, of_keys), (values, of_values))])


def _bytes(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, jnp.uint8).reshape(-1)


def _numbers(data: jax.Array, dtype: jnp.dtype) -> jax.Array:
    return jax.lax.bitcast_convert_type(data.reshape(-1, dtype.itemsize) if dtype.itemsize > 1 else data, dtype)
