"""What a kernel cannot refuse: the values of a batch, looked at on the host before it is sent."""

from __future__ import annotations

import numpy as np


def check_batch(
    page_table: np.ndarray, kv_lens: np.ndarray, cu_q_lens: np.ndarray, *, num_pages: int, page_size: int,
    window: int | None = None,
) -> None:
    """ValueError if a sequence's queries or KV would lie outside its pages or the pool; kernels clip such values, and so
    would read another sequence's KV.

    page_table [S, P], kv_lens [S], cu_q_lens [S + 1] as in `api.ragged_paged_attention`, as numpy arrays. Pages that no query
    can see are not looked at. For tests and debugging: O(S * P).
    """
    q_lens = np.diff(cu_q_lens)
    if cu_q_lens[0] != 0 or (q_lens < 0).any():
        raise ValueError(f"cu_q_lens must ascend from 0, got {cu_q_lens.tolist()}")
    room = page_table.shape[1] * page_size
    for s in np.flatnonzero(q_lens):
        q_len, kv_len = int(q_lens[s]), int(kv_lens[s])
        if not q_len <= kv_len <= room:
            raise ValueError(f"sequence {s}: kv_len must be in [q_len, pages * page_size] = [{q_len}, {room}], got {kv_len}")
        first = 0 if window is None else max(0, kv_len - q_len - window + 1) // page_size
        pages = page_table[s, first : -(-kv_len // page_size)]
        bad = np.flatnonzero((pages < 0) | (pages >= num_pages))
        if bad.size:
            raise ValueError(f"sequence {s}: page {first + bad[0]} of its table must be in [0, {num_pages}), "
                             f"got {pages[bad[0]]}")
