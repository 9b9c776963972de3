"""The command as a process: exit codes, one-line errors, signals. The engine is the fake one where there is one."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from serve_fakes import ROOT, ServerProcess, wait_for

from jaxkv.serve.server import FLUSH_S

# The real command line, socket, server and signals around the fake engine.
MAIN = f"""
import sys
import time
import types
startup = types.ModuleType("jaxkv.runtime.startup")
transformers = types.ModuleType("transformers")  # the tests are about the process: seconds of imports are left out
transformers.AutoTokenizer = transformers.PreTrainedTokenizerBase = object
sys.modules |= {{"jaxkv.runtime.startup": startup, "transformers": transformers}}
sys.path.insert(0, {str(Path(__file__).parent)!r})
from serve_fakes import FakeEngine
from jaxkv.config import ConfigError
def build(config, show_progress=False):
    if config.seed == 15:
        time.sleep(60)
    if config.seed == 13:
        raise ConfigError("model directory has no weights")
    engine = FakeEngine(None, max_model_len=100_000, step_seconds=0.01)
    if config.seed == 14:
        engine.crash = RuntimeError("device lost")
    if config.seed == 16:
        engine.step = lambda: time.sleep(60)
    if config.seed == 18:
        def close(timeout):
            time.sleep(timeout)
            print("all is on disk", file=sys.stderr, flush=True)
        engine.close = close
    if config.seed == 17:
        def render(messages, chat_template):
            raise ValueError("no such filter in " + chat_template)
        engine.tokenizer = types.SimpleNamespace(apply_chat_template=render)
    return engine
