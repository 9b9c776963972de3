"""What /metrics says of requests, to the token, and that the dashboard asks for nothing it does not say."""

import json
import re
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from serve_fakes import FakeEngine, serving

DASHBOARD = Path(__file__).parents[2] / "jaxkv" / "serve" / "grafana.json"


def samples(server):
    """{name: {labels without the model: value}} of /metrics."""
    out: dict[str, dict] = {}
    for family in text_string_to_metric_families(httpx.get(f"{server.url}/metrics").text):
        for s in family.samples:
            out.setdefault(s.name, {})[tuple(v for k, v in s.labels.items() if k != "model_name")] = s.value
    return out


@pytest.fixture(scope="module")
def server(tokenizer):
    with serving(lambda: FakeEngine(tokenizer, step_seconds=0.002)) as server:
        yield server


def test_every_request_is_counted_once_with_its_usage(server):
    prompt = answer = 0
    for body in ({"max_tokens": 5}, {"max_tokens": 3, "n": 3}, {"max_tokens": 4, "prompt": ["a b", "c"]},
                 {"max_tokens": 50, "stop": "naïve"},
                 {"max_tokens": 9, "stream": True, "stream_options": {"include_usage": True}}):
        response = httpx.post(f"{server.url}/v1/completions", json={"prompt": "one two three", "ignore_eos": True} | body)
        usage = json.loads(response.text.split("data: ")[-2])["usage"] if "stream" in body else response.json()["usage"]
        prompt, answer = prompt + usage["prompt_tokens"], answer + usage["completion_tokens"]
    found = samples(server)
    assert found["vllm:request_prompt_tokens_sum"][()] == prompt == found["vllm:prompt_tokens_total"][()]
    assert found["vllm:request_generation_tokens_sum"][()] == answer == found["vllm:generation_tokens_total"][()]
    for name in ("e2e_request_latency_seconds", "time_to_first_token_seconds", "request_queue_time_seconds",
                 "request_prefill_time_seconds", "request_decode_time_seconds", "request_params_n",
                 "request_generation_tokens"):
        assert found[f"vllm:{name}_count"][()] == 6, name  # prompts, of which one request had two
    children = 1 + 3 + 2 + 1 + 1
    assert found["vllm:inter_token_latency_seconds_count"][()] == answer - children
    assert sum(found["vllm:request_success_total"].values()) == children
    parts = sum(found[f"vllm:request_{part}_time_seconds_sum"][()] for part in ("queue", "prefill", "decode"))
    assert 0.9 < parts / found["vllm:e2e_request_latency_seconds_sum"][()] <= 1.001


def test_dashboard_asks_for_what_there_is(server):
    board = json.loads(DASHBOARD.read_text())
    queries = [target["expr"] for panel in board["panels"] for target in panel.get("targets", ())]
    queries += [variable["definition"] for variable in board["templating"]["list"] if "definition" in variable]
    known = set(samples(server)) | {"jaxkv:cache_curve_hit_rate"}  # the curve needs traffic in a real cache
    asked = {name for query in queries for name in re.findall(r"\b(?:vllm|jaxkv):\w+|\bprocess_\w+", query)}
    assert len(queries) > 30 and len(asked) > 20 and asked <= known, asked - known
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
