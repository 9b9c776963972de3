"""An idle engine waits for the rest of a burst, for a small share of what its prompts will take."""

import threading
import time

import pytest
from serve_fakes import FakeEngine, raw_post, serving, wait_for

from jaxkv.params import SamplingParams
from jaxkv.serve import burst
from jaxkv.serve.burst import LONGEST_S, MANY, SHARE, Burst
from jaxkv.serve.calls import Call, Mailbox


def call(tokens):
    return Call("id", [1] * tokens, SamplingParams(), Mailbox())


def test_patience_follows_the_pace_of_steps():
    its = Burst()
    assert its.patience([call(1000)]) == 0, "nothing is known yet"
    its.note(1000, 0.001)  # submitted now
    its.note(1001, 0.5)  # waited for the thousand
    assert its.patience([call(100), call(300)]) == pytest.approx(SHARE * 0.0005 * 400)
    assert its.patience([call(10**6)]) == LONGEST_S
    before = its.patience([call(100)])
    its.note(1001 + MANY - 1, 0.009)
    its.note(3000, 1e-9)  # waited for a step of few tokens: no measure of the pace
    assert its.patience([call(100)]) == before
    its.note(3000, 0.2)  # a quicker one
    assert its.patience([call(100)]) < before / 2


def test_settles_when_nothing_more_comes(monkeypatch):
    """Each arrival starts a new gap; the patience ends it in any case."""
    monkeypatch.setattr(burst, "GAP_S", 0.3)
    for longest, expected in ((30.0, 3), (0.1, 1)):
        its, wakeup, calls = Burst(), threading.Condition(), [call(1)]
        monkeypatch.setattr(its, "patience", lambda calls, longest=longest: longest)

        def arrive(wakeup=wakeup, calls=calls):
            for _ in range(2):
                time.sleep(0.15)
                with wakeup:
                    calls.append(call(1))
                    wakeup.notify()

        thread = threading.Thread(target=arrive)
        thread.start()
        with wakeup:
            start = time.monotonic()
            its.settle(wakeup, calls)
            assert len(calls) == expected and time.monotonic() - start < 10
        thread.join()


@pytest.mark.parametrize("token_seconds, together", [(0.0, 1), (1.0, 2)])
def test_the_first_step_takes_the_whole_burst(tokenizer, monkeypatch, token_seconds, together):
    monkeypatch.setattr(burst, "GAP_S", 2.0)
    monkeypatch.setattr(burst, "LONGEST_S", 1.0)

    class Counting(FakeEngine):
        steps = ()

        def step(self):
            self.steps += (len(self.children),)
            return super().step()

    with serving(lambda: Counting(tokenizer, step_seconds=0.01)) as server:
        wait_for(lambda: server.engine is not None)
        server.loop._burst._token_s = token_seconds
        socks = []
        for _ in range(2):
            socks.append(raw_post(server.url, prompt="a" * 100, max_tokens=30, ignore_eos=True))
            time.sleep(0.2)
        wait_for(lambda: server.engine.steps)
        assert server.engine.steps[0] == together
        wait_for(lambda: not server.loop.calls)
        for sock in socks:
            sock.close()
