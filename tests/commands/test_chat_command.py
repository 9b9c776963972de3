"""``jaxkv chat`` on a terminal, with piped input, with a server and with an engine in this process."""

import io
import os
import pty
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

from jaxkv import SamplingParams
from jaxkv.commands import chat, chat_local
from tests.serve.serve_fakes import REPLY, ROOT, wait_for
from tests.text_models import SMALL, small_llm, small_model


class Terminal:
    """The command on a terminal of its own."""

    def __init__(self, home: Path, *args: str) -> None:
        self.end, theirs = pty.openpty()
        env = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_STATE_HOME": str(home), "TERM": "dumb"}
        default = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a job in the background is born deaf to Ctrl+C
        onto = 'exec "$@" <"$0" >"$0" 2>&1'  # a session's leader that opens a terminal is controlled by it: Ctrl+C works
        self.child = subprocess.Popen(["sh", "-c", onto, os.ttyname(theirs), sys.executable, "-m", "jaxkv", "chat", *args],
                                      env=env, start_new_session=True, preexec_fn=default)
        self.theirs, self.seen = theirs, ""

    def type(self, text: str) -> None:
        os.write(self.end, text.encode())

    def interrupt(self, text: str) -> None:
        """Presses Ctrl+C until the text is shown: ``input`` loses a press in the instant between a key and its sleep."""
        for _ in range(10):
            self.type("\x03")
            with suppress(AssertionError):
                self.expect(text, seconds=5)
                return
        raise AssertionError(f"{text!r} is not in {self.seen!r}")

    def expect(self, text: str, seconds: float = 30) -> str:
        """Waits until the text is shown; what was shown before it."""
        deadline = time.monotonic() + seconds
        while text not in self.seen:
            ready, _, _ = select.select([self.end], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"{text!r} is not in {self.seen!r}"
            self.seen += os.read(self.end, 4096).decode("utf-8", "replace").replace("\r\n", "\n")
        before, _, self.seen = self.seen.partition(text)
        return before


@pytest.fixture
def terminal(server, tmp_path):
    opened = []

    def open_terminal(*args):
        opened.append(Terminal(tmp_path, "--url", server.url, "--api-key", "secret", *args))
        return opened[-1]

    yield open_terminal
    for terminal in opened:
        terminal.child.kill()
        terminal.child.wait()
        os.close(terminal.end)
        os.close(terminal.theirs)


def test_a_conversation_on_a_terminal(terminal, server, tmp_path):
    shell = terminal("--max-tokens", "12")
    assert "fake at http" in shell.expect(">>> ")
    shell.type("hi\n")
    shell.expect("hi\n")
    assert REPLY.startswith(shell.expect("\n>>> ")) and len(server.engine.requests[-1].prompt) > 0
    short = len(server.engine.requests[-1].prompt)
    shell.type("and?\n")
    shell.expect("\n>>> ")
    assert len(server.engine.requests[-1].prompt) > short, "the first turn is part of the second"
    for line, words in [("/history", "user: hi\nassistant: The cat"), ("/system Be brief.", "starts anew"),
                        ("/system", "Be brief."), ("/history", "(nothing yet)"), ("/what", "unknown command /what"),
                        ("/help", "/reset")]:
        shell.type(line + "\n")
        shell.expect(words)
    shell.type("hi\n")
    shell.expect("The cat")
    shell.type("/reset\n")
    shell.expect("(forgotten)")
    shell.type("/quit\n")
    assert shell.child.wait(10) == 0
    assert "/system Be brief." in (tmp_path / "jaxkv" / "chat_history").read_text()
    assert (tmp_path / "jaxkv" / "chat_history").stat().st_mode & 0o077 == 0


def test_ctrl_c_stops_the_answer_and_nothing_else(terminal, server):
    shell = terminal()
    shell.expect(">>> ")
    shell.type("half a li")
    shell.expect("half a li")
    shell.interrupt("(Ctrl+D or /quit ends)\n>>> ")
    shell.type("talk for hours\n")
    shell.expect("sat on the mat")
    shell.interrupt("(stopped)\n>>> ")
    wait_for(lambda: not server.engine.children)
    shell.type("/history\n")
    assert "sat on the mat" in shell.expect(">>> "), "what was said is remembered"
    shell.type("\x04")
    assert shell.child.wait(10) == 0


def run(monkeypatch, text: str, *args: str) -> int:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    return chat.main(list(args))


def test_piped_input_is_one_message(server, monkeypatch, capsys):
    args = ("--url", f"{server.url}/v1/", "--api-key", "secret", "--max-tokens", "6", "--system", "s", "--seed", "3")
    assert run(monkeypatch, "two\nlines\n", *args) == 0
    out, err = capsys.readouterr()
    assert len(out) > 1 and err == ""
    request = server.engine.requests[-1]
    assert "two\nlines" in server.engine.tokenizer.decode(request.prompt)
    assert (request.params.seed, request.params.max_tokens) == (3, 6)
    assert run(monkeypatch, "word " * 6000, *args) == 1
    out, err = capsys.readouterr()
    assert out == "" and "do not fit" in err and len(err.splitlines()) == 1


@pytest.mark.parametrize(("args", "words"), [
    (["--url", "{url}"], "missing or wrong API key"), (["--url", "http://127.0.0.1:9"], "cannot reach 127.0.0.1:9"),
    (["--url", "{url}", "--model", "x"], "model is for an engine in this process"), (["--max-tokens", "0"], "max_tokens"),
    (["--url", "{url}", "--api-key", "secret"], "no message"), (["--skip-tokenizer-init"], "without words"),
])
def test_what_cannot_work_is_one_line(server, monkeypatch, capsys, args, words):
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, "", *(arg.format(url=server.url) for arg in args))
    error = capsys.readouterr().err
    assert end.value.code == 2 and words in error and len(error.splitlines()) == 1


