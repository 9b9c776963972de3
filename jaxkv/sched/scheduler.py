"""Continuous batching at iteration level: every plan is decided anew from who waits, who runs and which pages are left.

Owns the plans that are not committed and what is learnt from their results. Who waits and who runs is in ``roster``, what
runs next in ``planner``, what is brought ahead of waiting sequences in ``lookahead``; pages are the CacheController's. Never
talks to a device: ``plan`` returns a value, ``commit`` takes one. Both are pure functions of the calls made so far, so a
recorded run can be replayed (``jaxkv.sched.replay``).

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

from collections import deque
from typing import NamedTuple

from jaxkv.cache.controller import CacheController, Transfers
from jaxkv.config import SchedConfig
from jaxkv.sched.capacity import check_capacity
from jaxkv.sched.chunking import append_tokens
from jaxkv.sched.lookahead import Lookahead
from jaxkv.sched.planner import Planner
from jaxkv.sched.policy import FCFS, SchedulerPolicy
from jaxkv.sched.roster import Roster
from jaxkv.sequence import Sequence, Status
from jaxkv.types import Admit, Arrival, Chunk, Request, Start, StepPlan, StepResult, Tier, TokenEvent

NO_MEMORY = "the device's memory ran out in a step of this request"
MEASURED_TOKENS = 64  # besides decodes, for a step to tell what prefill takes
_RUNNING, _FINISHED = Status.RUNNING, Status.FINISHED


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
        self._lookahead = Lookahead(cache, config.max_num_batched_tokens)
        self._roster = Roster(cache, self._lookahead, policy or FCFS(), config.max_num_seqs)
        self._planner = Planner(config, cache, self._roster, self._lookahead, step_sizes)
        self._pending: deque[_Pending] = deque()  # plans that are not committed
        self._committed = 0.0  # time of the latest commit
        self._next_plan = 0

    # ---- requests in and out

    @property
    def has_work(self) -> bool:
        return bool(self._roster.sequences)

    @property
    def num_waiting(self) -> int:
        return len(self._roster.waiting)

    @property
    def num_running(self) -> int:
        return len(self._roster.running)

    @property
    def num_preemptions(self) -> int:
        return self._roster.num_preemptions

    def add(self, request: Request) -> None:
        """Queue a request. Raises ValueError that names the field when it cannot ever be served."""
        if request.id in self._roster.sequences:
            raise ValueError(f"request id {request.id!r} is already in use")
        if not request.prompt:
            raise ValueError("prompt must hold at least one token")
        if request.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {request.max_tokens}")
        if len(request.prompt) + request.max_tokens > self.max_model_len:
            raise ValueError(f"prompt and max_tokens must fit in max_model_len ({self.max_model_len} tokens), "
                             f"got {len(request.prompt)} + {request.max_tokens}")
        self._roster.add(request)

    def abort(self, request_id: str) -> bool:
        """End a sequence at once, whatever it is doing; tokens still on the device are discarded. False if unknown."""
        return self.finish(request_id, "abort")

    def finish(self, request_id: str, reason: str) -> bool:
        """End a sequence for a reason the scheduler cannot see (a stop string, a lost client). False if unknown."""
        seq = self._roster.sequences.get(request_id)
        if seq is None:
            return False
        self._roster.end(seq, reason)
        return True

    # ---- plan

    def plan(self, now: float) -> StepPlan | None:
        """The next step, or None when nothing can run before a commit or an arrival. ``now``: the injected clock."""
        self._lookahead.begin(now)
        self.cache.tick(now)
        draft = self._planner.fill(self._next_plan)
        transfers = self.cache.take_transfers()
        if not draft.chunks and not any(transfers):
            roster = self._roster
            if roster.waiting and not roster.running and not self._pending and not self.cache.loading:
                raise RuntimeError(f"request {roster.waiting[0].request.id!r} does not fit into an idle KV pool")
            return None
        return self._plan(now, draft.seqs, transfers, tuple(draft.admits), tuple(draft.chunks))

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
        self._roster.unblock()

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
                self._roster.end(seq, reason)
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
            self._roster.preempt(seq)
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
        for seq in list(self._roster.running):
            self._roster.preempt(seq)
        for seq in self._roster.waiting:
            seq.in_flight = seq.void = 0
            self._lookahead.start_over(seq)
        chunks = zip(failed.seqs, failed.plan.chunks, strict=True)
        self.cache.lose_hbm(failed.plans_ended, [(seq, chunk.start) for seq, chunk in chunks])
        self._roster.unblock()
        return events

    def _fail(self, seq: Sequence, why: str = "") -> TokenEvent:
        seq.sound = False
        self._roster.end(seq, "error")
        return TokenEvent(seq.request.id, finish_reason="error", num_cached=seq.num_cached, error=why)

    def check(self) -> None:
        """Assert that every sequence is in exactly one place and every slot and page is accounted for."""
        self._roster.check()
