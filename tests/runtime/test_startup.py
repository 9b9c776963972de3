"""What a start says while it compiles, and what ends it."""

import contextlib
import json
import logging
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from jaxkv.cli import engine_config
from jaxkv.config import ConfigError
from jaxkv.device.sampling import init_sampler_state, sampler_bytes
from jaxkv.device.spec import KVSpec, kv_groups
from jaxkv.runtime import startup, weights
from jaxkv.runtime.memory import Capacity, _steady, check_memory, free_device_memory
from jaxkv.runtime.weights import LoadedModel
from tests.engine_harness import model
from tests.text_models import SMALL, small_model

LLAMA = {"architectures": ["LlamaForCausalLM"], "vocab_size": 51, "hidden_size": 16, "intermediate_size": 24,
         "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}


def refusal(directory, changes, **options):
    """The one line that a model without a tokenizer ends the start with."""
    (directory / "config.json").write_text(json.dumps(LLAMA | changes))
    options = {"model": str(directory), **SMALL, "max_model_len": None, "skip_tokenizer_init": True, **options}
    with pytest.raises(ConfigError) as error:
        startup.build_engine(engine_config(options))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_window_of_one_token_is_refused(tmp_path):
    assert "window is 1 token" in refusal(tmp_path, {"max_position_embeddings": 1})


def test_an_eos_id_that_is_none_is_refused(tmp_path):
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": "</s>"}')
    assert "generation_config.json: eos_token_id" in refusal(tmp_path, {})
    (tmp_path / "generation_config.json").unlink()
    assert "config.json: eos_token_id" in refusal(tmp_path, {"eos_token_id": [[2]]})


def test_weights_beyond_the_memory_are_refused_before_they_are_made(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "place", None)
    assert "weights take 128,0" in refusal(tmp_path, {"vocab_size": 10**12})


@pytest.mark.parametrize("error", [MemoryError, jax.errors.JaxRuntimeError, ValueError])
def test_no_memory_for_the_weights_is_one_line(error, tmp_path, monkeypatch):
    def fail(*args):
        raise error("RESOURCE_EXHAUSTED: Out of memory allocating 4 bytes\nand more")

    monkeypatch.setattr(weights, "place", fail)
    assert "does not hold the model's weights (RESOURCE_EXHAUSTED" in refusal(tmp_path, {})
    monkeypatch.setattr(weights, "place", None)
    with pytest.raises(TypeError):
        refusal(tmp_path, {})


@pytest.mark.parametrize("weights, slots, stats, words", [
    (90, 10, {"bytes_limit": 60, "bytes_in_use": 10}, None), (1 << 60, 1 << 60, None, None),
    (101, 0, {"bytes_limit": 60, "bytes_in_use": 10}, "weights take 101 bytes, but only 100"),
    (90, 11, {"bytes_limit": 60, "bytes_in_use": 10}, "max_num_seqs 5 takes 11 bytes .* only 10")])
def test_what_must_fit_is_compared_with_what_the_devices_say(weights, slots, stats, words):
    devices = [SimpleNamespace(platform="gpu", memory_stats=lambda: stats)] * 2
    with pytest.raises(ConfigError, match=words) if words else contextlib.nullcontext():
        check_memory(weights, 5, slots, devices)


def test_the_pools_get_what_the_sampler_leaves():
    devices = [SimpleNamespace(platform="gpu", memory_stats=lambda: {"bytes_limit": 2**20, "bytes_in_use": 2**18})] * 2
    assert free_device_memory(devices, 2**19) == (2**19, 2 * _steady(2**18 - 2**20 // 10))
    assert free_device_memory(devices, 2**20) == (0, 0)


@pytest.mark.parametrize("most", [10**7, 10**13])
def test_more_sequences_than_the_memory_holds_are_refused(most, tmp_path):
    assert f"max_num_seqs {most} takes" in refusal(tmp_path, {"vocab_size": 10**4}, max_num_seqs=most,
                                                   max_num_batched_tokens=most)


def test_the_state_of_a_slot_is_counted_whole():
    state = init_sampler_state(3, 51)
    assert sampler_bytes(3, 51) == sum(leaf.nbytes for leaf in state)


def test_replicas_count_as_weights(tmp_path):
    """Of two devices each holds half of what is split and all of the rest."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    for tp in (1, 2):
        model = weights.load_model(str(tmp_path), startup.make_mesh(tp), load_format="dummy")
        placed = sum(shard.data.nbytes for leaf in model.params for shard in leaf.addressable_shards)
        assert weights.placed_bytes(model.spec, startup.make_mesh(tp)) == placed


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


def test_an_engine_names_its_own_kernels():
    """Whatever other engines of the process run, and whether its steps are traced or kept ones."""
    found = []
    for impl in ("ref", "auto", "ref", "auto"):
        engine = startup.build_engine(engine_config(
            {"model": str(small_model()), **SMALL, "max_num_seqs": 1, "max_num_batched_tokens": 16, "attention_impl": impl}))
        engine.close()
        found.append(set(engine.metrics.info["kernels"].split(", ")))
        assert f"kernels: {engine.metrics.info['kernels']}" in engine.describe()
    assert found[:2] == found[2:] and found[0] ^ found[1] >= {"ragged_paged_attention ref", "ragged_paged_attention xla"}


@pytest.mark.parametrize("platform, impl, runs, said", [
    ("gpu", "auto", "xla", True), ("tpu", "auto", "xla", True), ("cpu", "auto", "xla", False), ("gpu", "xla", "xla", False),
    ("gpu", "auto", "mosaic_gpu", False), ("tpu", "mosaic_tpu", "mosaic_tpu", False)])
def test_auto_says_that_it_leaves_the_kernels_of_an_accelerator_aside(platform, impl, runs, said):
    devices = SimpleNamespace(flat=[SimpleNamespace(platform=platform, device_kind="faked")])
    spec, params, _ = model(False)
    groups = kv_groups(spec, 1, "float32")
    lines = startup.describe(
        engine_config({"attention_impl": impl}), LoadedModel(spec, params, Path(), "m", {}, ""),
        SimpleNamespace(size=1, devices=devices), KVSpec(groups, (2,), 16, "head_major"), Capacity((2,), 1, (0,), 0),
        SimpleNamespace(tiers=SimpleNamespace(disk=None), shapes=()), f"ragged_paged_attention {runs}, kv_write xla", 1.0, 1.0)
    said_so = [line for line in lines if f"mosaic_{platform} is there" in line]
    assert len(said_so) == said and all(f"--attention-impl mosaic_{platform} takes it" in line for line in said_so)


def test_lines_are_seconds_apart(monkeypatch, caplog):
    caplog.set_level(logging.INFO, "jaxkv")
    now = iter([10.0, 12.0, 15.0, 19.0, 30.0])
    monkeypatch.setattr(startup, "time", SimpleNamespace(monotonic=lambda: next(now)))  # not the clock of other threads
    advance = startup._logged()
    for done in range(1, 5):
        advance(done, 4)
    assert caplog.messages == [f"compiling step executables: {n} of 4" for n in (2, 4)]
