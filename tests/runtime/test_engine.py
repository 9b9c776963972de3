"""What a request gets from the engine: sampling features checked against the dense oracle, computed-token counts,
aborts, preemption, and that serving compiles nothing."""

import random

import jax
import numpy as np
import pytest

from jaxkv.params import CacheHints, SamplingParams
from jaxkv.types import Admit, Chunk, StepPlan
from tests.engine_harness import BUDGET, POOL, engine, executor, greedy, model, run_all
from tests.oracle import DenseOracle

PROMPT = [5, 9, 2, 33, 14, 60, 7, 21, 40, 3, 18, 25, 50, 11]


@pytest.fixture
def run(highest_precision):
    return engine(executor(False))


@pytest.fixture(scope="module")
def oracle():
    spec, params, _ = model(False)
    return DenseOracle(spec, params)


def log_softmax(rows):
    rows = rows.astype(np.float64)
    return rows - np.log(np.exp(rows - rows.max(-1, keepdims=True)).sum(-1, keepdims=True)) - rows.max(-1, keepdims=True)


def test_children_compute_the_prompt_once(run):
    results = run_all(run, {"r": (PROMPT, greedy(6, n=4))})
    assert len({tuple(r.tokens) for r in results.values()}) == 1
    assert run.metrics.computed_tokens == len(PROMPT) + 3 * 1 + 4 * 5
    assert run.scheduler.cache.stats.partial_copies == 3, "the prompt ends inside a page"


def test_a_later_turn_computes_only_what_is_new(run):
    history = list(PROMPT)
    for turn in range(4):
        before = run.metrics.computed_tokens
        result = run_all(run, {f"t{turn}": (history, greedy(5))})[f"t{turn}"]
        new = len(PROMPT) if turn == 0 else 1 + 3  # the last token of the answer never had KV
        assert run.metrics.computed_tokens - before == new + 4
        history += [*result.tokens, 1, 2, 3]


def test_shared_prefix_of_requests_that_arrive_together_is_computed_once(run):
    base = (PROMPT * 2)[:20]  # five whole pages
    run_all(run, {f"r{i}": ([*base, 30 + i], greedy(1)) for i in range(4)})
    assert run.metrics.computed_tokens == 20 + 4 and run.metrics.steps == 1


def test_logprobs_are_the_dense_ones(run, oracle):
    result = run_all(run, {"r": (PROMPT, greedy(6, logprobs=5))})["r"]
    expected = log_softmax(oracle.logits([*PROMPT, *result.tokens])[len(PROMPT) - 1 : -1])
    got = [item for d in result.deltas for item in d.logprobs]
    for row, token, item in zip(expected, result.tokens, got, strict=True):
        assert item.token_id == token and item.rank == 1 == 1 + (row > row[token]).sum()
        assert abs(item.logprob - row[token]) < 1e-4
        np.testing.assert_allclose([v for _, v in item.top[:5]], np.sort(row)[::-1][:5], atol=1e-4)


def test_prompt_logprobs_are_complete_though_the_prompt_is_cached(run, oracle):
    prompt = PROMPT * 3  # more than one chunk of the slices
    run_all(run, {"warm": (prompt, greedy(1))})
    result = run_all(run, {"r": (prompt, greedy(2, prompt_logprobs=2))})["r"]
    got = result.deltas[0].prompt_logprobs
    expected = log_softmax(oracle.logits(prompt))
    assert [item.token_id for item in got] == prompt[1:]
    np.testing.assert_allclose([item.logprob for item in got],
                               [expected[i, t] for i, t in enumerate(prompt[1:])], atol=1e-4)
    plain = run_all(run, {"again": (prompt, greedy(2))})["again"]
    assert plain.tokens == result.tokens and plain.deltas[0].num_cached_tokens == len(prompt) - 1


def penalised(rows, prompt, tokens, params):
    """Greedy tokens under penalties, one after the other, from dense logits along ``tokens``."""
    out = []
    for i in range(len(tokens)):
        row = rows[len(prompt) - 1 + i].astype(np.float64).copy()
        for t in set(prompt) | set(tokens[:i]):
            row[t] = row[t] / params.repetition_penalty if row[t] > 0 else row[t] * params.repetition_penalty
        for t in set(tokens[:i]):
            row[t] -= params.presence_penalty + params.frequency_penalty * tokens[:i].count(t)
        out.append(int(row.argmax()))
    return out


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("pages", [POOL, 20], ids=["roomy", "preempted"])
def test_penalties_are_exact_with_overlap_and_after_preemption(overlap, pages, oracle, highest_precision):
    run = engine(executor(False), overlap=overlap, pages=pages)
    params = greedy(24, repetition_penalty=1.4, presence_penalty=0.7, frequency_penalty=0.9)
    results = run_all(run, {f"r{i}": ([*PROMPT, 20 + i], params) for i in range(4)})
    assert (run.metrics.preemptions > 0) == (pages == 20)
    for r in results.values():
        rows = oracle.logits([*r.prompt, *r.tokens])
        assert r.tokens == penalised(rows, r.prompt, r.tokens, params)
    plain = run_all(engine(executor(False)), {"r": ([*PROMPT, 20], greedy(24))})["r"]
    assert plain.tokens != results["r0"].tokens, "the penalties mattered"


