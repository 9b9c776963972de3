"""A start that finds its traced steps traces none of them; whatever they follow from is in their name."""

import logging
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jaxkv import LLM, SamplingParams
from jaxkv.runtime import traced_steps as module
from jaxkv.runtime.traced_steps import TracedSteps, sources_digest, traced_steps
from tests.text_models import SMALL, small_model


@pytest.fixture
def cache(tmp_path):
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    yield tmp_path
    jax.config.update("jax_compilation_cache_dir", before)


def test_a_second_start_traces_nothing(cache, monkeypatch):
    def run() -> tuple[list[int], int, set[str]]:
        with LLM(str(small_model()), **SMALL) as llm:
            [output] = llm.generate([[1, 2, 3]], SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True))
            kernels = set(llm.engine.metrics.info["kernels"].split(", "))
            return output.outputs[0].token_ids, len(llm.engine.executor.shapes), kernels

    def fail(*_):
        raise AssertionError("traced")

    first = tokens, shapes, kernels = run()
    assert len(tokens) == 8 and {"ragged_paged_attention xla", "kv_write xla"} < kernels
    assert len(list((cache / "traced-steps").glob("*.zip"))) == shapes > 1
    monkeypatch.setattr("jaxkv.device.models.forward", fail)
    assert run() == first
    shutil.rmtree(cache / "traced-steps")
    with pytest.raises(AssertionError, match="traced"):
        run()


class Traces:
    """Makes the step x -> x + 1 and counts."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0

    def get(self, *made_from: object, name: str = "step") -> int:
        def trace() -> jax.export.Exported:
            self.count += 1
            return jax.export.export(jax.jit(lambda x: x + jnp.int32(1)))(jnp.int32(0))

        assert TracedSteps(self.folder, *made_from).get(name, trace).call(jnp.int32(41)) == 42
        return self.count


def test_a_step_is_known_by_all_that_it_follows_from(tmp_path, monkeypatch):
    steps = Traces(tmp_path / "steps")
    assert [steps.get(), steps.get(), steps.get("spec"), steps.get("other"), steps.get("spec")] == [1, 1, 2, 3, 3]
    assert [steps.get(name="larger"), steps.get(name="larger"), steps.get()] == [4, 4, 4]
    before = jax.config.jax_default_matmul_precision
    jax.config.update("jax_default_matmul_precision", "highest")
    try:
        assert steps.get() == 5
    finally:
        jax.config.update("jax_default_matmul_precision", before)
    with ThreadPoolExecutor(1) as other, jax.default_matmul_precision("highest"):  # which other threads do not see
        assert [other.submit(steps.get).result(), steps.get()] == [5, 5]
    monkeypatch.setattr(module, "SOURCES", b"edited")
    assert steps.get() == 6


def test_sources_are_known_by_their_text(tmp_path):
    def digest(text: str) -> bytes:
        (tmp_path / "kernel.py").write_text(text)
        return sources_digest(tmp_path)

    (tmp_path / ".#lock.py").symlink_to("nowhere")
    assert digest("a = 1") == digest("a = 1") != digest("a = 2")


def test_files_are_for_all_and_the_oldest_go(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "KEPT", 2)
    steps, before = Traces(tmp_path), os.umask(0o022)
    for i, name in enumerate("abc"):
        steps.get(name=name)
        [new] = [path for path in tmp_path.iterdir() if path.stat().st_mtime > 1000]
        assert new.stat().st_mode & 0o777 == 0o644
        os.utime(new, (i, i))
    os.umask(before)
    assert [steps.get(name="a"), len(list(tmp_path.iterdir()))] == [4, 3], "the first had gone, before it was made again"
    assert [steps.get(name="c"), steps.get(name="a")] == [4, 4]


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch, caplog):
    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(module.zipfile.ZipFile, "writestr", full)
    assert Traces(tmp_path).get() == 1
    assert list(tmp_path.iterdir()) == [] and "No space left" in caplog.text


@pytest.mark.parametrize("damage", [
    lambda data: data[:100], lambda data: b"", lambda data: data[:400] + bytes([data[400] ^ 1]) + data[401:]],
    ids=["cut", "empty", "flipped"])
def test_a_damaged_file_is_replaced(damage, tmp_path, caplog):
    steps = Traces(tmp_path)
    assert steps.get() == 1
    [path] = tmp_path.iterdir()
    path.write_bytes(damage(path.read_bytes()))
    assert [steps.get(), steps.get()] == [2, 2]
    assert [r.levelno for r in caplog.records] == [logging.WARNING] and str(path) in caplog.text


def test_a_folder_that_takes_nothing_is_said(tmp_path, caplog):
    (tmp_path / "file").touch()
    steps = Traces(tmp_path / "file" / "steps")
    assert [steps.get(), steps.get()] == [1, 2]
    assert "cannot keep traced steps" in caplog.text


def test_there_are_none_without_a_folder_or_on_untried_platforms(cache, monkeypatch):
    assert traced_steps("cpu") is not None and traced_steps("gpu") is None
    with monkeypatch.context() as patch:
        patch.setattr(module, "find_spec", lambda name: None)
        assert traced_steps("cpu") is None
    jax.config.update("jax_compilation_cache_dir", "gs://bucket/cache")
    assert traced_steps("cpu") is None
    jax.config.update("jax_compilation_cache_dir", None)
    assert traced_steps("cpu") is None
