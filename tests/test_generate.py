"""``python -m jaxkv.generate``: formats, bad lines, and coming back after an interruption of any kind."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion

from jaxkv import LLM, SamplingParams
from jaxkv.generate import runner
from jaxkv.generate.__main__ import main
from jaxkv.generate.journal import Journal
from jaxkv.generate.lines import Lines, pipeline
from jaxkv.generate.work import Preparer, Work
from tests.text_models import SMALL, small_llm, small_model

ROOT = Path(__file__).parent.parent
ENGINE_ARGS = [part for name, value in SMALL.items() for part in (f"--{name.replace('_', '-')}", str(value))]


@pytest.fixture(scope="module")
def model_dir() -> Path:
    return small_model()


@pytest.fixture(scope="module")
def llm() -> LLM:
    return small_llm()


@pytest.fixture
def generate(llm, monkeypatch, tmp_path):
    """Runs the command in this process on the shared engine: (input text, options) -> (exit code, records by line)."""
    monkeypatch.setattr(runner, "build_engine", lambda config, show_progress: llm.engine)
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"

    def call(text: str, *options: str) -> tuple[int, dict[int, dict]]:
        source.write_text(text)
        code = main(["--input", str(source), "--output", str(target), "--no-progress", *ENGINE_ARGS, *options])
        assert not llm.engine.has_work
        llm.engine.check()
        return code, records_of(target)

    call.source, call.target = source, target
    return call


def records_of(path: Path) -> dict[int, dict]:
    """Every whole record once, by input line."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    by_line = {record["line"]: record for record in records}
    assert len(by_line) == len(records), "a line was answered twice"
    return by_line


def jsonl(*rows) -> str:
    return "".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows)


def batch(name: str, url: str, **body) -> dict:
    return {"custom_id": name, "method": "POST", "url": url, "body": {"model": "any", "temperature": 0, **body}}


def plain_rows(count: int, **fields) -> list[dict]:
    return [{"prompt": f"{number} is a number", "id": f"p{number}", "max_tokens": 4 + number % 7, "ignore_eos": True}
            | fields for number in range(count)]


def test_help_starts_nothing():
    code = ("import sys\nfrom jaxkv.generate.__main__ import main\n"
            "try:\n    main(['--help-all'])\nexcept SystemExit as e:\n"
            "    print(e.code, sorted({'jax', 'numpy', 'grain', 'transformers'} & set(sys.modules)))")
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert out.endswith("0 []\n")
    assert "--block-size" in out
    assert "--max-tokens" in out


def test_every_format(generate, llm):
    ids = llm.get_tokenizer().encode("The quick")
    code, records = generate(jsonl(
        batch("c", "/v1/chat/completions", messages=[{"role": "user", "content": "hi"}], max_tokens=5, n=2),
        batch("t", "/v1/completions", prompt=["The quick"] * 2, max_tokens=5, logprobs=1),
        {"prompt": "The quick", "temperature": 0, "max_tokens": 5, "id": 17, "logprobs": 1},
        "\n", "   \n",
        {"prompt": ids, "temperature": 0, "max_tokens": 5, "n": 2},
    ).rstrip("\n"))
    assert code == 0
    assert sorted(records) == [0, 1, 2, 5]
    params = SamplingParams(temperature=0, max_tokens=5)
    expected = llm.generate("The quick", params, use_tqdm=False)[0].outputs[0]

    chat = records[0]
    assert (chat["custom_id"], chat["error"], chat["response"]["status_code"]) == ("c", None, 200)
    body = ChatCompletion.model_validate(chat["response"]["body"])
    answer = llm.chat([{"role": "user", "content": "hi"}], params, use_tqdm=False)[0]
    assert [choice.message.content for choice in body.choices] == [answer.outputs[0].text] * 2
    assert body.usage.prompt_tokens == len(answer.prompt_token_ids)

    text = Completion.model_validate(records[1]["response"]["body"])
    assert [choice.text for choice in text.choices] == [expected.text] * 2
    assert len(text.choices[0].logprobs.tokens) == len(expected.token_ids)

    first, second = records[2], records[5]
    assert (first["id"], first["prompt"], first["text"]) == (17, "The quick", expected.text)
    assert (first["token_ids"], first["finish_reason"]) == (expected.token_ids, expected.finish_reason)
    assert first["num_prompt_tokens"] == len(ids)
    assert len(first["logprobs"]["token_logprobs"]) == len(expected.token_ids)
    assert second["prompt"] == ids
    assert [output["text"] for output in second["outputs"]] == [expected.text] * 2


