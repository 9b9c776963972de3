"""The host's half of an attention call: what an implementation wants worked out before the step; rides in its buffer.

Empty today: the XLA loops derive their work lists inside the jit, once per step, which costs less than sending them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def attention_plan_size(tokens: int, seqs: int, pages: int) -> int:
    """int32 entries of a plan for a batch of T tokens, S sequences and P pages per sequence; static. 0: no plan needed."""
    del tokens, seqs, pages
    return 0


def attention_plan(
    q_lens: Sequence[int] | np.ndarray, kv_lens: Sequence[int] | np.ndarray, *, tokens: int, seqs: int, pages: int,
    window: int | None = None,
) -> np.ndarray:
    """The plan of one batch and window: int32 [attention_plan_size(tokens, seqs, pages)]."""
    del q_lens, kv_lens, window
    return np.zeros(attention_plan_size(tokens, seqs, pages), np.int32)
