"""A request under way: the one value of the host that changes.

The Scheduler and the CacheController change a ``Sequence``, nobody else; what leaves them is made of ``jaxkv.types``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

from jaxkv.types import Request, Tier


class Status(IntEnum):
    WAITING = 0
    RUNNING = 1
    FINISHED = 2


@dataclass(eq=False, slots=True)
class Sequence:
    """A request under way. *Scheduled* and *committed* are kept apart, which is what makes overlap easy."""

    request: Request
    tokens: list[int]  # prompt and committed outputs
    status: Status = Status.WAITING
    slot: int = -1
    num_scheduled: int = 0  # leading positions whose KV is in pages once every submitted step has run
    in_flight: int = 0  # sampled by a submitted step, not yet committed
    num_cached: int = 0  # prompt tokens found in the cache at first admission
    cached_below: tuple[int, int] = (0, 0)  # of those, the ones that came from host and from disk
    finish_reason: str | None = None
    first_admission: bool = True
    sound: bool = True  # False: it had NaN among its logits; it shares no KV any more, nor takes any
    void: int = 0  # of those in flight, tokens that were sampled from wrong KV
    borrowed: bool = False  # whether it read KV that it found in the cache
    num_reported: int = 0  # prompt positions whose log-probabilities a submitted step returns, if they were asked for
    key: tuple[float, ...] = ()  # place among the waiting and running, best first; unique
    # owned by the CacheController
    pages: list[list[int]] = field(default_factory=list)  # [group][index] -> HBM page, -1 where out of the window
    first: list[int] = field(default_factory=list)  # [group] first page index that is still in the window
    node: Any = None  # deepest trie node of the pinned path; the trie owns the pages of the path
    num_published: int = 0  # leading tokens on that path
    num_matched: int = 0  # those that were there when the sequence was admitted last
    copied: list[tuple[int, list[int]]] = field(default_factory=list)  # pages it began with copies of: position, tokens
    num_settled: int = 0  # num_scheduled before the latest chunk: later positions may not have been submitted yet
    dirty: list[int] = field(default_factory=list)  # [group] first page index the device's table does not know yet
    waits: list[Any] = field(default_factory=list)  # loads that bring pages of its prefix; left when it enters a slot
    rest: list[int] = field(default_factory=list)  # [group] pages it will need besides those that wait for it
    brought: dict[Tier, range] = field(default_factory=dict)  # positions of its prefix that came since it began to wait
    came: tuple[int, int] = (0, 0)  # tokens of the prefix it entered with that came from host and from disk
    asked: float | None = None  # when its pages were asked for, if they were
    page_wait: float = 0.0  # seconds that it waited for pages
    admitted: float = 0.0  # when it first entered a slot
    kept: bool = False  # whether what HBM has of its prefix was kept since it began to wait
    looked_up: bool = False  # whether its prefix was asked for since it began to wait

    @property
    def num_tokens(self) -> int:
        """Length with the tokens still on the device."""
        return len(self.tokens) + self.in_flight

    @property
    def owes_prompt_logprobs(self) -> bool:
        """Whether prompt positions are still to be run for their log-probabilities (of the token after each)."""
        return self.request.params.prompt_logprobs is not None and self.num_reported < len(self.request.prompt) - 1

    @property
    def match_limit(self) -> int:
        """Leading tokens that may come from the cache: one always runs, and all that still owe log-probabilities."""
        return self.num_reported if self.owes_prompt_logprobs else len(self.tokens) - 1