def test_an_engine_in_this_process(monkeypatch, capsys):
    llm = small_llm()
    monkeypatch.setattr(chat_local, "build_engine", lambda config, show_progress: llm.engine)
    monkeypatch.setattr(llm.engine, "close", lambda: None)  # other tests go on with it
    args = ["--model", str(small_model()), "--temperature", "0", "--max-tokens", "9"]
    args += [part for name, value in SMALL.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    assert run(monkeypatch, "hi", *args) == 0
    expected = llm.chat([{"role": "user", "content": "hi"}], SamplingParams(temperature=0, max_tokens=9),
                        use_tqdm=False)[0].outputs[0].text
    assert capsys.readouterr().out == expected.translate(chat.VISIBLE) + "\n"
    assert run(monkeypatch, "long " * 200, *args) == 1
    assert "max_model_len" in capsys.readouterr().err and not llm.engine.has_work


def test_ctrl_c_leaves_the_engine_whole(monkeypatch, capsys):
    llm = small_llm()
    monkeypatch.setattr(chat_local, "build_engine", lambda config, show_progress: llm.engine)
    local = chat_local.Local(llm.engine.config, {"temperature": 0})
    talk = chat.Chat(local, None)
    parts = []

    def show(part):
        parts.append(part)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts what it puts behind it without one
    try:
        with pytest.raises(KeyboardInterrupt):
            local.answer([{"role": "user", "content": "hi"}], show)
    finally:
        signal.signal(signal.SIGINT, before)
    assert parts and not llm.engine.has_work
    llm.engine.check()
    assert talk.ask("hi") and len(talk.messages) == 2


def test_control_characters_do_not_reach_the_terminal(capsys):
    class Evil:
        name = "evil"

        def answer(self, messages, show):
            show("a\x1b[2J\tb\n\x9b\x07")

        def close(self):
            raise AssertionError

    talk = chat.Chat(Evil(), None)
    assert talk.ask("x")
    assert capsys.readouterr().out == "a\\x1b[2J\tb\n\\x9b\\x07\n"
    assert "\x1b" not in talk.command("/history") and talk.messages[-1]["content"].startswith("a\x1b")


def test_a_refused_question_is_forgotten(capsys):
    class Full:
        name = "full"

        def answer(self, messages, show):
            show("par")
            raise ValueError("the connection broke")

        def close(self):
            raise AssertionError

    talk = chat.Chat(Full(), None)
    assert not talk.ask("x") and talk.messages == []
    assert capsys.readouterr() == ("par", "\nerror: the connection broke\n")
