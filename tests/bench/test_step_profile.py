"""The engine's profile: its arithmetic by hand, its plans against what the engine generates, and a run of a tiny model."""

import math
import sys
from pathlib import Path

import pytest

from bench import engine as bench_engine
from bench import step_profile
from bench.roofline import Limits
from bench.step_profile import Steps, cells, prefill_flops, profile, show, start_engine
from jaxkv import SamplingParams
from jaxkv.cli import engine_config
from jaxkv.device.batch import BatchShape
from jaxkv.types import Chunk
from tests.text_models import SMALL, small_llm, small_model

LIMITS = Limits(1e9, {"float32": 1e10})
LAYER = 32 * 8 * (4 + 2 + 2) + 4 * 8 * 32 + 3 * 32 * 48  # weights of a layer's products; the first term is q, k and v
VOCAB = 32 * 400


@pytest.fixture
def config():
    return engine_config(SMALL | {"model": str(small_model()), "host_kv_memory": "1M"})


@pytest.fixture(autouse=True)
def measured(monkeypatch):
    monkeypatch.setattr(step_profile, "measure_limits", lambda platform, dtypes: LIMITS)


def test_a_tiny_profile(config, capsys):
    saved = []
    document = profile(config, batches=(1, 4), contexts=(16, 10**6), moves=(2, 10**5), samples=1,
                       save=lambda d: saved.append((len(d["rows"]), len(d["skipped"]))))
    rows = {(r["kind"], r["shape"]): r for r in document["rows"]}
    assert set(rows) == {("decode", "1 x 16"), ("decode", "4 x 16"), ("decode", "1 x 128"), ("decode", "4 x 128"),
                         ("prefill", "32 after 0"), ("prefill", "32 after 96"), ("tier", "2 pages to host"),
                         ("tier", "2 pages to device")}
    assert [line.partition(":")[0] for line in document["skipped"]] == [
        "tier 100000 pages to host", "tier 100000 pages to device"]
    assert saved == [(min(n, 8), 10 - min(n, 8)) for n in range(1, 11)]
    norms = 5 * 32
    weights, token = 4 * (2 * LAYER + VOCAB + norms), 2 * 2 * 2 * 8 * 4  # layers, keys and values, heads, channels, bytes
    assert document["weight_bytes"] == weights
    decode = rows["decode", "4 x 128"]
    assert decode["bytes"] == weights + 4 * 128 * token
    assert decode["floor"] == pytest.approx(decode["bytes"] / 1e9)
    assert decode["over_floor"] == pytest.approx(decode["seconds"] / decode["floor"])
    assert rows["tier", "2 pages to host"]["bytes"] == 2 * 4 * token
    assert all(0 < r["low"] <= r["seconds"] <= r["high"] for r in rows.values())
    assert document["start"]["executables"][0] == 3 < document["start"]["executables"][1]
    show(document)
    printed = capsys.readouterr().out
    assert "3 of the" in printed and "not measured: tier 100000" in printed
    assert cells(decode)[5] == f"{decode['over_floor']:.2f}x"


def test_nothing_is_begun_after_the_time_is_up(config):
    document = profile(config, batches=(1, 4), contexts=(16,), moves=(2,), seconds=0.0)
    assert not document["rows"] and {line.rpartition(": ")[2] for line in document["skipped"]} == {"out of time"}


def test_flops_of_a_prefill(config):
    engine, _ = start_engine(config, (BatchShape(32, 4, 4),))
    spec = Steps(engine, LIMITS, 1).spec
    behind_attention = LAYER - 32 * 8 * 8
    pairs = sum(range(11, 16))  # five tokens behind ten
    assert prefill_flops(spec, 5, 10) == 2 * (5 * 2 * LAYER - 4 * behind_attention + VOCAB) + 2 * 4 * pairs * 8 * 4


def test_every_sequence_has_the_kv_of_the_prompt_in_pages_of_its_own(config):
    engine, _ = start_engine(config, (BatchShape(4, 4, 4, decode=True), BatchShape(32, 4, 4)))
    steps = Steps(engine, LIMITS, 1)
    steps.fill(64, 32)
    prompt = steps.tokens[:64]
    (want,) = small_llm().generate([prompt], SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True), use_tqdm=False)
    chunks = tuple(Chunk(str(i), i, 63, (prompt[-1],), 1, steps.pages_of(i, 64)) for i in range(4))
    assert steps.submit(chunks=chunks).read().tokens == (tuple(want.outputs[0].token_ids),) * 4
    pages = [page for chunk in chunks for page in chunk.pages[0][1]]
    assert len(set(pages)) == len(pages) == 4 * 64 // config.cache.page_size


def test_nan_is_no_figure(config):
    engine, _ = start_engine(config, (BatchShape(1, 1, 1, decode=True), BatchShape(32, 4, 4)))
    steps = Steps(engine, LIMITS, 1)
    steps.executor.params = tuple(p * math.nan for p in steps.executor.params)
    with pytest.raises(RuntimeError, match="NaN"):
        steps.decode(1, 16)


@pytest.mark.parametrize("options, path", [([], None), (["--json", "here.json"], Path("here.json"))])
def test_the_command(options, path, monkeypatch):
    runs = []
    monkeypatch.setattr(step_profile, "run", lambda *args: runs.append(args))
    monkeypatch.setattr(sys, "argv", ["engine", "--profile", "--shape", "tiny", "--attention-impl", "xla", *options])
    bench_engine.main()
    ((config, written),) = runs
    assert written == path and config.model.load_format == "dummy" and config.model.attention_impl == "xla"
