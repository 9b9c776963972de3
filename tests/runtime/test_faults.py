"""One sequence's NaN, one lost step, one crash of the detokenizer: nobody else notices."""

import jax
import jax.numpy as jnp
import pytest

from jaxkv.params import SamplingParams
from tests.engine_harness import engine, executor, greedy, run_all

GOOD = [5, 9, 2, 33, 14, 60, 7, 21, 40, 3, 18, 25, 50, 11]
CURSED = 13  # the embedding of this token is NaN
BAD = [*GOOD[:9], CURSED, 3]


@pytest.fixture
def run():
    return engine(executor(False))


@pytest.fixture
def cursed(run):
    """An engine whose model gives NaN for every sequence that holds CURSED."""
    params = run.executor.params
    embedding = params[0]
    assert isinstance(embedding, jax.Array) and embedding.shape == (67, 32)
    run.executor.params = (embedding.at[CURSED].set(jnp.nan), *params[1:])
    yield run
    run.executor.params = params


@pytest.mark.parametrize("how", [
    {}, {"temperature": 1.0, "seed": 3}, {"temperature": 0.7, "seed": 3, "top_k": 5, "top_p": 0.9}, {"logprobs": 3},
    {"presence_penalty": 1.0}, {"n": 3, "temperature": 1.0, "seed": 1}], ids=str)
def test_nan_ends_its_sequence_only(cursed, how):
    params = SamplingParams(**({"temperature": 0.0, "max_tokens": 6, "logit_bias": {CURSED: -100.0}} | how))
    alone = run_all(engine(executor(False)), {"good": (GOOD, params)})
    both = run_all(cursed, {"bad": (BAD, params), "good": (GOOD, params), "bad again": (BAD, params)})
    for name, result in both.items():
        if name.startswith("bad"):
            assert [d.finish_reason for d in result.deltas] == ["error"] and not result.tokens
        else:
            assert result.tokens == alone[name].tokens and result.deltas[-1].finish_reason == "length"
    assert cursed.metrics.finished["error"] == 2 * params.n
    assert all(t >= 0 for r in both.values() for t in r.tokens)


def test_nan_in_mid_answer_and_in_a_long_prompt(cursed):
    """A token that the model chose, and one in a chunk long before the first logits."""
    bias = {CURSED: 100.0}
    result = run_all(cursed, {"r": (GOOD, greedy(6, logit_bias=bias))})["r"]
    assert result.tokens == [CURSED] and result.deltas[-1].finish_reason == "error"
    long = [CURSED, *GOOD * 4]
    results = run_all(cursed, {"long": (long, greedy(3)), "good": (GOOD, greedy(3))})
    assert results["long"].deltas[-1].finish_reason == "error" and len(results["good"].tokens) == 3
    cursed.executor.params = (executor(False).params[0].at[CURSED].set(0.5), *cursed.executor.params[1:])
    healed = run_all(cursed, {"long": (long, greedy(3))})["long"]  # nothing of it was in the cache
    assert len(healed.tokens) == 3 and healed.deltas[0].num_cached_tokens == 0


def lose(run, monkeypatch, times):
    """The next ``times`` steps find no memory before they take the state."""
    left = [times]

    def failing(step):
        def call(params, state, *inputs):
            if left[0]:
                left[0] -= 1
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1099511627776 bytes.")
            return step(params, state, *inputs)
        return call

    monkeypatch.setattr(run.executor, "steps", {shape: failing(step) for shape, step in run.executor.steps.items()})


def test_a_step_without_memory_fails_its_requests_only(run, monkeypatch, caplog):
    alone = run_all(engine(executor(False)), {"r": (GOOD, greedy(8))})["r"].tokens
    run.add_request("early", GOOD, greedy(30))
    for _ in range(5):
        run.step()
    lose(run, monkeypatch, 1)
    run.add_request("late", GOOD + [1], greedy(8))
    reasons = {}
    for delta in run.step():  # the step that is lost: both are in it, and it is learnt at once
        if delta.finish_reason:
            reasons[delta.request_id] = delta.finish_reason
    assert reasons == {"early": "error", "late": "error"}
    run.add_request("next", GOOD, greedy(8))
    tokens = []
    while run.has_work:
        for delta in run.step():
            if delta.request_id == "next":
                tokens += delta.token_ids
            if delta.finish_reason:
                reasons[delta.request_id] = delta.finish_reason
        run.check()
    assert reasons == {"early": "error", "late": "error", "next": "length"} and tokens == alone
    assert caplog.text.count("memory ran out") == 1
    assert run_all(run, {"again": (GOOD, greedy(8))})["again"].tokens == alone


def test_a_crash_of_the_detokenizer_ends_its_sequence_only(run, caplog):
    class Panic(BaseException):
        """As a panic in Rust arrives."""

    def crash(event):
        raise Panic("bad byte")

    for name in ("bad", "good"):
        run.add_request(name, GOOD, greedy(5))
    run._outputs["bad#0"].process = crash
    reasons = {}
    while run.has_work:
        for delta in run.step():
            reasons[delta.request_id] = delta.finish_reason
        run.check()
    assert reasons == {"bad": "error", "good": "length"} and "bad byte" in caplog.text and not run._children


def test_a_page_out_of_the_pool_is_found_before_the_step_runs(run, monkeypatch):
    take = run.scheduler.cache.store.hbm[0].take_many
    monkeypatch.setattr(run.scheduler.cache.store.hbm[0], "take_many", lambda n: [*take(n)[:-1], 10**6])
    run.add_request("r", GOOD, greedy(3))
    with pytest.raises(ValueError, match=r"sequence 0: page \d+ of its table must be in \[0, \d+\), got 1000000"):
        run.step()
