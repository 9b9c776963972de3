"""The static half of an attention call."""

from __future__ import annotations

from typing import NamedTuple


class AttentionParams(NamedTuple):
    """See `api.ragged_paged_attention`; checked there."""

    layout: str
    scale: float
    window: int | None
    soft_cap: float | None
    max_q_len: int | None
    mass: str | None = None  # "page" or "token": also return the attention mass
