"""What runs in the next step: chunks of the running sequences, then the first chunks of those who can enter.

Owns the token budget, admission and the choice of whom to preempt. Owns no order and no slot (``roster``), no page (the
CacheController) and nothing that has been submitted (the Scheduler).
"""

from __future__ import annotations

from typing import NamedTuple

from jaxkv.cache.controller import CacheController
from jaxkv.config import SchedConfig
from jaxkv.sched.capacity import fits_beside
from jaxkv.sched.chunking import chunk_length, excess_tokens, take_chunk
from jaxkv.sched.lookahead import LOOKAHEAD, Lookahead
from jaxkv.sched.roster import Roster
from jaxkv.sequence import Sequence
from jaxkv.types import Admit, Chunk


class Draft(NamedTuple):
    """What of a plan is about sequences."""

    plan_id: int
    seqs: list[Sequence]  # of each chunk
    admits: list[Admit]
    chunks: list[Chunk]


class Planner:
    """Fills steps. ``step_sizes``: as of the Scheduler."""

    def __init__(self, config: SchedConfig, cache: CacheController, roster: Roster, lookahead: Lookahead,
                 step_sizes: tuple[int, ...]) -> None:
        self._cache, self._roster, self._lookahead = cache, roster, lookahead
        self._budget = config.max_num_batched_tokens
        self._whole = not config.enable_chunked_prefill
        self._step_sizes = () if self._whole else step_sizes

    def fill(self, plan_id: int) -> Draft:
        """The chunks of the plan under construction. Whoever has one holds the pages for it, and a slot."""
        draft = Draft(plan_id, [], [], [])
        self._roster.siblings.begin()
        left, preempted = self._continue(draft)
        if self._roster.waiting and not preempted:
            self._admit(draft, left)
        return draft

    def _continue(self, draft: Draft) -> tuple[int, bool]:
        """Chunks of the running sequences: one token each is theirs, prompts share what the budget has beyond that.

        Returns the budget left for admissions and whether a sequence was preempted. A victim comes after the one that
        grows in the order, so it has no chunk in this plan.
        """
        plan_id, seqs, _, chunks = draft
        running = self._roster.running
        grow = self._cache.grow
        left = self._budget - len(running)
        preempted = False
        index = 0
        while index < len(running):
            seq = running[index]
            request, start = seq.request, seq.num_scheduled
            known = len(seq.tokens) + seq.in_flight
            if seq.in_flight and request.needs_last_token or known - len(request.prompt) >= request.max_tokens:
                left += 1  # it waits for its last token, or that one is on the device
                index += 1
                continue
            length = 1
            if known - start > 1:
                length = chunk_length(seq, 1 + left)
                if not self._roster.waiting and all(s.num_tokens - s.num_scheduled < 2 for s in running[index + 1 :]):
                    length -= excess_tokens(self._budget - left + length - 1, length - 1, self._step_sizes)
                left -= length - 1
            while not grow(seq, start + length):
                if self._lookahead.give_way() or self._lookahead.cancel():
                    continue
                victim = running[-1]
                self._roster.preempt(victim)
                preempted = True
                if victim is seq:
                    break
            else:
                chunks.append(self._schedule(seq, length, plan_id))
                seqs.append(seq)
                index += 1
        return left, preempted

    def _admit(self, draft: Draft, left: int) -> None:
        """First chunks of waiting sequences in order, up to the first that cannot enter; siblings may be passed, and
        those whose pages are on their way. Pages start on their way for the first ``LOOKAHEAD`` that wait. One whose pages
        come right before the step has the step to itself."""
        roster, lookahead, plan_id = self._roster, self._lookahead, draft.plan_id
        waiting = roster.waiting
        lookahead.keep(waiting, plan_id)
        index = 0
        while index < len(waiting):
            seq = waiting[index]
            room = left > 0 and roster.slots
            if seq.in_flight or seq is roster.stuck or not room and index >= LOOKAHEAD:
                break
            if roster.siblings.wait(seq) or lookahead.awaits_pages(seq, plan_id, len(roster.running)) or not room:
                index += 1
                continue
            alone = not roster.running
            length = self._acquire(seq, plan_id, left)
            if length == 0:
                break
            left -= length
            draft.admits.append(self._enter(seq))
            draft.chunks.append(self._schedule(seq, length, plan_id))
            draft.seqs.append(seq)
            if alone and self._cache.bringing:
                break

    def _acquire(self, seq: Sequence, plan_id: int, left: int) -> int:
        """Pages for the cached prefix and the first chunk; the chunk's length, or 0 with nothing held."""
        cache, others = self._cache, len(self._roster.running)
        cache.acquire(seq, plan_id, cold=not others)
        self._lookahead.leave(seq)
        length = chunk_length(seq, left)
        if len(self._roster.waiting) == 1:
            length -= excess_tokens(self._budget - left + length, length - 1, self._step_sizes)
        if not self._whole or seq.num_scheduled + length == len(seq.tokens):
            while True:
                fits = not others or fits_beside(cache, seq, others, self._budget)
                if fits and cache.grow(seq, seq.num_scheduled + length):
                    return length
                if not self._lookahead.give_way():
                    break
            self._roster.stuck = seq
        cache.release(seq)
        return 0

    def _enter(self, seq: Sequence) -> Admit:
        self._roster.enter(seq)
        seq.dirty = [0] * len(seq.pages)  # the slot's row belonged to someone else
        if seq.first_admission:
            seq.first_admission = False
            seq.num_cached, seq.cached_below = seq.num_scheduled, seq.came
        request = seq.request
        return Admit(seq.slot, request.id, request.params, request.seed, request.child, len(request.prompt),
                     tuple(seq.tokens) if request.params.needs_slot_state else (), request.stop_ids)

    def _schedule(self, seq: Sequence, length: int, plan_id: int) -> Chunk:
        """Publishing comes before the chunk is made: it may swap a private page for the trie's equal one."""
        start, size, request = seq.num_scheduled, self._cache.page_size, seq.request
        end = seq.num_scheduled = start + length
        prompt_len = len(request.prompt)
        if end == prompt_len or min(end, len(seq.tokens)) // size > seq.num_published // size:
            self._cache.publish(seq, plan_id)
        if start < prompt_len <= end:
            self._roster.siblings.prompt_ends(request)
        return take_chunk(seq, start)
