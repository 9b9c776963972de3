"""Block sizes of the decode kernel on Hopper, as data.

Those here are not tuned on hardware: chosen by what compiles for an H100 without spills and within its shared memory, and by
arithmetic. Rows of `tuned.json`, which `python -m bench.tune --write` makes from measurements, count before them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

TUNED = Path(__file__).with_name("tuned.json")


class Chip(NamedTuple):
    """A GPU: streaming multiprocessors, and bytes of shared memory that one block may ask for and one SM has."""

    name: str
    sms: int
    block_smem: int
    sm_smem: int


class DecodeTuning(NamedTuple):
    """block_keys: keys per pipeline stage (a multiple of 64); stages: blocks of keys and values in flight; ctas_per_sm:
    thread blocks meant to share an SM, whose waits then overlap; width: most output columns of a thread block, wider heads
    taking several."""

    block_keys: int
    stages: int
    ctas_per_sm: int
    width: int = 128


CHIPS = {"h100": Chip("h100", 132, 232_448, 233_472)}


def tuned(kind: str, blocks: Callable[..., Any], path: Path = TUNED) -> dict[Any, Any]:
    """The measured rows for "decode" or "prefill" by key, each as `blocks`."""
    return {tuple(row["key"]): blocks(**row["blocks"]) for row in json.loads(path.read_text())[kind]}


_NARROW = {  # one byte per number
    64: DecodeTuning(64, 4, 2), 80: DecodeTuning(64, 3, 2), 96: DecodeTuning(64, 3, 2), 128: DecodeTuning(64, 3, 2),
    256: DecodeTuning(64, 3, 1, 64),  # 128 columns would spill
}
# (chip, head_dim, page size or None for any, KV dtype or None for any): the most particular counts
DECODE: dict[tuple[str, int, int | None, str | None], DecodeTuning] = {
    **{("h100", dim, None, dtype): t for dim, t in _NARROW.items() for dtype in ("int8", "float8_e4m3fn")},
    ("h100", 64, None, None): DecodeTuning(64, 4, 2),
    ("h100", 80, None, None): DecodeTuning(64, 3, 2),
    ("h100", 96, None, None): DecodeTuning(64, 2, 2),
    ("h100", 128, None, None): DecodeTuning(64, 2, 2),
    ("h100", 256, None, None): DecodeTuning(64, 3, 1),
    **tuned("decode", DecodeTuning),
}


def decode_tuning(chip: Chip, head_dim: int, page_size: int, kv_dtype: str) -> DecodeTuning:
    """NotImplementedError for a head dimension without an entry."""
    for key in ((chip.name, head_dim, page_size, kv_dtype), (chip.name, head_dim, page_size, None),
                (chip.name, head_dim, None, kv_dtype), (chip.name, head_dim, None, None)):
        if key in DECODE:
            return DECODE[key]
    raise NotImplementedError(f"no decode tuning for {chip.name} with head_dim {head_dim}")
