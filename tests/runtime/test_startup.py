"""What a start says while it compiles."""

import logging
from types import SimpleNamespace

import pytest

from jaxkv.cli import engine_config
from jaxkv.runtime import startup
from tests.text_models import SMALL, small_model


@pytest.mark.parametrize("terminal", [False, True])
def test_compiling_shows_its_progress(terminal, monkeypatch, caplog, capsys):
    """As lines in the log, or on a terminal as a bar."""
    monkeypatch.setattr(startup, "LOG_S", 0.0)
    caplog.set_level(logging.INFO, "jaxkv")
    engine = startup.build_engine(engine_config({"model": str(small_model()), **SMALL, "max_num_seqs": 2}),
                                  show_progress=terminal)
    engine.close()
    count, err = len(engine.executor.shapes), capsys.readouterr().err
    lines = [f"compiling step executables: {n} of {count}" for n in range(1, count + 1)]
    assert count > 1 and [message for message in caplog.messages if "compiling" in message] == ([] if terminal else lines)
    assert ("\r" in err and "compiling steps" in err) == terminal


def test_lines_are_seconds_apart(monkeypatch, caplog):
    caplog.set_level(logging.INFO, "jaxkv")
    now = iter([10.0, 12.0, 15.0, 19.0, 30.0])
    monkeypatch.setattr(startup, "time", SimpleNamespace(monotonic=lambda: next(now)))  # not the clock of other threads
    advance = startup._logged()
    for done in range(1, 5):
        advance(done, 4)
    assert caplog.messages == [f"compiling step executables: {n} of 4" for n in (2, 4)]