startup.build_engine = build
from jaxkv.serve.__main__ import command
command()
"""


def start(*args: str) -> ServerProcess:
    return ServerProcess("-c", MAIN, "--port", "0", *args)


def post(url: str, **body: object) -> urllib.request.Request:
    data = json.dumps({"prompt": [5], "return_token_ids": True, **body}).encode()
    return urllib.request.Request(f"{url}/completions", data, {"content-type": "application/json"})


def command(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "jaxkv.serve", *args], cwd=ROOT, text=True, capture_output=True,
                          timeout=60)


def test_help_needs_no_jax():
    code = ("import sys, contextlib\nfrom jaxkv.serve.__main__ import main\n"
            "with contextlib.suppress(SystemExit): main(['--help-all'])\n"
            "assert not {'jax', 'numpy', 'fastapi', 'transformers'} & set(sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    for flag in ("--model", "--host", "--port", "--api-key", "--served-model-name", "--max-model-len", "--max-num-seqs",
                 "--max-num-batched-tokens", "--page-size", "--block-size", "--kv-cache-memory", "--host-kv-memory",
                 "--eviction-policy", "--tensor-parallel-size", "--dtype"):
        assert flag in done.stdout


@pytest.mark.parametrize(("args", "word"), [
    (["--page-size", "0"], "page_size"), (["--page-size", "x"], "page-size"), (["--port", "70000"], "port"),
    (["--kv-cache-memory", "lots"], "kv_cache_memory"), (["--nope"], "nope"), (["--dtype", "int3"], "dtype"),
    (["--max-open-requests", "0"], "max_open_requests"), (["--shutdown-timeout", "nan"], "shutdown_timeout"),
    (["--host", "no.such.host.invalid"], "no.such.host.invalid"), (["--api-key", ""], "api_key"),
    (["--api-key-file", "/no/such/file"], "api_key_file"), (["--max-n", "0"], "max_n"), (["--log-format", "xml"], "log-format"),
    (["--chat-template", "no/such.jinja"], "no/such.jinja"), (["--chat-template", "/dev/null"], "empty"),
    (["--tool-call-parser", "nope"], "tool-call-parser"), (["--reasoning-parser", "nope"], "reasoning-parser"),
])
def test_bad_arguments(args, word):
    done = command(*args)
    assert done.returncode == 2 and word in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


def test_busy_port_is_told_at_once():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        start = time.monotonic()
        done = command("--port", str(taken.getsockname()[1]))
        assert time.monotonic() - start < 10  # nothing was loaded
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "cannot listen" in done.stderr


def test_settings_the_engine_refuses():
    code, errors = start("--seed", "13").end()
    assert code == 2 and errors.strip().splitlines() == ["python -m jaxkv.serve: error: model directory has no weights"]


def test_start_says_how_chats_are_read():
    process = start("--tool-call-parser", "hermes")
    process.ready()
    assert "chat: tool calls not parsed, reasoning not parsed\n" in process.lines  # this engine has no tokenizer
    process.child.terminate()
    assert process.end(15)[0] == 0


def test_template_that_does_not_work(tmp_path):
    (tmp_path / "chat.jinja").write_text("{{ }}")
    code, errors = start("--seed", "17", "--chat-template", str(tmp_path / "chat.jinja")).end()
    assert code == 2 and errors.strip().splitlines() == [
        "python -m jaxkv.serve: error: chat_template does not work: no such filter in {{ }}"]


def test_engine_failure_ends_the_process():
    process = start("--seed", "14")
    url = process.ready()
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(post(url), timeout=20)
    assert refused.value.code == 500
    with pytest.raises(urllib.error.HTTPError) as health:
        urllib.request.urlopen(url.replace("/v1", "/health"), timeout=5)
    assert health.value.code == 503
    code, errors = process.end()
    assert code == 1 and "device lost" in errors


def test_an_engine_that_hangs_ends_the_process():
    process = start("--seed", "16", "--step-timeout", "0.5")
    url = process.ready()
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(post(url), timeout=20)
    assert refused.value.code == 500
    code, errors = process.end()
    assert code == 1 and "hangs" in errors


def test_log_of_requests_is_json_and_holds_no_key(tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("open-sesame\n")
    process = start("--log-format", "json", "--api-key-file", str(keys))
    url = process.ready()
    request = post(url, max_tokens=3)
    for header in ("Bearer wrong-key", "Bearer open-sesame"):
        request.add_header("authorization", header)
        with contextlib.suppress(urllib.error.HTTPError):
            urllib.request.urlopen(request, timeout=20)
    assert b"open-sesame" not in Path(f"/proc/{process.child.pid}/cmdline").read_bytes()
    process.child.terminate()
    code, errors = process.end()
    assert code == 0 and "sesame" not in errors + "".join(process.lines) and "wrong-key" not in errors
    lines = [json.loads(line) for line in errors.splitlines()]
    assert [line["status"] for line in lines if line["logger"] == "jaxkv.serve.request"] == [401, 200]
    assert lines[-1]["output_tokens"] == 3 and lines[-1]["finish_reason"] == "length"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_when_idle(number):
    process = start()
    url = process.ready()
    assert urllib.request.urlopen(f"{url}/models").status == 200  # leaves an idle connection behind
    process.child.send_signal(number)
    assert process.end(15)[0] == 0


def test_a_disk_tier_that_takes_its_time_is_closed():
    process = start("--seed", "18")
    process.ready()
    began = time.monotonic()
    process.child.terminate()
    assert process.end(20) == (0, "all is on disk\n") and time.monotonic() - began > FLUSH_S


def test_open_requests_get_the_grace_time():
    process = start("--shutdown-timeout", "10")
    with urllib.request.urlopen(post(process.ready(), stream=True, max_tokens=100, ignore_eos=True)) as stream:
        first = stream.readline()
        process.child.terminate()
        assert first.startswith(b"data: ") and stream.read().endswith(b"data: [DONE]\n\n")
    assert process.end(15)[0] == 0


def test_drain_under_load():
    """Thirty streams end as if nothing had happened, and who comes later is told so."""
    process = start("--shutdown-timeout", "20")
    url = process.ready()
    with contextlib.ExitStack() as stack:
        streams = [stack.enter_context(urllib.request.urlopen(post(url, stream=True, max_tokens=120, ignore_eos=True)))
                   for _ in range(30)]
        for stream in streams:
            stream.readline()
        process.child.terminate()
        time.sleep(0.1)
        for ask in (post(url), url.replace("/v1", "/health"), url.replace("/v1", "/debug/kv")):
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(ask, timeout=5)
            assert refused.value.code == 503
        assert all(stream.read().count(b"data: ") == 120 for stream in streams)  # with the end, less the first
    assert process.end(15)[0] == 0


def test_then_they_are_ended_with_an_error():
    process = start("--shutdown-timeout", "0.2")
    with urllib.request.urlopen(post(process.ready(), stream=True, max_tokens=50_000)) as stream:
        stream.readline()
        process.child.terminate()
        assert b"shutting down" in stream.read()
    assert process.end(15)[0] == 0


def test_a_second_signal_ends_them_at_once():
    process = start("--shutdown-timeout", "1000")
    with urllib.request.urlopen(post(process.ready(), stream=True, max_tokens=50_000)) as stream:
        stream.readline()
        process.child.terminate()
        time.sleep(0.1)
        process.child.terminate()
        assert process.end(5)[0] == 0


@pytest.mark.parametrize("signals", [1, 2])
def test_a_client_that_does_not_read_cannot_hold_the_server(signals):
    process = start("--shutdown-timeout", "0.2" if signals == 1 else "1000")
    host, port = process.ready().removeprefix("http://").removesuffix("/v1").split(":")
    body = json.dumps({"prompt": [[5]] * 50, "n": 4, "max_tokens": 50_000, "stream": True, "logprobs": 5,
                       "return_token_ids": True}).encode()
    with socket.create_connection((host, int(port))) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
                     b"content-length: %d\r\n\r\n%s" % (len(body), body))
        sock.recv(100)
        time.sleep(1)  # the buffers between fill up
        for _ in range(signals):
            process.child.terminate()
            time.sleep(0.3)
        assert process.end(20)[0] == 0


def test_signal_while_loading():
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
    process = start("--seed", "15", "--port", str(port))

    def loading() -> bool:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
        except urllib.error.HTTPError as error:
            return error.code == 503
        except OSError:
            return False
        raise AssertionError("ready while loading")

    wait_for(loading, 30)
    process.child.terminate()
    assert process.end(10)[0] == 0


def test_no_thread_or_child_is_left():
    process = start()
    process.ready()
    pid = process.child.pid
    process.child.terminate()
    assert process.end(15)[0] == 0
    wait_for(lambda: not Path(f"/proc/{pid}").exists())
