"""``jaxkv inspect``: a server's cache, a model directory, a directory of the disk tier."""

import json

import pytest

from jaxkv.cache.inspect import inspect as inspect_cache
from jaxkv.commands import inspect
from jaxkv.runtime.disk import DiskFormat
from jaxkv.runtime.weights import BUILT_IN
from tests.runtime.disk.disk_harness import FORM, fill, open_store
from tests.sched.sched_driver import Driver, request
from tests.serve.serve_fakes import FakeEngine, serving
from tests.text_models import small_model


def seen(capsys, *args: str) -> str:
    assert inspect.main(list(args)) == 0
    return capsys.readouterr().out


@pytest.fixture(scope="module")
def cache():
    """A cache of two tiers in which conversations came back."""
    driver = Driver(pages=40, host_pages=60, max_model_len=96)
    for turn in range(2):
        for base in (0, 100, 200, 300):
            driver.add(request(f"r{base}.{turn}", range(base, base + 40), 4, arrival=driver.clock))
            driver.run()
    return driver.inner.cache


def test_a_server(tokenizer, cache, capsys):
    engine = FakeEngine(tokenizer)
    engine.inspect_kv = lambda top: inspect_cache(cache, top)
    with serving(lambda: engine, api_keys=("k",)) as server:
        text = seen(capsys, server.url, "--api-key", "k", "--top", "5")
        found = json.loads(seen(capsys, f"{server.url}/v1", "--api-key", "k", "--json"))
        with pytest.raises(SystemExit):
            inspect.main([server.url])
        assert "missing or wrong API key" in capsys.readouterr().err
    stats = found["stats"]
    assert stats["host_hit_tokens"] > 0
    lines = {line.split()[0]: line.split() for line in text.splitlines() if line}
    assert int(lines["hbm"][2]) == 40 and lines["hbm"][1] == str(sum(found["tiers"]["hbm"]["pages_used"]))
    assert f"found of {stats['query_tokens']:,} tokens" in text
    assert text.count(" hbm ") + text.count(" host ") >= 5 and f"prefix (5 of {found['nodes_total']})" in text


def test_prefixes_stand_below_their_parents(cache):
    found = inspect_cache(cache, 100)
    names = [line for line in inspect.show_cache(found).splitlines() if line.strip()[:8] in
             {node["digest"][:8] for node in found["nodes"]}]
    by_name = {node["digest"][:12]: node for node in found["nodes"]}
    assert len(names) == len(found["nodes"])
    for line in names:
        assert (by_name[line.split()[0]]["parent"] is not None) == line.startswith("  ")


def test_the_built_in_model(capsys):
    text = seen(capsys, "--memory", "64M")
    for words in ("llama", "4,000,000", "7.6 MiB (bfloat16)", "4,096 tokens", "2,048 bytes (bfloat16, gpu)", "64.0 MiB hold"):
        assert words in text
    found = json.loads(seen(capsys, str(BUILT_IN), "--json", "--memory", "8M", "--kv-cache-dtype", "int8", "--dtype",
                            "float32"))
    assert found["weight_bytes"] == 4 * found["parameters"] == 16_000_000
    assert found["kv_bytes_per_token"] == 4 * 2 * 2 * (64 + 4)  # layers, K and V, heads, a byte each and a scale
    assert found["kv_tokens"] == 8 * 2**20 // (16 * found["kv_bytes_per_token"]) * 16


def test_a_model_on_another_platform(capsys):
    found = lambda *args: json.loads(seen(capsys, "--json", "--memory", "32M", *args))  # noqa: E731
    assert found("--platform", "cpu")["kv_bytes_per_token"] == 2 * found()["kv_bytes_per_token"], "float32"
    tpu = found("--platform", "tpu", "--kv-cache-dtype", "int8")
    page = 4 * 2 * 128 * (16 + 2 * 4)  # layers, heads, lanes: rows of key and value, two of padded float32 scales
    assert tpu["kv_bytes_per_token"] == page // 16 and tpu["kv_tokens"] == 32 * 2**20 // page * 16
    assert "1,536 bytes (int8, tpu)" in seen(capsys, "--platform", "tpu", "--kv-cache-dtype", "int8")


@pytest.mark.parametrize(("args", "words"), [
    (["/no/such"], "neither a directory nor"), (["{tmp}"], "has no config.json"), (["http://127.0.0.1:9"], "cannot reach"),
    (["--memory", "1K"], "less than one sequence"), (["--memory", "lots"], "memory must be bytes"),
    (["--top", "0"], "top must be in"), (["{model}"], "safetensors"), (["http://[x"], "is no URL"),
])
def test_what_cannot_be_read_is_one_line(args, words, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        inspect.main([arg.format(tmp=tmp_path, model=small_model()) for arg in args])
    error = capsys.readouterr().err
    assert end.value.code == 2 and len(error.splitlines()) == 1 and words in error


def test_a_disk_tier(tmp_path, capsys):
    store = open_store(tmp_path)
    fill(store, range(10))
    other = open_store(tmp_path, form=DiskFormat("another", 4, FORM.pages))
    fill(other, range(3))
    other.close()
    formats = {form["fingerprint"]: form for form in json.loads(seen(capsys, str(tmp_path), "--json"))["formats"]}
    assert (formats["model"]["pages"], formats["model"]["tokens"]) == (10, 40), "while it is written to"
    assert formats["another"]["pages"] == 3 and formats["another"]["bytes"] > 3 * 1536
    store.close()
    (next(tmp_path.glob("*.kvseg"))).write_bytes(b"noise")
    text = seen(capsys, str(tmp_path))
    assert "damaged" in text.splitlines()[1] + text.splitlines()[2] and len(text.splitlines()) == 3
