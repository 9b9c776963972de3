"""lm-evaluation-harness scores through echo and logprobs: what it gets must be the dense forward's."""

import importlib
import importlib.util
import json
import os

import pytest

PAIRS = [
    ("def add(first, second):\n    return first", " + second\n"), ("import os\nimport", " sys\n"), ("for i in", " range(10):"),
    ("The cat sat on the", " mat"), ("alpha -> red blue\nbeta -> green stone\nalpha ->", " red blue"), ("x = [1, 2,", " 3]"),
    ("class Stack:\n    def push(self, item):\n        self.items", ".append(item)"), ("日本", "語の"), ("return", " None"),
    ("def add(first, second):\n    return first", " - second\n"),
]


pytestmark = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed: extra clients")


@pytest.fixture(scope="module")
def harness(server):
    """The harness's model and its class of requests."""
    models = importlib.import_module("lm_eval.models.openai_completions")
    instance = importlib.import_module("lm_eval.api.instance").Instance
    os.environ["OPENAI_API_KEY"] = server.key
    return models.LocalCompletionsAPI(
        model=server.model, base_url=f"{server.url}/completions", tokenizer=server.tokenizer, tokenizer_backend="huggingface",
        num_concurrent=2, max_retries=1, max_length=512), instance


def test_loglikelihood_is_the_dense_forwards(harness, python):
    model, instance = harness
    requests = [instance("loglikelihood", {}, pair, index) for index, pair in enumerate(PAIRS)]
    found = model.loglikelihood(requests, disable_tqdm=True)
    again = model.loglikelihood(requests, disable_tqdm=True)
    assert [score for score, _ in again] == pytest.approx([score for score, _ in found], abs=2e-3), "with the prompts cached"
    tokens = [model._encode_pair(*pair) for pair in PAIRS]
    dense = json.loads(python("-m", "tests.clients.dense", stdin=json.dumps([context + rest for context, rest in tokens])))
    for pair, (_, rest), rows, (score, greedy) in zip(PAIRS, tokens, dense, found):
        tail = rows[-len(rest):]
        assert score == pytest.approx(sum(logprob for logprob, _ in tail), abs=2e-3), pair
        assert greedy == all(best for _, best in tail), pair
    assert len({round(score, 3) for score, _ in found}) == len(PAIRS)


def test_rolling_and_generation(harness):
    model, instance = harness
    text = "def add(first, second):\n    return first + second\n" * 3
    rolling = model.loglikelihood_rolling([instance("loglikelihood_rolling", {}, (text,), 0)], disable_tqdm=True)
    assert -500 < rolling[0] < 0

    def generate(until: str) -> str:
        settings = {"until": [until], "max_gen_toks": 16, "temperature": 0}
        return model.generate_until([instance("generate_until", {}, (PAIRS[0][0], settings), 0)], disable_tqdm=True)[0]

    whole = generate("\n\n\n")
    stop = whole[len(whole) // 2:][:4]
    assert len(whole) > 8 and generate(stop) == whole[:whole.index(stop)]
