"""The matcher of every open sequence with structured output: the masks of a step, and what the step sampled.

Owned by the engine and used on its thread. A matcher knows the committed tokens and no others, so a sequence that has
one is never planned while a token of it is on the device (``Request.needs_last_token``).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from jaxkv.device.sampling import mask_words
from jaxkv.runtime.structured.compiler import Grammar
from jaxkv.runtime.structured.grammar import reason
from jaxkv.types import Request, StepPlan

if TYPE_CHECKING:
    from llguidance import LLExecutor, LLMatcher

PARALLEL_FROM = 16  # masks: handing fewer to other threads costs more than it saves
log = logging.getLogger("jaxkv")


class TokenMasks(NamedTuple):
    """Which tokens some of a step's logit rows may choose; ``jaxkv.device.sampling.masks`` says which bit is whose."""

    rows: list[int]
    words: np.ndarray  # i32 [len(rows), W]

    def padded(self, rows: int) -> np.ndarray:
        """For all rows of a batch shape, i32 [rows, W]; zeros where nothing is masked."""
        out = np.zeros((rows, self.words.shape[1]), np.int32)
        out[self.rows] = self.words
        return out


@dataclass(slots=True)
class _Open:
    request: Request
    matcher: LLMatcher
    num_tokens: int = 0


class Matchers:
    """``vocab_size`` and ``eos_ids`` are the model's."""

    def __init__(self, vocab_size: int, eos_ids: tuple[int, ...]) -> None:
        self._words, self._eos_ids = mask_words(vocab_size), eos_ids
        self._open: dict[str, _Open] = {}  # by child id
        self._executor: LLExecutor | None = None

    def add(self, request: Request, grammar: Grammar) -> None:
        """A sequence begins."""
        self._open[request.id] = _Open(request, grammar.matcher())

    def drop(self, request_id: str) -> None:
        """A sequence has ended; unknown ids are ignored."""
        self._open.pop(request_id, None)

    def masks(self, plan: StepPlan) -> TokenMasks | None:
        """Of the plan's logit rows; None if no row has one."""
        if not self._open:
            return None
        rows, found, row = [], [], 0
        for chunk in plan.chunks:
            if chunk.num_logits and chunk.request_id in self._open:
                rows.append(row)
                found.append(self._open[chunk.request_id])
            row += chunk.num_logits
        if not rows:
            return None
        words = np.empty((len(rows), self._words), np.int32)
        self._fill([one.matcher for one in found], words)
        for one, mask in zip(found, words):
            if early := self._too_early(one):
                _forbid(mask, early)
        return TokenMasks(rows, words)

    def advance(self, request_id: str, tokens: tuple[int, ...]) -> str | None:
        """Learns committed tokens. Why the sequence ends with them, if it does: "stop" at the end of its grammar,
        "error" when the matcher failed (a limit of its own, or a token it does not allow, sampled from NaN)."""
        one = self._open.get(request_id)
        if one is None or not tokens:
            return None
        one.num_tokens += len(tokens)
        if not one.matcher.consume_tokens(list(tokens)):
            log.warning("request %.100s: structured output failed: %s", request_id, reason(one.matcher))
            return "error"
        return "stop" if one.matcher.is_stopped() else None

    def _fill(self, matchers: list[LLMatcher], words: np.ndarray) -> None:
        size = words.shape[1] * words.itemsize
        if len(matchers) < PARALLEL_FROM:
            for matcher, row in zip(matchers, words):
                matcher.unsafe_compute_mask_ptr(row.ctypes.data, size)
            return
        if self._executor is None:
            from llguidance import LLExecutor

            self._executor = LLExecutor()
        self._executor.unsafe_compute_mask_ptr([(m, i) for i, m in enumerate(matchers)], words.ctypes.data, size, len(matchers))

    def _too_early(self, one: _Open) -> tuple[int, ...]:
        """Ids that may not end the sequence yet."""
        params = one.request.params
        eos = self._eos_ids if params.ignore_eos else ()
        return eos + one.request.stop_ids if one.num_tokens < params.min_tokens else eos


def _forbid(mask: np.ndarray, ids: tuple[int, ...]) -> None:
    """Takes ``ids`` from a row i32 [W], unless nothing else is left: then the grammar is at its end."""
    rest = mask.view(np.uint32).copy()
    for token in ids:
        rest[token // 32] &= ~np.uint32(1 << token % 32)
    if rest.any():
        mask[:] = rest.view(np.int32)
