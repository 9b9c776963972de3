"""An idle engine waits for the rest of a burst, for a small share of what its prompts would take."""

import threading
import time

import pytest
from serve_fakes import FakeEngine, raw_post, serving, wait_for

from jaxkv.params import SamplingParams
from jaxkv.serve import burst
from jaxkv.serve.burst import LONGEST_S, SHARE, settle
from jaxkv.serve.calls import Call, Mailbox


def call(tokens):
    return Call("id", [1] * tokens, SamplingParams(), Mailbox())


class Clock(threading.Condition):
    """A condition in whose waits the time goes on, up to the next of some arrivals of prompts of a token."""

    def __init__(self, monkeypatch, calls, arrivals):
        super().__init__()
        self.now, self.calls, self.arrivals = 0.0, calls, list(arrivals)
        monkeypatch.setattr(burst.time, "monotonic", lambda: self.now)

    def wait_for(self, predicate, timeout):
        end = self.now + timeout
        while self.arrivals and self.arrivals[0] <= end:
            self.now = self.arrivals.pop(0)
            self.calls.append(call(1))
            if predicate():
                return True
        self.now = end
        return False


@pytest.mark.parametrize("token_seconds, arrivals, taken, end", [
    (0.0, [0.0001], 1, 0.0),  # the pace is not known
    (10.0, [], 1, 0.002),  # alone: a gap
    (10.0, [0.001, 0.0025, 0.004], 4, 0.006),  # a gap behind the last
    (10.0, [0.001, 0.0035], 2, 0.003),  # the last comes too late
    (0.05, [0.0005, 0.0019], 3, 0.003),  # 2 % of three tokens' 150 ms: patience grows with the prompts
    (0.05, [0.0011], 1, 0.001),
    (1e6, [0.0015 * i for i in range(1, 30)], 14, LONGEST_S)])
def test_settles(monkeypatch, token_seconds, arrivals, taken, end):
    assert SHARE == 0.02
    calls = [call(1)]
    clock = Clock(monkeypatch, calls, arrivals)
    settle(clock, calls, lambda tokens: token_seconds * tokens)
    assert len(calls) == taken and clock.now == pytest.approx(end)


@pytest.mark.parametrize("together", [1, 2])
def test_the_first_step_takes_the_whole_burst(tokenizer, monkeypatch, together):
    monkeypatch.setattr(burst, "GAP_S", 2.0)
    monkeypatch.setattr(burst, "LONGEST_S", 2.0)

    class Counting(FakeEngine):
        steps = ()

        def step(self):
            self.steps += (len(self.children),)
            return super().step()

    with serving(lambda: Counting(tokenizer, step_seconds=0.01)) as server:
        wait_for(lambda: server.engine is not None)
        server.engine.token_seconds = 0.0 if together == 1 else 10.0
        socks = [raw_post(server.url, prompt="a" * 100, max_tokens=30, ignore_eos=True)]
        if together == 1:
            wait_for(lambda: server.engine.steps, 1.0)
        else:
            time.sleep(0.1)
        socks.append(raw_post(server.url, prompt="a" * 100, max_tokens=30, ignore_eos=True))
        wait_for(lambda: server.engine.steps)
        assert server.engine.steps[0] == together
        wait_for(lambda: not server.loop.calls)
        for sock in socks:
            sock.close()
