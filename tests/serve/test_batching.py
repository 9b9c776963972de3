"""The batching window: by its rules for every pattern of arrivals, and what the engine sees of it."""

import asyncio
import math
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxkv.runtime.outputs import Delta
from jaxkv.serve.batching import Batcher, Window
from jaxkv.serve.calls import Call, Mailbox
from jaxkv.serve.embeddings import _PARAMS
from jaxkv.serve.errors import ApiError

steps = st.lists(st.tuples(st.sampled_from(["add", "add", "add", "remove"]), st.integers(0, 40)), max_size=60)


@given(steps, st.integers(1, 5), st.integers(0, 50))
def test_every_pattern_of_arrivals(steps, max_batch, max_wait):
    now = 0
    window = Window(max_batch, max_wait, lambda: now)
    waiting, arrival, left, cancelled = [], {}, [], set()

    def close_due():
        while batch := window.take():
            assert len(batch) <= max_batch
            assert batch == waiting[: len(batch)], "order is kept"
            assert len(batch) == max_batch or now == arrival[batch[0]] + max_wait, "closes when full or due, not before"
            del waiting[: len(batch)]
            left.extend(batch)

    def advance(until):
        nonlocal now
        while (deadline := window.deadline) is not None and deadline <= until:
            assert now <= deadline, "never later than the deadline"
            now = deadline
            close_due()
        now = until

    for item, (kind, number) in enumerate(steps):
        advance(now + number)
        if kind == "add":
            window.add(item)
            waiting.append(item)
            arrival[item] = now
            close_due()
            assert len(waiting) < max_batch
        elif waiting:
            gone = waiting.pop(number % len(waiting))
            window.remove(gone)
            cancelled.add(gone)
        window.remove("unknown")
    advance(math.inf)
    assert sorted([*left, *cancelled]) == sorted(arrival), "nothing is lost, nothing comes twice"
    assert window.deadline is None


class Engine:
    """Stands in for EngineLoop: remembers batches, answers each call at once unless told to hold."""

    def __init__(self, refuse=None, hold=False):
        self.batches, self.aborted, self.refuse, self.hold = [], [], refuse, hold

    def submit(self, calls):
        if self.refuse:
            raise self.refuse
        self.batches.append((time.monotonic(), [call.id for call in calls]))
        for call in calls:
            if not self.hold:
                call.mailbox.put(call, Delta(call.id, 0, finish_reason="length", hidden=(float(call.position),)))

    def abort(self, calls):
        self.aborted += [call.id for call in calls]


def calls(name, count):
    mailbox = Mailbox()
    return [Call(f"{name}{i}", [1], _PARAMS, mailbox, i) for i in range(count)]


def test_requests_share_batches_and_get_their_own_answers():
    async def main():
        engine = Engine()
        batcher = Batcher(engine, 4, 0.05)
        start = time.monotonic()
        answers = await asyncio.gather(*(batcher.run(calls(name, n)) for name, n in (("a", 3), ("b", 2), ("c", 9))))
        assert [[d.hidden[0] for d in row] for row in answers] == [list(range(n)) for n in (3, 2, 9)]
        assert sorted(sum((ids for _, ids in engine.batches), [])) == sorted(c.id for n, k in (("a", 3), ("b", 2), ("c", 9))
                                                                           for c in calls(n, k))
        assert [len(ids) for _, ids in engine.batches][:2] == [4, 4] and max(len(i) for _, i in engine.batches) == 4
        assert engine.batches[0][0] - start < 0.03, "a full batch does not wait"
        assert 0.045 < engine.batches[-1][0] - engine.batches[-2][0] < 0.5, "one that is not full waits its time"

    asyncio.run(main())


def test_a_full_queue_refuses_only_what_does_not_fit():
    class Full(Engine):
        def submit(self, calls):
            if sum(len(ids) for _, ids in self.batches) + len(calls) > 3:
                raise ApiError(429, "full")
            super().submit(calls)

    async def main():
        engine = Full()
        batcher = Batcher(engine, 6, 0.01)
        answers = await asyncio.gather(*(batcher.run(calls(name, n)) for name, n in (("a", 2), ("b", 3), ("c", 1))),
                                       return_exceptions=True)
        assert [len(answers[0]), len(answers[2])] == [2, 1] and answers[1].status == 429
        assert [ids for _, ids in engine.batches] == [["a0", "a1"], ["c0"]]

    asyncio.run(main())


def test_cancelled_and_refused_requests_leave_nothing():
    async def main():
        engine = Engine(hold=True)
        batcher = Batcher(engine, 4, 0.02)
        first, other = asyncio.ensure_future(batcher.run(calls("a", 2))), asyncio.ensure_future(batcher.run(calls("b", 1)))
        await asyncio.sleep(0)
        first.cancel()
        await asyncio.sleep(0.05)
        assert [ids for _, ids in engine.batches] == [["b0"]] and engine.aborted == ["a0", "a1"]
        other.cancel()
        await asyncio.sleep(0)
        assert engine.aborted[2:] == ["b0"] and batcher._window.deadline is None
        with pytest.raises(ApiError, match="full"):
            await Batcher(Engine(ApiError(429, "full")), 4, 0).run(calls("c", 6))

    asyncio.run(main())
