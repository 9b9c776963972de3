"""Public KV codec: canonical pages to fewer bytes before they leave the device, and back when they return."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from ..dispatch import dispatch
from ..layout import canonical_row
from . import ref, xla
from .spec import CodecSpec, encoded_shape

ENCODE = {"xla": xla.encode_pages, "ref": ref.encode_pages}
DECODE = {"xla": xla.decode_pages, "ref": ref.decode_pages}


def encode_pages(spec: CodecSpec, pages: jax.Array, *, impl: str = "auto") -> jax.Array:
    """Canonical pages [n, L, 2, ps, Hkv, C] (see `layout`) -> uint8 [n, Hkv, B], B as `encoded_shape` says.

    "exact" layers keep every bit. "int8" and "int4" share the two ends of a group (see `quant`): keys by channel over the
    tokens of the page, for some channels are large in every token, values by token over the channels of the head, which
    is KIVI's choice (ICML 2024). Keys are taken as they are stored, rotated by RoPE. Heads and pages do not depend on
    each other; a page's tokens do, rows that nobody has written yet included. Losses do not add up: pages that were decoded
    encode and decode to themselves.
    ValueError: what `encoded_shape` refuses.
    """
    encoded_shape(spec, pages.shape[1:], pages.dtype)
    return dispatch("encode_pages", ENCODE, impl, spec, pages)


def decode_pages(
    spec: CodecSpec, encoded: jax.Array, page_shape: Sequence[int], dtype: DTypeLike, *, impl: str = "auto"
) -> jax.Array:
    """The reverse: uint8 [n, Hkv, B] -> [n, L, 2, ps, Hkv, C] of KV in the logical dtype `dtype`.

    page_shape: [L, 2, ps, Hkv, C]. ValueError: what `encoded_shape` refuses, and bytes that are not of such pages.
    """
    want, dtype = encoded_shape(spec, page_shape, dtype), jnp.dtype(dtype)
    if encoded.ndim != 3 or encoded.shape[1:] != want or encoded.dtype != "uint8":
        raise ValueError(f"encoded must be uint8 [n, {want[0]}, {want[1]}] for pages {tuple(page_shape)} of "
                         f"{canonical_row(dtype, page_shape[4])[1]}, got {encoded.dtype} {encoded.shape}")
    return dispatch("decode_pages", DECODE, impl, spec, encoded, tuple(page_shape), dtype)