def test_usage_says_how_much_of_each_prompt_was_cached_and_where(generate):
    text = jsonl(batch("u", "/v1/completions", prompt=[list(range(20, 60)), list(range(60, 100))], max_tokens=3, n=2,
                       ignore_eos=True))
    generate(text)
    generate.target.unlink()
    usage = generate(text)[1][0]["response"]["body"]["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (80, 12, 92)
    details = usage["prompt_tokens_details"]
    assert set(details["cached_tokens_by_tier"]) == {"hbm", "host", "disk"}
    assert 40 < sum(details["cached_tokens_by_tier"].values()) == details["cached_tokens"] < 80


def test_scored_prompts(generate, llm):
    ask = {"prompt": "The quick", "n": 2, "echo": True, "logprobs": 1, "prompt_logprobs": 1, "temperature": 0}
    code, records = generate(jsonl(batch("t", "/v1/completions", **ask, max_tokens=3), ask | {"max_tokens": 3},
                                   ask | {"max_tokens": 0}, {"prompt": "The quick", "best_of": 2, "max_tokens": 3}))
    assert code == 0
    expected = llm.generate("The quick", SamplingParams(temperature=0, max_tokens=3, prompt_logprobs=1), use_tqdm=False)[0]
    count = len(expected.prompt_token_ids)
    choices = records[0]["response"]["body"]["choices"]
    for row, answer in [*((c, 3) for c in choices), *((o, 3) for o in records[1]["outputs"]), (records[1], 3), (records[2], 0)]:
        assert row["text"] == "The quick" + (expected.outputs[0].text if answer else "")
        assert len(row["logprobs"]["tokens"]) == count + answer
        assert [one and {int(t) for t in one} for one in row["prompt_logprobs"]] == [
            one and set(one) for one in expected.prompt_logprobs]
    assert (records[1]["token_ids"], records[2]["token_ids"]) == (expected.outputs[0].token_ids, [])
    assert set(records[3]) == {"line", "digest", "prompt", "text", "token_ids", "finish_reason", "stop_reason",
                               "num_prompt_tokens", "num_cached_tokens"}, "nothing that was not asked for"


@pytest.mark.parametrize("fault", ["take", "record"])
def test_an_answer_that_cannot_be_worded_is_an_error_and_the_others_go_on(generate, monkeypatch, caplog, fault):
    method = getattr(Work, fault)

    def failing(work, *args):
        if work.number == 1:
            raise ValueError("no words")
        return method(work, *args)

    monkeypatch.setattr(Work, fault, failing)
    code, records = generate(jsonl(*plain_rows(4, n=2)))
    assert code == 0 and [n for n, record in records.items() if "error" in record] == [1]
    assert records[1]["error"]["code"] == "generation_failed" and records[1]["error"]["type"] == "server_error"
    assert "no words" in caplog.text and "line 1" in caplog.text


def test_tools(generate):
    tool = {"type": "function", "function": {"name": "clock"}}
    talk = {"messages": [{"role": "user", "content": "hi"}], "tools": [tool], "max_tokens": 5}
    _, records = generate(jsonl(
        batch("named", "/v1/chat/completions", **talk, tool_choice={"type": "function", "function": {"name": "clock"}}),
        batch("auto", "/v1/chat/completions", **talk)))
    call = ChatCompletion.model_validate(records[0]["response"]["body"]).choices[0].message.tool_calls[0]
    assert call.function.name == "clock" and call.id.startswith("call_")
    assert records[1]["response"]["body"]["error"]["param"] == "tools"  # the template shows no format of calls


def test_lines_of_a_step_without_memory_are_errors_and_the_others_go_on(generate, llm, monkeypatch):
    text = jsonl(*({"prompt": f"{i}", "n": 2, "max_tokens": 4} for i in range(12)))
    _, expected = generate(text)
    generate.target.unlink()
    executor, calls = llm.engine.executor, []

    def failing(step):
        def call(*args):
            calls.append(step)
            if len(calls) == 3:
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1099511627776 bytes.")
            return step(*args)
        return call

    monkeypatch.setattr(executor, "steps", {shape: failing(step) for shape, step in executor.steps.items()})
    code, records = generate(text)
    failed = {line for line, record in records.items() if "error" in record}
    assert code == 0 and 0 < len(failed) < len(records) == 12
    assert all("memory ran out" in records[line]["error"]["message"] for line in failed)
    assert all(records[line]["outputs"] == expected[line]["outputs"] for line in set(records) - failed)


def test_no_grammar_is_compiled_on_the_engines_thread(generate, llm, monkeypatch):
    grammars, ready = llm.engine.grammars, []
    compile_ = grammars.compile

    def watched(structured):
        if threading.current_thread() is threading.main_thread():
            ready.append(grammars.submit(structured).done())
        return compile_(structured)

    monkeypatch.setattr(grammars, "compile", watched)
    generate(jsonl(*({"prompt": "x", "guided_regex": f"[a-z]{{{i}}}7", "max_tokens": 9} for i in range(1, 6))))
    assert ready == [True] * 5


def test_lines_that_follow_something(generate):
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": ["yes", 7]}}}
    code, records = generate(jsonl(
        {"prompt": "x", "guided_regex": "[a-z]{3}-[0-9]{2}", "n": 2, "temperature": 1.5, "max_tokens": 20},
        batch("b", "/v1/completions", prompt="x", response_format=schema, max_tokens=20),
        {"prompt": "x", "structured_outputs": {"regex": "(a"}}))
    assert code == 0
    assert all(re.fullmatch("[a-z]{3}-[0-9]{2}", output["text"]) for output in records[0]["outputs"])
    assert records[1]["response"]["body"]["choices"][0]["text"] in ('"yes"', "7")
    assert records[2]["error"]["param"] == "structured_outputs.regex"


def test_bad_lines_are_records_and_the_others_go_on(generate):
    chat = "/v1/chat/completions"
    code, records = generate(jsonl(
        "{broken\n", "[1]\n", {"custom_id": 3}, batch("url", "/v1/embeddings"),
        {"custom_id": "body", "method": "POST", "url": chat, "body": []},
        batch("role", chat, messages=[{"role": "pirate", "content": "x"}]),
        batch("empty", chat, messages=[]),
        batch("hot", "/v1/completions", prompt="x", temperature=-1),
        batch("stream", "/v1/completions", prompt="x", stream=True),
        batch("get", "/v1/completions", prompt="x") | {"method": "GET"},
        {"prompt": "x", "max_tokens": "many"}, {"prompt": ["a", "b"]}, {"prompt": []}, {"nothing": 1},
        {"prompt": "x " * 300}, batch("long", "/v1/completions", prompt=["ok", "x " * 300], max_tokens=2),
        {"prompt": "x", "stop_token_ids": [4000]}, "{\"prompt\": \"\\ud800\"}\n",
        {"prompt": "good", "max_tokens": 2},
    ))
    assert code == 0
    assert sorted(records) == list(range(19))
    assert records[18]["text"] is not None
    for number in (0, 1, 2):
        assert records[number]["response"] is None
        assert records[number]["error"]["message"]
    errors = {record["custom_id"]: record["response"] for record in records.values() if record.get("custom_id")}
    assert {name: response["status_code"] for name, response in errors.items()} == dict.fromkeys(errors, 400)
    params = {name: response["body"]["error"]["param"] for name, response in errors.items()}
    assert params == {"url": "url", "body": "body", "role": "messages[0].role", "empty": "messages",
                      "hot": "temperature", "stream": "stream", "get": "method", "long": "prompt"}
    plain = {number: records[number]["error"] for number in (10, 11, 12, 13, 14, 16)}
    assert {error["param"] for error in plain.values()} == {"max_tokens", "prompt", "stop_token_ids"}
    assert "max_model_len" in plain[14]["message"]
    assert records[17]["error"]["code"] == "invalid_json_line"


@pytest.mark.parametrize("line", [
    '{"custom_id": "x", "method": "POST", "url": "/v1/completions", "body": {"prompt": "x", "user": DEEP}}',
    '{"prompt": DEEP}', '{"prompt": "x", "max_tokens": 2, "id": DEEP}', '{"custom_id": DEEP}'])
def test_a_line_that_is_nested_too_deeply_is_an_error_and_the_others_go_on(generate, line):
    line = line.replace("DEEP", "[" * 300 + "]" * 300)
    code, records = generate(jsonl({"prompt": "a", "max_tokens": 2}, line + "\n", {"prompt": "b", "max_tokens": 2}))
    assert code == 0 and [n for n, record in records.items() if record.get("error")] == [1]
    assert records[1]["error"]["message"] == "the line may be nested at most 100 levels deep, got more"


def test_a_line_whose_preparation_fails_is_an_error_and_the_others_go_on(generate, monkeypatch, caplog):
    inner = Preparer._work
    monkeypatch.setattr(Preparer, "_work", lambda self, number, *rest: 1 // (number != 1) and inner(self, number, *rest))
    code, records = generate(jsonl(*plain_rows(3)))
    assert code == 0 and [n for n, record in records.items() if record.get("error")] == [1]
    assert records[1]["error"]["code"] == "generation_failed" and "line 1 cannot be prepared" in caplog.text


def test_overrides_win(generate):
    code, records = generate(jsonl(*plain_rows(3)), "--max-tokens", "2", "--temperature", "0")
    assert code == 0
    assert [len(record["token_ids"]) for record in records.values()] == [2, 2, 2]


def test_goes_on_where_it_was_and_samples_the_same(generate, monkeypatch):
    text = jsonl(*plain_rows(12, temperature=1.0))
    _, whole = generate(text)
    rows = generate.target.read_bytes().splitlines(keepends=True)
    for torn in (b"", rows[5][:1], rows[5][:-1]):  # nothing, the first byte, all but the newline
        generate.target.write_bytes(b"".join(rows[:5]) + torn)
        code, again = generate(text)
        assert code == 0
        assert generate.target.read_bytes().startswith(b"".join(rows[:5]))
        strip = lambda record: {**record, "num_cached_tokens": 0}  # noqa: E731
        assert {n: strip(r) for n, r in again.items()} == {n: strip(r) for n, r in whole.items()}

    def not_needed(*_, **__):
        raise AssertionError("an engine for nothing")

    monkeypatch.setattr(runner, "build_engine", not_needed)
    before = generate.target.read_bytes()
    assert generate(text)[0] == 0
    assert generate.target.read_bytes() == before


def test_lines_may_be_appended_to_the_input(generate):
    _, first = generate(jsonl(*plain_rows(3)))
    _, second = generate(jsonl(*plain_rows(5)))
    assert sorted(second) == list(range(5))
    assert {number: second[number] for number in first} == first


def test_shards_are_disjoint(generate):
    found = []
    for index in range(3):
        generate.target.unlink(missing_ok=True)
        found.append(sorted(generate(jsonl(*plain_rows(8)), "--shard", f"{index}/3")[1]))
    assert found == [[0, 3, 6], [1, 4, 7], [2, 5]]


def refused(capsys, call) -> str:
    """The one line a refused command ends with."""
    with pytest.raises(SystemExit) as caught:
        call()
    assert caught.value.code == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    return err


def test_a_changed_input_is_refused(generate, capsys):
    generate(jsonl(*plain_rows(4)))
    before = generate.target.read_bytes()
    capsys.readouterr()
    rows = plain_rows(4)
    for changed in ([{"prompt": "other"}, *rows[1:]], rows[:3], rows[::-1]):
        assert "was begun with another input" in refused(capsys, lambda rows=changed: generate(jsonl(*rows)))
    assert generate.target.read_bytes() == before


def test_files_that_do_not_fit(generate, capsys, tmp_path):
    text = jsonl(*plain_rows(1))
    generate.target.write_text("somebody's notes\n")
    assert "row 1 is no record of this command" in refused(capsys, lambda: generate(text))
    assert generate.target.read_text() == "somebody's notes\n"
    row = json.dumps({"line": 0, "digest": "x"}) + "\n"
    generate.target.write_text(row * 2)
    assert "holds line 0 twice" in refused(capsys, lambda: generate(text))
    generate.target.unlink()
    target, missing = str(generate.target), str(tmp_path / "no" / "file")
    call = lambda *args: refused(capsys, lambda: main([*args, *ENGINE_ARGS]))  # noqa: E731
    assert "cannot be read" in call("--input", missing, "--output", target)
    assert "cannot be read" in call("--input", str(tmp_path), "--output", target)
    assert "cannot be written" in call("--input", str(generate.source), "--output", missing)
    assert "must not be the input" in call("--input", str(generate.source), "--output", str(generate.source))
    os.mkfifo(target)
    for special in ("/dev/null", target):
        assert "must be a regular file" in call("--input", str(generate.source), "--output", special)


def test_an_output_that_cannot_be_read_is_one_line(generate, capsys, monkeypatch):
    def failing(fd, length):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("jaxkv.generate.journal.os.ftruncate", failing)
    assert "cannot be read: Input/output error" in refused(capsys, lambda: generate(jsonl(*plain_rows(1))))


def test_two_processes_do_not_share_an_output(generate, capsys):
    journal = Journal(generate.target)
    assert "being written by another process" in refused(capsys, lambda: generate(jsonl(*plain_rows(1))))
    journal.close()
    assert generate(jsonl(*plain_rows(1)))[0] == 0


@pytest.mark.parametrize(("options", "message"), [
    (["--page-size", "0"], "page_size must be an integer of at least 1, got 0"),
    (["--page-size", "x"], "invalid int value: 'x'"),
    (["--kv-cache-memory", "lots"], "kv_cache_memory must be bytes"),
    (["--temperature", "nan"], "temperature must be a finite number"),
    (["--max-tokens", "0"], "max_tokens must be at least 1"),
    (["--shard", "3/3"], "shard must be I/N"),
    (["--no-such-flag"], "unrecognized arguments: --no-such-flag"),
])
def test_bad_options_are_one_line(options, message, tmp_path, capsys):
    args = ["--input", str(tmp_path / "in"), "--output", str(tmp_path / "out"), *options]
    assert message in refused(capsys, lambda: main(args))


def test_a_missing_model_is_one_line(tmp_path, capsys):
    (tmp_path / "in").write_text(jsonl(*plain_rows(1)))
    (tmp_path / "empty").mkdir()
    args = ["--input", str(tmp_path / "in"), "--output", str(tmp_path / "out"), "--model", str(tmp_path / "empty")]
    assert "empty" in refused(capsys, lambda: main(args))


def test_what_is_in_flight_is_bounded(generate, llm, monkeypatch):
    add, most = llm.engine.add_request, [0]

    def counting(*args, **kwargs):
        add(*args, **kwargs)
        scheduler = llm.engine.scheduler
        most[0] = max(most[0], scheduler.num_waiting + scheduler.num_running)

    monkeypatch.setattr(llm.engine, "add_request", counting)
    _, records = generate(jsonl(*plain_rows(60)))
    assert len(records) == 60
    assert SMALL["max_num_seqs"] < most[0] <= 2 * SMALL["max_num_seqs"]  # full, with a queue, and no more


def test_the_pipeline_reads_ahead_only_so_far(tmp_path):
    (tmp_path / "in").write_text("x\n" * 500)
    lines, prepared = Lines(tmp_path / "in"), []
    items = pipeline(lines, range(500), lambda number, line: prepared.append(number) or (number, line), ahead=8)
    assert [next(items) for _ in range(3)] == [(0, b"x"), (1, b"x"), (2, b"x")]
    time.sleep(0.2)
    assert len(prepared) <= 3 + 2 * 8
    assert [number for number, _ in items] == list(range(3, 500))


@pytest.mark.parametrize("text", [b"", b"\n", b"a", b"a\n", b"a\n\nb", b"\xff\r\nb\n"])
def test_lines(tmp_path, text, monkeypatch):
    (tmp_path / "in").write_bytes(text)
    for block in (1, 3, 1 << 24):
        monkeypatch.setattr("jaxkv.generate.lines._BLOCK", block)
        lines = Lines(tmp_path / "in")
        assert [lines[number] for number in range(len(lines))] == [part.strip() for part in text.splitlines()]
        lines.close()


def test_a_failing_engine_ends_the_batch_and_the_next_run_goes_on(generate, llm, monkeypatch):
    step, calls = llm.engine.step, []

    def failing():
        calls.append(1)
        if len(calls) == 30:
            raise RuntimeError("boom")
        return step()

    monkeypatch.setattr(llm.engine, "step", failing)
    with pytest.raises(RuntimeError, match="boom"):
        generate(jsonl(*plain_rows(20)))
    monkeypatch.setattr(llm.engine, "step", step)
    for request_id in list(llm.engine._children):  # a real process would be gone
        llm.engine.abort(request_id)
    while llm.engine.has_work:
        llm.engine.step()
    some = len(records_of(generate.target))
    assert 0 < some < 20
    assert len(generate(jsonl(*plain_rows(20)))[1]) == 20


def test_a_signal_ends_the_batch_cleanly(generate):
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    before = signal.getsignal(signal.SIGTERM)
    text = jsonl(*plain_rows(2000))
    code, some = generate(text)
    timer.join()
    assert code == 128 + signal.SIGTERM
    assert 0 < len(some) < 2000
    assert signal.getsignal(signal.SIGTERM) is before
    assert generate.target.read_bytes().endswith(b"\n")


def command(model_dir: Path, source: Path, target: Path) -> list[str]:
    return [sys.executable, "-m", "jaxkv.generate", "--input", str(source), "--output", str(target), "--model",
            str(model_dir), *ENGINE_ARGS]


def wait_for_rows(process: subprocess.Popen, target: Path, rows: int) -> None:
    """Until the output has more than ``rows`` lines, or the process ended."""
    deadline = time.monotonic() + 200
    while process.poll() is None and (not target.exists() or target.read_bytes().count(b"\n") <= rows):
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_kill_9_loses_and_repeats_nothing(model_dir, llm, tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    rows = plain_rows(150, max_tokens=40, temperature=0)
    source.write_text(jsonl(*rows))
    process = subprocess.Popen(command(model_dir, source, target), cwd=ROOT, stderr=subprocess.PIPE)
    wait_for_rows(process, target, 20)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    before = target.read_bytes()
    assert 20 < before.count(b"\n") < 150
    done = subprocess.run(command(model_dir, source, target), cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "lines are done, going on" in done.stderr
    assert "tokens/s" in done.stderr
    assert target.read_bytes().startswith(before[:before.rindex(b"\n") + 1])
    records = records_of(target)
    assert sorted(records) == list(range(150))
    assert [records[number]["id"] for number in range(150)] == [row["id"] for row in rows]
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    answers = llm.generate([row["prompt"] for row in rows[:5]], params, use_tqdm=False)
    assert [answer.outputs[0].text for answer in answers] == [records[number]["text"] for number in range(5)]
