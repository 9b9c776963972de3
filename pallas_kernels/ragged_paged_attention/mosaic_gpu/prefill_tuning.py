"""Block sizes of the Hopper prefill kernel, as data.

Every row was chosen by compiling for sm_90a; none has been timed on a GPU yet. All fit in 232,448 bytes of shared memory
(at most 219,408). Spills: none up to head_dim 128; at most 48 bytes there with window and soft cap together, at most 72 bytes
at head_dim 256. In the code looked at, they lie outside the loop over unmasked blocks.
Measured rows, in `tuned.json` by `python -m bench.tune --write`, count before these.
"""

from __future__ import annotations

from typing import NamedTuple

from ..tuning import tuned


class PrefillBlocks(NamedTuple):
    """keys: of a block, a multiple of 64; stages: blocks in flight; own_output: whether the output has shared memory of its
    own, so that the next queries load meanwhile; ctas: persistent thread blocks, one per multiprocessor."""

    keys: int
    stages: int
    own_output: bool
    ctas: int = 132


CHIP = "h100"
UNTUNED = {  # (chip, head_dim, KV dtype); chosen without a timing
    (CHIP, 64, "bfloat16"): PrefillBlocks(128, 4, True),
    (CHIP, 80, "bfloat16"): PrefillBlocks(128, 3, True),
    (CHIP, 96, "bfloat16"): PrefillBlocks(128, 3, True),
    (CHIP, 128, "bfloat16"): PrefillBlocks(128, 2, True),
    (CHIP, 256, "bfloat16"): PrefillBlocks(64, 2, False),
}
_QUANTISED = {64: PrefillBlocks(128, 3, True), 80: PrefillBlocks(128, 2, True), 96: PrefillBlocks(128, 2, True),
              128: PrefillBlocks(64, 3, True)}
BLOCKS = (UNTUNED | {(chip, dim, "float16"): blocks for (chip, dim, _), blocks in UNTUNED.items()}
          | {(CHIP, dim, dtype): blocks for dim, blocks in _QUANTISED.items() for dtype in ("int8", "float8_e4m3fn")}
          | tuned("prefill", PrefillBlocks))


def blocks_for(head_dim: int, dtype: str) -> PrefillBlocks:
    """NotImplementedError for a head_dim or KV dtype without a row."""
    try:
        return BLOCKS[CHIP, head_dim, dtype]
    except KeyError:
        raise NotImplementedError(f"no block sizes for head_dim={head_dim} and KV dtype {dtype}") from None
