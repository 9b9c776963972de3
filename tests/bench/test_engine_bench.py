"""The engine's benchmark: what it measures at small sizes, and that nothing measured is lost."""

import json
import subprocess
import sys

import pytest

from bench import engine, first_token
from jaxkv.cli import engine_config
from jaxkv.runtime.startup import build_engine
from tests.engine_harness import few_shapes
from tests.text_models import SMALL, small_model


def test_a_start_is_measured_from_its_launch_with_a_warm_compile_cache(monkeypatch, tmp_path):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = first_token.measure(engine_config({"model": str(small_model()), **SMALL, "max_num_seqs": 2}), 1)
    assert found["start_executables"]["compiled"] == 0 < found["start_executables"]["loaded"]
    assert found["start_to_first_token_s"] > 0.2  # imports alone take more


def test_a_start_that_fails_ends_the_measurement(tmp_path, capfd):
    with pytest.raises(SystemExit, match="2"):
        first_token.measure(engine_config({"model": str(tmp_path)}), 1)
    assert "config.json" in capfd.readouterr().err


@pytest.mark.parametrize("pages", [20, 40, 250])
def test_host_work_of_more_sequences_than_the_pool_holds_is_left_out(pages, monkeypatch, capsys):
    """20 pages: they never run at once; 40: they do not go on to."""
    monkeypatch.setattr("jaxkv.runtime.executor.batch_shapes", few_shapes)
    built = build_engine(engine_config({"model": str(small_model()), **SMALL, "max_model_len": 256, "max_num_seqs": 16,
                                        "page_size": 16, "kv_cache_memory": 4096 * pages}))
    assert built.capacity.num_pages == (pages,)
    found = engine.decode_host_work(built, built.vocab_size)
    assert set(found) == ({"1"} if pages < 250 else {"1", "16"}) and min(found.values()) > 0
    assert ("16 sequences: the KV pool does not hold them" in capsys.readouterr().out) == (pages < 250)
    assert not built.has_work


def main(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["bench.engine", *map(str, args)])
    engine.main()


def test_peers_are_looked_for_before_anything_is_measured(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(engine, "run", None)
    with pytest.raises(SystemExit, match="2"):
        main(monkeypatch, "--peers", tmp_path)
    assert "has no run.py" in capsys.readouterr().err


@pytest.mark.parametrize("fails", [False, True])
def test_what_was_measured_outlives_the_peers(fails, monkeypatch, tmp_path):
    monkeypatch.setattr(engine, "run", lambda args, config: {"workloads": [1]})
    (tmp_path / "run.py").write_text("import sys\n" + ("sys.exit(3)" if fails else "open(sys.argv[-1], 'w').write('[2]')"))
    path = tmp_path / "results" / "engine.json"
    args = ("--peers", tmp_path, "--json", path)
    if fails:
        with pytest.raises(subprocess.CalledProcessError):
            main(monkeypatch, *args)
    else:
        main(monkeypatch, *args)
    found = json.loads(path.read_text())
    assert found["workloads"] == [1] and found.get("peers") == (None if fails else [2]) and {"command", "commit"} <= set(found)