def test_stop_ids_are_banned_until_min_tokens_and_end_the_sequence_after(run):
    free = run_all(run, {"r": (PROMPT, greedy(12))})["r"].tokens
    stop = free[0]
    cut = run_all(run, {"s": (PROMPT, greedy(12, stop_token_ids=(stop,)))})["s"]
    assert cut.tokens == [stop] and cut.deltas[-1].finish_reason == "stop" and cut.deltas[-1].stop_reason == stop
    held = run_all(run, {"m": (PROMPT, greedy(12, stop_token_ids=(stop,), min_tokens=5))})["m"]
    assert len(held.tokens) >= 5 and stop not in held.tokens[:4]


@pytest.mark.parametrize("size", [2**31 - 1, 2**31, 2**63 - 1, 2**63, 10**30])
def test_no_number_is_too_large_for_the_device(run, size):
    """Each is refused where it comes in, or does no harm: a column of 32 bits that overflows would end the server."""
    fields = ("min_tokens", "max_tokens", "seed", "top_k", "n", "logprobs", "prompt_logprobs", "temperature", "top_p", "min_p",
              "repetition_penalty", "presence_penalty", "frequency_penalty")
    refused = set()
    for name, value in [*((name, size) for name in fields), ("seed", -size), ("stop_token_ids", (size,)),
                        ("logit_bias", {size: 1.0}), ("logit_bias", {1: size}), ("priority", size), ("retention", size)]:
        hints = {name: value} if name in ("priority", "retention") else {}
        params = {"max_tokens": None, "temperature": 1.0, "presence_penalty": 1.0} | ({} if hints else {name: value})
        try:
            run.add_request(name, PROMPT, SamplingParams(**params), CacheHints(**hints))
        except ValueError as error:
            assert str(error).startswith(name)
            refused.add(name)
        while run.has_work:
            run.step()
    assert "min_tokens" in refused and not {"max_tokens", "top_k"} & refused
    with pytest.raises(ValueError, match="prompt holds token id"):
        run.add_request("prompt", [1, size], greedy(1))


def test_min_tokens_may_be_all_that_the_window_leaves(run):
    room = run.max_model_len - len(PROMPT)
    params = greedy(None, stop_token_ids=tuple(range(20)), min_tokens=room)
    assert len(run_all(run, {"r": (PROMPT, params)})["r"].tokens) == room
    with pytest.raises(ValueError, match=f"min_tokens must be at most {room}, what the prompt leaves of max_model_len, got"):
        run.add_request("more", PROMPT, greedy(None, min_tokens=room + 1))


def test_any_of_several_eos_ids_ends_an_answer(run):
    free = run_all(run, {"r": (PROMPT, greedy(12))})["r"].tokens
    seen = list(dict.fromkeys(free))
    run.eos_ids = (seen[3], 66, seen[2])
    cut = run_all(run, {"e": (PROMPT, greedy(12))})["e"]
    assert cut.tokens == free[: free.index(seen[2]) + 1]
    assert (cut.deltas[-1].finish_reason, cut.deltas[-1].stop_reason) == ("stop", None)
    assert run_all(run, {"i": (PROMPT, greedy(12, ignore_eos=True))})["i"].tokens == free


def test_logit_bias_decides(run):
    tokens = run_all(run, {"r": (PROMPT, greedy(4, logit_bias={42: 100.0}))})["r"].tokens
    assert tokens == [42] * 4


def test_noise_depends_on_seed_and_child_only(highest_precision):
    params = SamplingParams(temperature=1.5, max_tokens=10, seed=7, n=2)
    alone = run_all(engine(executor(False)), {"r": (PROMPT, params)})
    crowd = engine(executor(False), budget=12, pages=24, overlap=False)
    others = {f"x{i}": ([i + 1] * (3 + 5 * i), SamplingParams(temperature=2.0, max_tokens=20, seed=i)) for i in range(5)}
    mixed = run_all(crowd, {**others, "r": (PROMPT, params)})
    assert alone["r/0"].tokens == mixed["r/0"].tokens and alone["r/1"].tokens == mixed["r/1"].tokens
    assert alone["r/0"].tokens != alone["r/1"].tokens


def test_abort_at_any_moment_frees_everything(run):
    rng = random.Random(0)
    for round_ in range(12):
        for i in range(6):
            run.add_request(f"{round_}.{i}", [rng.randrange(67) for _ in range(rng.randrange(1, 40))], greedy(15))
        for _ in range(rng.randrange(0, 12)):
            run.step()
            run.check()
        for i in rng.sample(range(6), 6):
            run.abort(f"{round_}.{i}")
            run.check()
    while run.has_work:
        run.step()
    run.check()
    assert run.metrics.running == run.metrics.waiting == 0 and run.metrics.device.pages_active == 0
    assert len(run_all(run, {"after": (PROMPT, greedy(3))})["after"].tokens) == 3


