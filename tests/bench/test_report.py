"""What benchmarks write, and that they write nothing unasked."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import bench
from bench import replay, report

ORIGIN = {"command", "commit", "machine", "processor", "cpus", "python", "jax", "jaxlib", "torch", "flashinfer"}
SOURCES = {path.stem: path.read_text() for path in Path(bench.__file__).parent.glob("*.py") if path.stem != "__init__"}
COMMANDS = {name for name, text in SOURCES.items() if "ArgumentParser(" in text}


def test_figures_come_behind_their_origin(tmp_path):
    path = tmp_path / "new" / "out.json"
    report.write(path, {"rows": [1], "commit": "an earlier one's"})
    found = json.loads(path.read_text())
    assert set(found) == ORIGIN | {"device", "platform", "driver", "cuda", "cudnn", "rows"}
    assert list(found)[0] == "command" and list(found)[-1] == "rows"
    assert found["device"] == "cpu" and found["commit"] == report.commit() != "an earlier one's"
    assert report.earlier(path) == found and report.earlier(None) == report.earlier(tmp_path / "none") == {}


def test_a_failed_write_leaves_what_was_there(tmp_path):
    path = tmp_path / "out.json"
    report.write(path, {"rows": [1]})
    with pytest.raises(ValueError):
        report.write(path, {"rows": [float("nan")]})
    assert report.earlier(path)["rows"] == [1]


def test_the_command_is_the_one_typed_and_no_device_is_taken(tmp_path):
    path = tmp_path / "a b.json"
    done = subprocess.run([sys.executable, "-X", "importtime", "-m", "bench.replay", "synthetic:agents", "--policy", "lru",
                           "--capacity", "0.1", "--json", str(path)], capture_output=True, text=True, check=True)
    found = json.loads(path.read_text())
    assert found["command"] == "python -X importtime -m bench.replay synthetic:agents --policy lru --capacity 0.1 " \
                               f"--json '{path}'"
    assert set(found) == ORIGIN | {"trace", "session_hints_oracle", "rows"} and found["jax"]
    assert not re.search(r"\| +jax$", done.stderr, re.M)


def test_nothing_is_written_unasked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(report, "replace", None)
    assert replay.main(["synthetic:agents", "--policy", "lru", "--capacity", "0.1"]) == 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_no_command_writes_another_way(name):
    text = SOURCES[name]
    assert "add_json(parser" in text and 'add_argument("--json"' not in text and '/ "results"' not in text


def test_the_package_lists_its_commands_and_helpers():
    assert set(re.findall(r"^    python -m bench\.(\w+) ", bench.__doc__, re.M)) == COMMANDS
    helpers = bench.__doc__.partition("The other modules help them.")[2]
    assert set(re.findall(r"``(\w+)``", helpers)) == SOURCES.keys() - COMMANDS
