"""``jaxkv bench``: what it sends, what it measures, and how it fails."""

import json
import shutil

import numpy as np
import pytest

from jaxkv.commands import bench, load
from jaxkv.commands.load import Load, Record, conversations
from tests.text_models import SMALL, small_model


def measure(server, tmp_path, *args: str) -> dict:
    file = tmp_path / "out.json"
    assert bench.main(["--url", server.url, "--api-key", "secret", "--json", str(file), *args]) == 0
    return json.loads(file.read_text())


def test_what_is_sent():
    random, again = (list(conversations(Load(num_requests=5, input_len=7, seed=1))) for _ in range(2))
    assert random == again != list(conversations(Load(num_requests=5, input_len=7, seed=2)))
    assert [[len(turn) for turn in talk] for talk in random] == [[7]] * 5
    shared = [talk[0] for talk in conversations(Load("shared-prefix", num_requests=4, input_len=7, prefix_len=9))]
    assert len({tuple(prompt[:9]) for prompt in shared}) == 1 and len({tuple(prompt[9:]) for prompt in shared}) == 4
    talks = list(conversations(Load("multi-turn", num_requests=10, turns=4)))
    assert [len(talk) for talk in talks] == [4, 4, 2]


@pytest.mark.parametrize("workload", ["random", "shared-prefix", "multi-turn"])
def test_counts_are_exact(server, tmp_path, capsys, workload):
    first = len(server.engine.requests)
    report = measure(server, tmp_path, "--workload", workload, "--num-requests", "8", "--concurrency", "3", "--input-len", "10",
                     "--prefix-len", "20", "--output-len", "5", "--turns", "4")
    sent, found = server.engine.requests[first:], report["summary"]
    assert len(sent) == found["requests"] == 8 and found["failed"] == 0
    assert found["output_tokens"] == 40 and found["prompt_tokens"] == sum(len(request.prompt) for request in sent)
    per_prompt = {"random": [10] * 8, "shared-prefix": [30] * 8, "multi-turn": [10, 25, 40, 55] * 2}[workload]
    assert sorted(len(request.prompt) for request in sent) == sorted(per_prompt)
    assert found["cached_tokens"] == sum(n // 2 for n in per_prompt)  # as the fake engine says
    assert all(request.params.ignore_eos and request.params.temperature == 0 for request in sent)
    records = [Record(**record) for record in report["requests"]]
    assert all(r.due < r.times[0] <= r.times[-1] <= r.end for r in records)
    gaps = np.concatenate([np.diff(r.times) for r in records])
    assert found["itl_ms"]["p90"] == pytest.approx(1e3 * np.percentile(gaps, 90))
    assert found["ttft_ms"]["mean"] == pytest.approx(1e3 * np.mean([r.times[0] - r.due for r in records]))
    out = capsys.readouterr().out
    assert "8 (0 failed)" in out and "first token" in out and f"{100 * found['hit_rate']:.1f} % from the cache" in out


def test_arrivals_keep_their_rate_and_waiting_counts(server, tmp_path):
    report = measure(server, tmp_path, "--num-requests", "12", "--request-rate", "100", "--concurrency", "1",
                     "--input-len", "4", "--output-len", "4")
    due = [record["due"] for record in report["requests"]]
    assert 0.02 < due[-1] - due[0] < 0.6
    waited = [record["times"][0] - record["due"] for record in report["requests"]]
    assert waited[-1] > 2 * waited[0], "one at a time: the last waited for those before it"


def test_percentiles():
    values = [5.0, 1.0, 9.0, 2.0]
    assert [bench.percentile(values, p) for p in (0, 50, 90, 99, 100)] == pytest.approx(
        np.percentile(values, (0, 50, 90, 99, 100)))


def test_failures_are_counted_and_exit_with_1(server, capsys):
    code = bench.main(["--url", server.url, "--api-key", "secret", "--num-requests", "3", "--input-len", "6000"])
    out = capsys.readouterr().out
    assert code == 1 and "3 (3 failed)" in out and "3 failed: prompt: 6000 tokens do not fit" in out


def test_a_request_without_end_is_given_up(server, tmp_path, capsys):
    code = bench.main(["--url", server.url, "--api-key", "secret", "--num-requests", "2", "--output-len", "4000",
                       "--timeout", "0.2"])
    assert code == 1 and "2 failed: no end after 0.2 s" in capsys.readouterr().out


@pytest.mark.parametrize(("args", "words"), [
    (["--url", "{url}"], "missing or wrong API key"), (["--num-requests", "0"], "num_requests must be at least 1"),
    (["--request-rate", "0"], "request_rate must be a positive"), (["--timeout", "nan"], "timeout must be a positive"),
    (["--url", "{url}", "--", "--port", "1"], "--port is for a server to start"), (["--url", "ftp://x"], "url must look like"),
    (["--", "--page-size", "0"], "the server ended with exit code 2"),
])
def test_what_cannot_work_is_one_line(server, capsys, args, words):
    with pytest.raises(SystemExit) as end:
        bench.main([arg.format(url=server.url) for arg in args])
    assert end.value.code == 2 and words in capsys.readouterr().err


def test_a_server_of_its_own(tmp_path, capsys):
    shutil.copytree(small_model(), tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"vocab_size": load.LAST_ID + 1}))
    small = SMALL | {"max_num_seqs": 2, "max_num_batched_tokens": 16}
    options = [part for name, value in small.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    load_options = ["--workload", "multi-turn", "--num-requests", "4", "--input-len", "20", "--output-len", "4"]
    assert bench.main([*load_options, "--json", str(tmp_path / "out.json"), "--", "--model", str(file.parent), *options]) == 0
    assert "ready: http://127.0.0.1:" in capsys.readouterr().err
    found = json.loads((tmp_path / "out.json").read_text())["summary"]
    assert (found["prompt_tokens"], found["output_tokens"]) == (20 + 44 + 68 + 92, 16)
    assert found["cached_tokens"] >= 20 + 40 + 64, "each turn finds the one before"
