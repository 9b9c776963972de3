"""Continuous batching at iteration level: every plan is decided anew from who waits, who runs and which pages are left.

Owns the waiting and running order, slots, the token budget, preemption and the end of sequences. Owns no pages (the
CacheController does), leaves what is brought ahead of waiting sequences to ``lookahead``, and never talks to a device:
``plan`` returns a value, ``commit`` takes one. Both are pure functions of the calls made so far, so a recorded run can be
replayed (``jaxkv.sched.replay``).

One order decides everything: sequences are served by ascending key, and when a running one cannot grow, the running
sequence with the largest key is released. Nobody is preempted to admit someone else, a plan that preempts admits
nobody, and the pool holds at least one sequence of full length: the first in the order always advances, so there is
no deadlock. Preemption is ``release``: the pages stay in the trie, and coming back is a prefix hit.

Overlap: ``plan`` may be called before the previous plan is committed. A sequence then has ``in_flight`` tokens that
the host does not know; its next chunk carries -1 and the device inserts the slot's last token. As that token is lost
with the slot, a preempted sequence waits until its in-flight tokens are committed. A sequence that ``needs_last_token``
(structured output) waits for them too, and only that one.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from heapq import heappop, heappush
from itertools import pairwise
from operator import attrgetter
from typing import NamedTuple

from jaxkv.cache.controller import CacheController, Transfers
from jaxkv.config import SchedConfig
from jaxkv.sched.capacity import check_capacity, fits_beside
from jaxkv.sched.chunking import append_tokens, chunk_length, excess_tokens, take_chunk
from jaxkv.sched.lookahead import LOOKAHEAD, Lookahead
from jaxkv.sched.policy import FCFS, SchedulerPolicy
from jaxkv.sequence import Sequence, Status
from jaxkv.types import Admit, Arrival, Chunk, Request, Start, StepPlan, StepResult, Tier, TokenEvent

NO_MEMORY = "the device's memory ran out in a step of this request"
MEASURED_TOKENS = 64  # besides decodes, for a step to tell what prefill takes
_RUNNING, _FINISHED = Status.RUNNING, Status.FINISHED
_key = attrgetter("key")


class _Pending(NamedTuple):
    plan: StepPlan
    planned: float  # when
    seqs: list[Sequence]  # of each chunk
    plans_ended: int  # of the cache, before this one


class Scheduler:
    """Turns requests into plans and results into token events.

    ``step_sizes``: the numbers of tokens that steps with prompts are padded to, ascending; none: no padding.
    Whole prompts (``enable_chunked_prefill=False``) need a budget of at least ``max_model_len`` tokens.
    Raises ConfigError when the budget or a page pool is too small for one sequence of ``max_model_len`` tokens.
    """

    def __init__(self, config: SchedConfig, cache: CacheController, max_model_len: int,
                 policy: SchedulerPolicy | None = None, step_sizes: tuple[int, ...] = ()) -> None:
        check_capacity(config, cache, max_model_len)
        self.cache = cache
        self.max_model_len = max_model_len
        self.num_preemptions = 0
        self._policy = policy or FCFS()
        self._budget = config.max_num_batched_tokens
        self._whole = not config.enable_chunked_prefill
        self._step_sizes = () if self._whole else step_sizes
        self._sequences: dict[str, Sequence] = {}
        self._waiting: list[Sequence] = []  # by key
        self._running: list[Sequence] = []  # by key
        self._num_slots = config.max_num_seqs
        self._slots = list(range(config.max_num_seqs))  # free ones, a heap
        self._pending: deque[_Pending] = deque()  # plans that are not committed
        self._committed = 0.0  # time of the latest commit
        self._next_plan = 0
        self._num_added = 0
        self._stuck: Sequence | None = None  # did not fit; not tried again until a sequence is released
        self._lookahead = Lookahead(cache, config.max_num_batched_tokens)
        self._leading: set[str] = set()  # parents whose siblings wait for child 0's prompt
        self._led: list[str] = []  # those whose child 0 finished its prompt in the latest plan

    # ---- requests in and out

    @property
    def has_work(self) -> bool:
        return bool(self._sequences)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    def add(self, request: Request) -> None:
        """Queue a request. Raises ValueError that names the field when it cannot ever be served."""
        if request.id in self._sequences:
            raise ValueError(f"request id {request.id!r} is already in use")
        if not request.prompt:
            raise ValueError("prompt must hold at least one token")
        if request.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {request.max_tokens}")
        if len(request.prompt) + request.max_tokens > self.max_model_len:
            raise ValueError(f"prompt and max_tokens must fit in max_model_len ({self.max_model_len} tokens), "
                             f"got {len(request.prompt)} + {request.max_tokens}")
        seq = Sequence(request, list(request.prompt))
        seq.key = (*self._policy.key(seq), self._num_added)
        self._num_added += 1
        self._sequences[request.id] = seq
        insort(self._waiting, seq, key=_key)
        if request.child == 0 and request.params.n > 1 and self.cache.enable_prefix_caching:
            self._leading.add(request.parent)

    def abort(self, request_id: str) -> bool:
        """End a sequence at once, whatever it is doing; tokens still on the device are discarded. False if unknown."""
        return self.finish(request_id, "abort")

    def finish(self, request_id: str, reason: str) -> bool:
        """End a sequence for a reason the scheduler cannot see (a stop string, a lost client). False if unknown."""
        seq = self._sequences.get(request_id)
        if seq is None:
            return False
        self._end(seq, reason)
        return True

    # ---- plan

    def plan(self, now: float) -> StepPlan | None:
        """The next step, or None when nothing can run before a commit or an arrival. ``now``: the injected clock."""
        plan_id = self._next_plan
        self._lookahead.begin(now)
        self.cache.tick(now)
        if self._led:
            self._leading.difference_update(self._led)
            self._led.clear()
        chunks: list[Chunk] = []
        seqs: list[Sequence] = []
        admits: list[Admit] = []
        left, preempted = self._continue(plan_id, chunks, seqs)
        if self._waiting and not preempted:
            self._admit(plan_id, left, chunks, seqs, admits)
        transfers = self.cache.take_transfers()
        if not chunks and not any(transfers):
            if self._waiting and not self._running and not self._pending and not self.cache.loading:
                raise RuntimeError(f"request {self._waiting[0].request.id!r} does not fit into an idle KV pool")
            return None
        return self._plan(now, seqs, transfers, tuple(admits), tuple(chunks))

    def plan_saves(self, pages: int, now: float) -> StepPlan | None:
        """A plan that only hands up to ``pages`` pages to the disk tier; None when it has all that memory has. For the
        end, with nothing running."""
        self.cache.save(pages)
        transfers = self.cache.take_transfers()
        if not transfers.saves:
            return None
        return self._plan(now, [], transfers)

    def _plan(self, now: float, seqs: list[Sequence], transfers: Transfers, admits: tuple[Admit, ...] = (),
              chunks: tuple[Chunk, ...] = ()) -> StepPlan:
        plan = StepPlan(self._next_plan, *transfers, admits, chunks)
        self._next_plan += 1
        self._pending.append(_Pending(plan, now, seqs, self.cache.plans_ended - 1))
        return plan

    def lose_host_tier(self) -> None:
        """Go on without the host tier, whose pages are lost."""
        self._lookahead.lose_host_tier()

    def arrived(self, arrival: Arrival) -> None:
        """Learn that a fetch ended. Sequences whose pages will not come go without them."""
        self._lookahead.arrived(arrival)
        self._unblock()

    def _continue(self, plan_id: int, chunks: list[Chunk], seqs: list[Sequence]) -> tuple[int, bool]:
        """Chunks of the running sequences: one token each is theirs, prompts share what the budget has beyond that.

        Returns the budget left for admissions and whether a sequence was preempted. A victim comes after the one that
        grows in the order, so it has no chunk in this plan.
        """
        running = self._running
        grow = self.cache.grow
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
                if not self._waiting and all(s.num_tokens - s.num_scheduled < 2 for s in running[index + 1 :]):
                    length -= excess_tokens(self._budget - left + length - 1, length - 1, self._step_sizes)
                left -= length - 1
            while not grow(seq, start + length):
                if self._lookahead.give_way() or self._lookahead.cancel():
                    continue
                victim = running[-1]
                self._preempt(victim)
                preempted = True
                if victim is seq:
                    break
            else:
                chunks.append(self._schedule(seq, length, plan_id))
                seqs.append(seq)
                index += 1
        return left, preempted

    def _admit(self, plan_id: int, left: int, chunks: list[Chunk], seqs: list[Sequence], admits: list[Admit]) -> None:
        """First chunks of waiting sequences in order, up to the first that cannot enter; siblings may be passed, and
        those whose pages are on their way. Pages start on their way for the first ``LOOKAHEAD`` that wait. One whose pages
        come right before the step has the step to itself."""
        waiting = self._waiting
        self._lookahead.keep(waiting, plan_id)
        index = 0
        while index < len(waiting):
            seq = waiting[index]
            room = left > 0 and self._slots
            if seq.in_flight or seq is self._stuck or not room and index >= LOOKAHEAD:
                break
            sibling = seq.request.child and seq.request.parent in self._leading and not seq.owes_prompt_logprobs
            if sibling or self._lookahead.awaits_pages(seq, plan_id, len(self._running)) or not room:
                index += 1
                continue
            alone = not self._running
            length = self._acquire(seq, plan_id, left)
            if length == 0:
                break
            del waiting[index]
            left -= length
            admits.append(self._enter(seq))
            chunks.append(self._schedule(seq, length, plan_id))
            seqs.append(seq)
            if alone and self.cache.bringing:
                break

    def _acquire(self, seq: Sequence, plan_id: int, left: int) -> int:
        """Pages for the cached prefix and the first chunk; the chunk's length, or 0 with nothing held."""
        cache = self.cache
        cache.acquire(seq, plan_id, cold=not self._running)
        self._lookahead.leave(seq)
        length = chunk_length(seq, left)
        if len(self._waiting) == 1:
            length -= excess_tokens(self._budget - left + length, length - 1, self._step_sizes)
        if not self._whole or seq.num_scheduled + length == len(seq.tokens):
            others = len(self._running)
            while True:
                fits = not others or fits_beside(cache, seq, others, self._budget)
                if fits and cache.grow(seq, seq.num_scheduled + length):
                    return length
                if not self._lookahead.give_way():
                    break
            self._stuck = seq
        cache.release(seq)
        return 0

    def _enter(self, seq: Sequence) -> Admit:
        request = seq.request
        seq.slot = heappop(self._slots)
        seq.status = _RUNNING
        self._lookahead.enter(seq)
        seq.dirty = [0] * len(seq.pages)  # the slot's row belonged to someone else
        if seq.first_admission:
            seq.first_admission = False
            seq.num_cached, seq.cached_below = seq.num_scheduled, seq.came
        insort(self._running, seq, key=_key)
        return Admit(seq.slot, request.id, request.params, request.seed, request.child, len(request.prompt),
                     tuple(seq.tokens) if request.params.needs_slot_state else (), request.stop_ids)

    def _schedule(self, seq: Sequence, length: int, plan_id: int) -> Chunk:
        """Publishing comes before the chunk is made: it may swap a private page for the trie's equal one."""
        start, size, request = seq.num_scheduled, self.cache.page_size, seq.request
        end = seq.num_scheduled = start + length
        prompt_len = len(request.prompt)
        if end == prompt_len or min(end, len(seq.tokens)) // size > seq.num_published // size:
            self.cache.publish(seq, plan_id)
        if start < prompt_len <= end and request.child == 0 and request.parent in self._leading:
            self._led.append(request.parent)
        return take_chunk(seq, start)

    # ---- commit

    def commit(self, plan: StepPlan, result: StepResult, now: float) -> list[TokenEvent]:
        """Learn what a step sampled; plans are committed in order, each once. ``now`` is the injected clock.

        Tokens after a stop id and tokens of sequences that ended meanwhile are discarded. A sequence with NaN among its
        logits, and every one of a step that failed, ends with "error". A failed step takes HBM's contents along: plans
        submitted after it are void and never committed, and what they computed is computed again.
        """
        pending = self._pending.popleft()
        assert pending.plan.id == plan.id, f"commit of plan {plan.id}, expected {pending.plan.id}"
        since, seqs, self._committed = max(pending.planned, self._committed), pending.seqs, now
        if result.failed:
            return self._lose(pending)
        self._measure(plan, now - since)
        events: list[TokenEvent] = []
        sampled, logprobs, prompt_logprobs = result.tokens, result.logprobs, result.prompt_logprobs
        for index, seq in enumerate(seqs):
            chunk = plan.chunks[index]
            count = chunk.num_logits
            if seq.void:
                seq.void -= count
                seq.in_flight -= count
                continue
            if count and min(sampled[index]) < 0:
                events += self._disown(seq, count)
                continue
            if seq.status is _FINISHED:
                continue
            reported = prompt_logprobs[index] if chunk.prompt_logprobs and prompt_logprobs else ()
            if not chunk.num_logits:
                if reported:
                    events.append(TokenEvent(chunk.request_id, (), (), reported, None, None, seq.num_cached,
                                             cached_below=seq.cached_below))
                continue
            tokens = sampled[index]
            first = Start(seq.admitted, now, seq.page_wait) if len(seq.tokens) == len(seq.request.prompt) else None
            count, reason = append_tokens(seq, tokens)
            if reason is not None:
                self._end(seq, reason)
            events.append(TokenEvent(
                chunk.request_id, tokens[:count], logprobs[index][:count] if logprobs else (), reported, reason,
                tokens[count - 1] if reason == "stop" else None, seq.num_cached, first,
                result.hidden[index] if result.hidden else (), seq.cached_below))
        return events

    def _measure(self, plan: StepPlan, seconds: float) -> None:
        """Tell the cache what a step with prefill or with moves to and from HBM took."""
        tokens, costs = plan.num_tokens, self.cache.costs
        moved = sum(m.dst is not None and (m.src[0] is Tier.HBM) != (m.dst[0] is Tier.HBM) for m in plan.moves)
        if tokens >= len(plan.chunks) + MEASURED_TOKENS or moved and costs.measured:
            positions = sum(len(c.tokens) * (2 * c.start + len(c.tokens) - 1) // 2 for c in plan.chunks)
            costs.stepped(tokens, positions, moved // len(self.cache.groups), seconds)

    # ---- KV that turned out wrong

    def _disown(self, seq: Sequence, count: int) -> list[TokenEvent]:
        """``count`` tokens are from NaN: drop of the sequence's KV what nobody else uses; whoever reads the rest has NaN among
        its own logits. If some was not its own it computes all anew, once and by itself, else it ends."""
        again = seq.sound and seq.borrowed and seq.status is _RUNNING and not (
            seq.request.params.prompt_logprobs is not None and seq.num_reported)  # some may be out already
        known, seq.sound = not seq.sound, False
        events = [] if again or seq.status is _FINISHED else [self._fail(seq)]
        if again:
            seq.in_flight -= count
            seq.void = seq.in_flight
            self._preempt(seq)
        if not known:
            self.cache.forget(seq)
        return events

    def _lose(self, failed: _Pending) -> list[TokenEvent]:
        """End the sequences of a step that took HBM's contents along; all others compute again what host and disk lack."""
        events = [self._fail(seq, NO_MEMORY) for seq in failed.seqs if seq.status is not _FINISHED]
        for void in self._pending:
            for seq, chunk in zip(void.seqs, void.plan.chunks, strict=True):
                if chunk.prompt_logprobs:
                    seq.num_reported = min(seq.num_reported, chunk.start)
        self._pending.clear()
        while self._lookahead.give_way() or self._lookahead.cancel():
            pass
        for seq in list(self._running):
            self._preempt(seq)
        for seq in self._waiting:
            seq.in_flight = seq.void = 0
            self._lookahead.start_over(seq)
        chunks = zip(failed.seqs, failed.plan.chunks, strict=True)
        self.cache.lose_hbm(failed.plans_ended, [(seq, chunk.start) for seq, chunk in chunks])
        self._unblock()
        return events

    def _fail(self, seq: Sequence, why: str = "") -> TokenEvent:
        seq.sound = False
        self._end(seq, "error")
        return TokenEvent(seq.request.id, finish_reason="error", num_cached=seq.num_cached, error=why)

    # ---- leaving

    def _end(self, seq: Sequence, reason: str) -> None:
        if seq.status is _RUNNING:
            self._leave(seq, ended=True)
        else:
            _remove(self._waiting, seq)
            self._lookahead.leave(seq)
            self._unblock()
        seq.status = _FINISHED
        seq.finish_reason = reason
        del self._sequences[seq.request.id]
        if seq.request.child == 0:
            self._leading.discard(seq.request.parent)

    def _preempt(self, seq: Sequence) -> None:
        self._leave(seq, ended=False)
        seq.status = Status.WAITING
        insort(self._waiting, seq, key=_key)
        self.num_preemptions += 1
        if seq.request.child == 0:
            self._leading.discard(seq.request.parent)

    def _leave(self, seq: Sequence, ended: bool) -> None:
        """Give up slot and pages; the pages stay in the trie for whoever needs their contents next."""
        _remove(self._running, seq)
        self.cache.release(seq, ended)
        heappush(self._slots, seq.slot)
        seq.slot = -1
        seq.num_scheduled = 0
        self._unblock()

    def _unblock(self) -> None:
        """There may be more room: who did not fit is tried again."""
        self._stuck = None
        self._lookahead.room_may_have_grown()

    def check(self) -> None:
        """Assert that every sequence is in exactly one place and every slot and page is accounted for."""
        for order, status in ((self._waiting, Status.WAITING), (self._running, Status.RUNNING)):
            assert all(a.key < b.key for a, b in pairwise(order)), "out of order"
            assert all(seq.status is status and self._sequences[seq.request.id] is seq for seq in order)
        assert len(self._waiting) + len(self._running) == len(self._sequences), "a sequence is nowhere"
        assert all(seq.slot < 0 for seq in self._waiting)
        assert sorted([*self._slots, *(seq.slot for seq in self._running)]) == list(range(self._num_slots)), "slots"
        self.cache.check(self._running)


def _remove(order: list[Sequence], seq: Sequence) -> None:
    index = bisect_left(order, seq.key, key=_key)
    assert order[index] is seq
    del order[index]
