"""Which layer is stored how, and how many bytes that takes. Numbers only, no arrays.

One layer of one KV head of an encoded page is a run of bytes: "exact" holds the canonical rows as they are; "int8" and
"int4" hold a quantised number for every element and the two ends of every group, in the dtype of the KV. Layers follow
one another, so an encoded page is [Hkv, B] and a mesh splits it as it splits the page.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import jax.numpy as jnp
from jax.typing import DTypeLike

from ..layout import KV_DTYPES, canonical_row

LEVELS = {"exact": 0, "int8": 255, "int4": 15}  # largest quantised number
CODECS = ("exact", "int8", "int4", "mixed")


@dataclass(frozen=True)
class CodecSpec:
    """The level of every layer of a page, a key of `LEVELS` each. ValueError for another."""

    levels: tuple[str, ...]

    def __post_init__(self) -> None:
        unknown = sorted(set(self.levels) - LEVELS.keys())
        if unknown or not self.levels:
            raise ValueError(f"levels must be one of {tuple(LEVELS)} for each layer, got {unknown or self.levels!r}")

    def runs(self) -> list[tuple[str, slice]]:
        """Neighbouring layers of one level."""
        runs = [(level, len(list(run))) for level, run in groupby(self.levels)]
        ends = [sum(count for _, count in runs[: i + 1]) for i in range(len(runs))]
        return [(level, slice(end - count, end)) for (level, count), end in zip(runs, ends)]


def codec_spec(name: str, num_layers: int, layers: Sequence[int] | None = None) -> CodecSpec:
    """The codec a user names, for pages of `layers` (all if None) of a model of `num_layers`.

    name: a level for all layers; "mixed": int8 in the first half of the layers and in the last, int4 in the others; or the
    levels of all layers with commas between, for a model that was measured (`bench.kv_codec`). ValueError otherwise.
    That output suffers less from losses in deeper layers is the third insight of CacheGen (SIGCOMM 2024). The built-in
    model agrees but for its last layer, which suffers most: hence the exception.
    """
    if name == "mixed":
        levels = tuple("int4" if num_layers <= 2 * i < 2 * num_layers - 2 else "int8" for i in range(num_layers))
    else:
        given = tuple(name.split(","))
        levels = given * num_layers if len(given) == 1 else given
    if not LEVELS.keys() >= set(levels) or len(levels) != num_layers:
        raise ValueError(f"KV codec must be one of {CODECS}, or {num_layers} of {tuple(LEVELS)} with commas between, one a "
                         f"layer, got {name!r}")
    return CodecSpec(tuple(levels[i] for i in (range(num_layers) if layers is None else layers)))


def encoded_shape(spec: CodecSpec, page_shape: Sequence[int], dtype: DTypeLike) -> tuple[int, int]:
    """(Hkv, B) of an encoded canonical page [L, 2, ps, Hkv, C] of KV in the logical dtype `dtype`.

    ValueError: a shape that is no such page, and a lossy level for KV that is quantised already.
    """
    dtype = jnp.dtype(dtype)
    if len(page_shape) != 5 or page_shape[:2] != (len(spec.levels), 2):
        raise ValueError(f"a page must be [{len(spec.levels)}, 2, ps, Hkv, C], got {tuple(page_shape)}")
    if dtype.name not in KV_DTYPES and set(spec.levels) != {"exact"}:
        raise ValueError(f"KV in {dtype.name} is quantised already and moves as it is stored: the KV codec must be exact, got "
                         f"{', '.join(sorted(set(spec.levels)))}")
    _, _, tokens, heads, width = page_shape
    size = canonical_row(dtype, width)[1].itemsize
    ends = 2 * size * (tokens + width)  # of `width` groups of keys and `tokens` groups of values
    count = tokens * width
    each = {"exact": 2 * count * size, "int8": 2 * count + ends, "int4": count + ends}
    return heads, sum(each[level] for level in spec.levels)


def encoded_bytes(spec: CodecSpec, page_shape: Sequence[int], dtype: DTypeLike) -> int:
    """Bytes of an encoded page; see `encoded_shape`."""
    return math.prod(encoded_shape(spec, page_shape, dtype))