@pytest.mark.parametrize("prompt, params, words", [
    ([], {}, "prompt must hold"),
    ([1] * 64, {}, "max_model_len is 64"),
    ([1, 67], {}, "token id 67"),
    ([1], dict(logit_bias={99: 1.0}), "logit_bias holds token id 99"),
    ([1], dict(stop=("x",)), "stop needs a tokenizer"),
])
def test_bad_requests_name_the_field_and_leave_nothing(run, prompt, params, words):
    with pytest.raises(ValueError, match=words):
        run.add_request("bad", prompt, SamplingParams(max_tokens=2, **params))
    assert not run.has_work
    run.add_request("bad", [1], greedy(1))  # the id is free


def test_all_pool_layouts_and_the_host_tier_give_the_same_tokens(highest_precision):
    requests = {f"r{i}": (PROMPT[: 3 + i] + [30 + i] * (2 + 3 * i), greedy(20)) for i in range(7)}
    runs = [run_all(engine(executor(True, layout=layout), pages=20, host_pages=40), requests)
            for layout in ("head_major", "token_major", "paired")]
    tokens = [[r.tokens for r in run.values()] for run in runs]
    assert tokens[0] == tokens[1] == tokens[2]


def test_bfloat16_stays_close_to_the_dense_forward():
    """Contract in bfloat16 on this model: log-probabilities within 0.35 of the float32 oracle's along the engine's
    tokens (0.05 on average), and at least 85 % of the greedy tokens agree."""
    spec, params, _ = model(True)
    oracle = DenseOracle(spec, params)
    run = engine(executor(True, dtype="bfloat16"), pages=20, host_pages=40)
    rng = np.random.default_rng(0)
    requests = {f"r{i}": (rng.integers(0, 67, int(rng.integers(4, 30))).tolist(), greedy(20, logprobs=1)) for i in range(10)}
    results = run_all(run, requests)
    assert run.metrics.preemptions > 0
    errors, agree = [], []
    for r in results.values():
        rows = log_softmax(oracle.logits([*r.prompt, *r.tokens])[len(r.prompt) - 1 : -1])
        got = [item.logprob for d in r.deltas for item in d.logprobs]
        errors += [abs(row[t] - g) for row, t, g in zip(rows, r.tokens, got, strict=True)]
        agree += [int(row.argmax()) == t for row, t in zip(rows, r.tokens)]
    assert max(errors) < 0.35 and np.mean(errors) < 0.05, (max(errors), np.mean(errors))
    assert np.mean(agree) > 0.85, np.mean(agree)


def test_a_length_beyond_the_pages_of_its_own_sequence_is_refused(highest_precision):
    """Though the slot's last sequence left pages there, which exist."""
    run = executor(False)
    admit = Admit(0, "r", SamplingParams(), 0, 0, 12, (), ())
    chunk = lambda *pages: Chunk("r", 0, 0, tuple(range(12)), 1, ((0, pages),))  # noqa: E731
    assert run.submit(StepPlan(1, admits=(admit,), chunks=(chunk(5, 6, 7),))).read().tokens
    fewer = chunk(11, 12)
    for plan in (StepPlan(2, chunks=(fewer,)), StepPlan(3, admits=(admit,), chunks=(fewer,)),
                 StepPlan(4, admits=(admit,), chunks=(chunk(),))):
        with pytest.raises(ValueError, match=r"page [02] of its table must be in \[0, 160\), got -1"):
            run.submit(plan)


def test_a_thousand_requests_with_every_feature_compile_nothing(highest_precision):
    run = engine(executor(True), pages=20, host_pages=40, budget=BUDGET)
    rng = random.Random(1)
    base = [rng.randrange(67) for _ in range(40)]

    def params() -> SamplingParams:
        pick = lambda *values: rng.choice(values)  # noqa: E731
        return SamplingParams(
            n=pick(1, 1, 1, 3), temperature=pick(0.0, 0.7, 1.3), top_k=pick(0, 5), top_p=pick(1.0, 0.9), min_p=pick(0.0, 0.1),
            repetition_penalty=pick(1.0, 1.2), presence_penalty=pick(0.0, 0.5), frequency_penalty=pick(0.0, 0.5),
            logit_bias=pick({}, {3: 1.5}), logprobs=pick(None, 0, 3), prompt_logprobs=pick(None, None, 2),
            seed=pick(None, 5), max_tokens=rng.randrange(2, 8), min_tokens=pick(0, 2), stop_token_ids=pick((), (9, 11)))

    run_all(run, {"warm": (base[:9], params())}, check=False)
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: compiled.append(name) if "backend_compile" in name else None)
    todo = {f"q{i}": (base[: rng.randrange(0, 40)] + [rng.randrange(67) for _ in range(rng.randrange(1, 15))], params())
            for i in range(1000)}
    results = run_all(run, todo, check=False)
    run.check()
    assert not compiled and all(r.tokens for r in results.values())
    m = run.metrics
    assert m.preemptions and m.promotions and m.partial_copies and m.evictions["demoted"]
    jax.jit(lambda x: x + 1)(np.float32(run.metrics.steps))  # the listener works
    assert compiled
