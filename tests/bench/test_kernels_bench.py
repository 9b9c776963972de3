"""The kernel benchmark's arithmetic by hand, its targets on made-up rows, its timing, and one tiny run from end to end."""

import json
import math
import subprocess

import numpy as np
import pytest

from bench import kernels, roofline, tune
from bench.kernel_cases import CACHE_BYTES, attention, dense, difference, make_case
from bench.kernel_peers import peers
from bench.kernel_runs import GPU, TINY, Bench, measure_all, sections
from bench.page_moves import TURNS, Sizes, moves, page_sets
from bench.roofline import TARGETS, Limits, Target, Work, attention_work, bound, judge, kind_of, losses, token_bytes
from bench.timing import Candidate, time_together
from bench.torch_peers import flex
from pallas_kernels.arg_specs import BATCHES, MODELS, BatchSpec, HeadSpec
from pallas_kernels.ragged_paged_attention import tuning
from pallas_kernels.ragged_paged_attention.mosaic_gpu import prefill_tuning

TABLE = tuning.TUNED
HEADS = HeadSpec(q_heads=32, kv_heads=8, head_dim=128, layers=32)
SMALL = HeadSpec(q_heads=4, kv_heads=2, head_dim=16, layers=2)


def test_bytes_of_a_token():
    assert token_bytes(HEADS, "bfloat16") == 4096  # 2 (keys, values) * 8 heads * 128 * 2 bytes
    assert token_bytes(HEADS, "float32") == 8192
    assert token_bytes(HEADS, "int8") == token_bytes(HEADS, "float8_e4m3fn") == 2 * 8 * (128 + 4)  # and a float32 scale


@pytest.mark.parametrize(
    "batch, tokens, flops",
    [
        (BatchSpec((1,) * 32, (4096,) * 32), 131072, 4 * 32 * 4095.5 * 128 * 32),
        (BatchSpec((8192,), (8192,)), 8192, 4 * 8192 * 8192 * 128 * 32 / 2),  # causal: half
        (BatchSpec((100,), (300,)), 300, 4 * (100 * 200 + 100 * 100 / 2) * 128 * 32),  # 200 keys of before, then causal
        (BatchSpec((1, 1, 1), (96, 96, 96), shared=64), 64 + 3 * 32, 4 * 3 * 95.5 * 128 * 32),  # common pages once
    ],
    ids=["decode", "prefill", "chunk", "shared"],
)
def test_work_of_attention(batch, tokens, flops):
    assert attention_work(batch, HEADS, "bfloat16") == Work(tokens * 4096, flops)


def test_what_limits_a_call():
    limits = Limits(copy=1e12, matmul={"bfloat16": 4e14})
    assert bound(Work(2 * 10**9, 1e11), limits, "bfloat16") == ("memory", 2e-3)
    assert bound(Work(10**6, 8e12), limits, "bfloat16") == ("compute", 2e-2)


def test_kinds():
    assert [kind_of(BATCHES[name]) for name in ("decode-32x4k", "decode-64-shared-8k", "prefill-8k", "mixed-64")] == [
        "decode", "shared", "prefill", "mixed"]
    assert BATCHES["decode-256x32k"] == BatchSpec((1,) * 256, (32768,) * 256) and len(BATCHES["mixed-64"].kv_lens) == 65


def row(kind, shape, batch, context, impl="xla", ours=True, head_dim=128, **figures):
    return dict(kind=kind, shape=shape, impl=impl, ours=ours, batch=batch, context=context, head_dim=head_dim, **figures)


def test_targets_speak_of_the_right_rows_and_take_our_fastest():
    decode = [t for t in TARGETS if t.platform == "gpu" and t.kind == "decode"]
    rows = [
        row("decode", "32x4k", 32, 4096, seconds=2.0, copy_share=0.5),
        row("decode", "32x4k", 32, 4096, seconds=1.0, impl="mosaic_gpu", copy_share=0.93),
        row("decode", "32x4k", 32, 4096, seconds=0.9, impl="other", ours=False, copy_share=0.99),
        row("decode", "128x32k", 128, 32768, seconds=1.0, copy_share=0.89),
        row("decode", "8x32k", 8, 32768, seconds=1.0, copy_share=0.1),  # no target speaks of it
        row("decode", "1x32k", 1, 32768, seconds=1.0, copy_share=0.75),
        row("decode", "256x1k", 256, 1024),
    ]
    got = {(v.shape, v.value, v.least): v.verdict for v in judge(rows, "gpu", tuple(decode))}
    assert got == {("32x4k", 0.93, 0.9): "met", ("128x32k", 0.89, 0.9): "missed", ("1x32k", 0.75, 0.75): "met"}


def test_the_best_ratio_of_a_slow_implementation_meets_no_target():
    mass = [t for t in TARGETS if t.kind == "decode-mass"]
    rows = [row("decode-mass", "m", 32, 4096, seconds=5.0, speed_vs_plain=0.99),
            row("decode-mass", "m", 32, 4096, seconds=1.0, impl="mosaic_gpu", speed_vs_plain=0.7)]
    assert [(v.value, v.verdict) for v in judge(rows, "gpu", tuple(mass))] == [(0.7, "missed")]
    del rows[1]["speed_vs_plain"]
    assert [v.verdict for v in judge(rows, "gpu", tuple(mass))] == ["not measured"]


def test_every_kind_with_a_target_comes_before_those_without():
    kinds = {t.kind for t in TARGETS if t.platform == "gpu"}
    assert set(roofline.KINDS[:len(kinds)]) == kinds


def test_targets_of_other_devices_and_without_rows():
    verdicts = judge([row("prefill", "p", 1, 2048, head_dim=64, seconds=1.0, speed_vs_torch=0.7)], "cpu")
    assert {v.verdict for v in verdicts if "copy" in v.target or "matmul" in v.target} == {"not on this device"}
    assert [v.verdict for v in verdicts if v.target.startswith("prefill within")] == ["met"]
    assert [v.verdict for v in verdicts if v.target.startswith("decode ahead")] == ["not measured"]
    only128 = Target("t", "cpu", "prefill", "x", 1.0, head_dim=128)
    made = row("prefill", "p", 1, 2048, head_dim=64, seconds=1.0, x=2.0)
    assert judge([made], "cpu", (only128,))[0].verdict == "not measured"


@pytest.mark.parametrize("medians, best, verdict", [(1.2, 1.1, "met"), (0.8, 0.9, "missed"), (2.0, 0.5, "unclear")])
def test_a_busy_machine_decides_nothing(medians, best, verdict):
    made = row("decode", "d", 8, 512, seconds=1.0, speed_vs_torch=medians, speed_vs_torch_best=best)
    assert [v.verdict for v in judge([made], "cpu") if v.shape] == [verdict]


def test_losses_are_counted_against_the_fastest_of_ours():
    rows = [
        row("decode", "a", 1, 1, seconds=2.0), row("decode", "a", 1, 1, impl="fast", seconds=1.0),
        row("decode", "a", 1, 1, impl="peer", ours=False, seconds=0.5),
        row("decode", "a", 1, 1, impl="slow peer", ours=False, seconds=1.5),
        row("decode", "b", 1, 1, impl="refused"), row("decode", "b", 1, 1, impl="peer", ours=False, seconds=0.5),
    ]
    assert losses(rows) == [{"kind": "decode", "shape": "a", "peer": "peer", "times": 2.0}]


def test_time_is_per_call_and_samples_take_turns(monkeypatch):
    now, order = [0.0], []
    monkeypatch.setattr("bench.timing.time.perf_counter", lambda: now[0])

    def candidate(name, seconds, calls):
        def run():
            now[0] += seconds
            order.append(name)

        return Candidate(run, lambda _: None, calls)

    times = time_together({"a": candidate("a", 0.02, 2), "b": candidate("b", 3.0, 1)}, samples=7, sample_s=0.04)
    assert times["a"].median == pytest.approx(0.01) and times["a"].samples == 7
    assert times["b"].median == pytest.approx(3.0) and times["b"].samples == 1  # slow: no more than it takes
    assert order[4:] == ["a", "a", "b", *["a"] * 12]  # after a warm-up and a trial of each


def test_a_case_and_its_dense_form_are_the_same_batch():
    batch = BatchSpec((1, 1), (40, 33), shared=32)
    case = make_case("x", batch, SMALL, platform="cpu", dtype="float32", kv_dtype="float32")
    assert (np.asarray(case.tables[0, :, :2]) == np.asarray(case.tables[0, 0, :2])).all()
    run, first = attention(case, "xla")
    k, v = (np.asarray(x) for x in dense(case, 0, 0))  # [S, Hkv, longest, D]
    want = np.zeros_like(first)
    for s, n in enumerate(batch.kv_lens):
        for h in range(SMALL.q_heads):
            weights = np.exp(k[s, h // 2, :n] @ np.asarray(case.q[s, h]) * case.scale)
            want[s, h] = weights @ v[s, h // 2, :n] / weights.sum()
    assert difference(first, want) < 1e-4
    last, masses, again = run.run()
    assert (again == first).all() and (last == first).all() and not masses


def test_turns_read_other_pages(monkeypatch):
    monkeypatch.setitem(CACHE_BYTES, "cpu", 60_000)
    case = make_case("x", BatchSpec((1, 1), (40, 33)), SMALL, platform="cpu", dtype="float32", kv_dtype="float32")
    assert len(case.tables) == math.ceil(60_000 / (73 * token_bytes(SMALL, "float32"))) == 4
    pages = [set(np.asarray(t).ravel()[:5]) for t in case.tables]
    assert not set.intersection(*pages) and case.pools[0].shape[0] == 4 * 6
    run, _ = attention(case, "xla", "page")
    out, (mass,), _ = run.run()
    assert out.shape == case.q.shape and float(mass.sum()) == pytest.approx(2 * SMALL.q_heads, rel=1e-4)
    with pytest.raises(RuntimeError, match="not registered: no_such"):
        attention(case, "no_such")


def test_a_difference_is_relative_to_its_row_and_sees_nan():
    want = np.stack([np.full((1, 4), 1e-3), np.full((1, 4), 10.0)])
    assert difference(want * [[[1.1]], [[1.0]]], want) == pytest.approx(0.1, rel=1e-3)
    assert difference(np.full_like(want, np.nan), want) == math.inf


def test_moves_are_checked_and_counted():
    sizes = Sizes(SMALL, "float32", 4, 2, 16, (6,), (3,), turns=2)
    made = {(m.kind, m.shape): (m, m.make()) for m in moves(sizes, "cpu", ["xla"])}
    assert set(made) == {("kv_write", "6 tokens"), ("page_copy", "gather 3 pages"), ("page_copy", "scatter 3 pages"),
                         ("tier", "3 pages to host"), ("tier", "3 pages to device")}
    page = 2 * 2 * 4 * 16 * 4 * 2  # keys and values, heads, tokens, channels, bytes, layers
    assert {k: m.bytes for k, (m, _) in made.items()} == {
        ("kv_write", "6 tokens"): 2 * 6 * 2 * 2 * 16 * 4, ("page_copy", "gather 3 pages"): 2 * 3 * page,
        ("page_copy", "scatter 3 pages"): 2 * 3 * page, ("tier", "3 pages to host"): 3 * page,
        ("tier", "3 pages to device"): 3 * page}
    with pytest.raises(RuntimeError, match="not registered"):
        next(m for m in moves(sizes, "cpu", ["gone"])).make()


def test_pages_that_take_turns_exceed_the_cache(monkeypatch):
    model = MODELS[GPU.model]
    sizes = Sizes(model, GPU.dtype, 16, model.layers, GPU.pool_pages, GPU.writes, GPU.batches)
    page = 16 * 4096 * 32  # tokens, bytes of one, layers: 2 MiB
    assert {n: len(page_sets(sizes, n, "gpu")) for n in GPU.batches} == {1: 128, 4: 32, 16: 8, 64: 4, 256: 4}
    for n in GPU.batches:
        pages = np.concatenate(page_sets(sizes, n, "gpu"))
        assert len(set(pages)) == len(pages) and len(pages) * page >= CACHE_BYTES["gpu"] > 50 << 20, "an H100's L2"
    assert [len(page_sets(sizes, n, "cpu")) for n in (1, 64)] == [TURNS, TURNS]
    small = sizes._replace(pool_pages=20)
    assert [len(page_sets(small, n, "gpu")) for n in (1, 3, 7)] == [20, 6, TURNS], "more would be the same pages again"
    monkeypatch.setitem(CACHE_BYTES, "cpu", 10 << 20)
    tiny = Sizes(SMALL, "float32", 4, 2, 16, (6,), (3,), turns=2)
    made = [m.make() for m in moves(tiny, "cpu", ["xla"]) if m.kind == "page_copy"]
    assert [candidate.calls for candidate in made] == [5, 5]


@pytest.mark.parametrize("batch", [BatchSpec((1, 1), (50, 50)), BatchSpec((5, 1, 9), (30, 40, 9))], ids=["decode", "mixed"])
def test_pytorch_agrees_with_us(batch):
    pytest.importorskip("torch", exc_type=ImportError)
    case = make_case("x", batch, SMALL, platform="cpu", dtype="float32", kv_dtype="float32")
    want, ran = attention(case, "xla")[1], []
    for peer in peers("cpu"):
        if peer.absent is None:
            try:
                prepared = peer.prepare(case)
            except NotImplementedError:
                continue
            ran.append(peer.name)
            assert difference(prepared.first(), want) < 1e-4, peer.name
            prepared.candidate.run()
    assert {"torch sdpa gqa", "torch sdpa repeated"} <= set(ran) and len(ran) == 2 + (max(batch.q_lens) == 1)


def test_absent_peers_say_why():
    absent = {p.name: p.absent for p in peers("cpu") if not p.name.startswith("torch sdpa")}
    assert set(absent) == {"torch flex", "flashinfer", "jax paged_attention", "cudnn"} and all(absent.values())


def test_one_tiny_run(tmp_path, monkeypatch, capsys):
    path = tmp_path / "out.json"
    monkeypatch.setattr("bench.limits.measure_limits", lambda platform: Limits(1e10, {"float32": 1e11, "bfloat16": 1e11}))
    monkeypatch.setattr("sys.argv", ["kernels", "--setup", "tiny", "--samples", "1", "--skip-tests", "--json", str(path),
                                     "--only", "decode,decode-quantised,tier"])
    assert kernels.main() == 0
    document = json.loads(path.read_text())
    assert {"command", "device", "jax", "jaxlib", "cuda", "cudnn", "torch", "flashinfer", "python", "driver", "commit",
            "limits", "rows", "targets", "losses", "absent", "skipped", "tests"} <= set(document)
    assert document["skipped"] == [] and {r["kind"] for r in document["rows"]} == {
        "decode", "decode-quantised", "tier"}
    for r in document["rows"]:
        assert r["status"] == "ok" and r["low"] <= r["seconds"] <= r["high"], r
        assert r["gb_s"] == pytest.approx(r["bytes"] / r["seconds"] / 1e9)
        assert r["copy_share"] == pytest.approx(r["bytes"] / r["seconds"] / 1e10)
    decode = next(r for r in document["rows"] if r["kind"] == "decode" and r["ours"])
    assert decode["bytes"] == 200 * token_bytes(MODELS["default"], "float32") and decode["bound"] == "memory"
    assert {v["target"] for v in document["targets"]} == {t.name for t in roofline.TARGETS}
    printed = capsys.readouterr().out
    assert "Shapes where a peer is faster" in printed and "not on this device" in printed


def tiny_bench(seconds):
    return Bench(TINY, "cpu", Limits(1e10, {"float32": 1e11, "bfloat16": 1e11}), seconds, 1)


def test_every_kind_gets_its_turn_before_any_has_a_second():
    bench = tiny_bench(1)
    bench.setup = GPU
    names = [name for name, _ in sections(bench, set(roofline.KINDS))]
    assert names[:11] == ["decode-32x4k", "prefill-8k", "decode-quantised decode-32x4k", "page_copy",
                          "decode-mass decode-32x4k", "sampling", "decode-64-shared-8k", "mixed-64", "kv_write", "tier",
                          "prefill-quantised prefill-8k"]
    assert names[11:13] == ["decode-1x32k", "prefill-32k"]
    assert set(GPU.shapes) <= set(names) and len(set(names)) == len(names) == 22 + 4 + 2 + 4


def test_what_there_was_no_time_for_is_a_row_or_a_line(monkeypatch):
    bench = tiny_bench(1e6)
    late = iter([False, False, *[True] * 99])  # for the section, for the first implementation
    monkeypatch.setattr(bench, "late", lambda: next(late))
    waiting = []
    measure_all(bench, {"decode", "tier", "sampling"}, waiting.append)
    assert waiting == [["sampling", "tier"], ["tier"], []]
    ours, *peer = bench.rows
    assert ours["impl"] == "xla" and ours["seconds"] > 0 and {r["status"] for r in peer} == ({"out of time"} if peer else set())
    assert bench.skipped == ["sampling: out of time", "tier: out of time"]


def test_a_run_that_is_killed_leaves_what_it_measured(tmp_path, monkeypatch):
    path = tmp_path / "out.json"

    def killed(self, kinds):
        raise KeyboardInterrupt

    monkeypatch.setattr("bench.kernel_runs.Bench.moves", killed)
    monkeypatch.setattr("bench.limits.measure_limits", lambda platform: Limits(1e10, {"float32": 1e11, "bfloat16": 1e11}))
    monkeypatch.setattr("sys.argv", ["kernels", "--setup", "tiny", "--samples", "1", "--skip-tests", "--json", str(path),
                                     "--only", "decode,tier,kv_write"])
    with pytest.raises(KeyboardInterrupt):
        kernels.main()
    document = json.loads(path.read_text())
    assert document["rows"] and {r["kind"] for r in document["rows"]} == {"decode"}
    assert document["skipped"] == ["kv_write: not reached", "tier: not reached"]


def test_the_device_tests_need_nothing_but_pytest(tmp_path, monkeypatch):
    (tmp_path / "hypothesis.py").write_text("raise ImportError('not installed')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.delenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", raising=False)
    monkeypatch.setenv("PYTEST_ADDOPTS", "--no-such-option")
    ended, said = kernels.device_tests(250)
    assert ended == "passed" and "skipped" in said, said


@pytest.fixture
def device_test(tmp_path, monkeypatch):
    """Gives the source of a test module that takes the place of the device tests."""
    monkeypatch.setattr(kernels, "TESTS", str(tmp_path / "test_it.py"))
    return (tmp_path / "test_it.py").write_text


def test_device_tests_that_pass_fail_or_cannot_run(device_test, monkeypatch, capsys):
    device_test("def test_it(request):\n    assert not request.config.pluginmanager.list_plugin_distinfo()\n")
    ended, said = kernels.device_tests(100)
    assert ended == "passed" and said.startswith("1 passed")
    assert capsys.readouterr().err == ""
    device_test("def test_it():\n    assert False\n")
    ended, said = kernels.device_tests(100)
    assert ended == "failed" and said.startswith("1 failed")
    device_test("__import__('os').abort()\n")
    assert kernels.device_tests(100)[0] == "failed" and "Fatal Python error: Aborted" in capsys.readouterr().err
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert kernels.device_tests(5) == ("did not run", "not run: pytest is not installed")


@pytest.mark.parametrize("progress, ended", [
    ("", "did not finish"), ("..s.x   [ 50%]\n...", "did not finish"), ("..F. [ 50%]\n....", "failed"),
    ("..s. [ 50%]\n.E..", "failed"), ("... [  9%]\nFatal Error", "did not finish")])
def test_device_tests_that_take_too_long(monkeypatch, progress, ended):
    def late(command, timeout, **options):
        raise subprocess.TimeoutExpired(command, timeout, progress.encode() or None)

    monkeypatch.setattr("bench.kernels.subprocess.run", late)
    got, said = kernels.device_tests(5)
    assert got == ended and said == f"not finished in 5 s: {progress.splitlines()[-1] if progress else 'nothing'}"


def test_device_tests_that_hang(device_test):
    device_test("def test_it():\n    __import__('time').sleep(100)\n")
    assert kernels.device_tests(5)[0] == "did not finish"


@pytest.mark.parametrize("platform, ended, said, verdict", [
    ("cpu", "passed", "9 skipped", "met"), ("gpu", "passed", "9 passed, 1 skipped", "met"),
    ("gpu", "passed", "9 skipped", "not proven: device tests did not run"),
    ("gpu", "did not run", "not run: pytest is not installed", "not proven: device tests did not run"),
    ("gpu", "did not finish", "not finished in 5 s: ...", "not proven: device tests did not finish"),
    ("cpu", "did not run", "skipped", "not proven: device tests did not run")])
def test_no_target_is_met_without_the_device_tests(tmp_path, monkeypatch, capsys, platform, ended, said, verdict):
    path, judged = tmp_path / "out.json", [roofline.Verdict("t", "s", 2.0, 1.0, "met"),
                                           roofline.Verdict("u", "", None, 1.0, "not on this device")]
    monkeypatch.setattr(kernels, "device_tests", lambda seconds: (ended, said))
    monkeypatch.setattr(kernels, "judge", lambda rows, platform: judged)
    monkeypatch.setattr("jax.default_backend", lambda: platform)
    monkeypatch.setattr("bench.kernel_runs.measure_all", lambda bench, kinds, save: None)
    monkeypatch.setattr("bench.limits.measure_limits", lambda platform: Limits(1e10, {"float32": 1e11}))
    monkeypatch.setattr("sys.argv", ["kernels", "--setup", "tiny", "--json", str(path)])
    assert kernels.main() == 0
    document = json.loads(path.read_text())
    assert document["tests"] == said and [v["verdict"] for v in document["targets"]] == [verdict, "not on this device"]
    assert verdict in capsys.readouterr().out


def test_flex_attention_stays_compiled_after_many_shapes(monkeypatch):
    torch = pytest.importorskip("torch", exc_type=ImportError)
    real, made = torch.compile, []

    def compile_plainly(fn, **options):
        def backend(graph, inputs):
            made.append(graph)
            return lambda *args: (torch.zeros(1),)

        return real(fn, backend=backend, **options)

    monkeypatch.setattr(torch, "compile", compile_plainly)
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 2)
    for n in range(1, 5):
        case = make_case("x", BatchSpec((1,) * n, (48,) * n), SMALL, platform="cpu", dtype="float32", kv_dtype="float32")
        flex(case).candidate.run()
        assert len(made) == n


def test_an_unknown_kind_is_refused(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["kernels", "--only", "decode,nonsense"])
    with pytest.raises(SystemExit):
        kernels.main()
    assert "nonsense" in capsys.readouterr().err


def test_tuning_keeps_what_is_faster_and_lists_what_fails():
    table = {"row": 1}

    def time_it():
        if table["row"] == 3:
            raise RuntimeError("refused: three")
        return {"a": 1.0 / table["row"], "b": 4.0 / table["row"]}

    using = lambda value: tune.entry(table, "row", value)  # noqa: E731
    found = tune.try_all({"two": 2, "three": 3, "four": 4}, using, time_it, time_it())
    assert [(f["candidate"], f["score"]) for f in found] == [("four", 0.25), ("two", 0.5), ("three", None)]
    assert found[-1]["reason"] == "refused: three" and table == {"row": 1}
    with tune.entry(table, "new", 5):
        assert table == {"row": 1, "new": 5}
    assert table == {"row": 1}


@pytest.fixture
def tuned_json(tmp_path, monkeypatch):
    """A copy of the kernels' measured rows, which `bench.tune` takes for the table, and a made-up GPU to fill it."""
    path = tmp_path / "tuned.json"
    path.write_text(tuning.TUNED.read_text())

    def measure(cases, small, impl, want, samples, end=math.inf):
        now = (tuning.DECODE if max(cases[0].q_lens) == 1 else prefill_tuning.BLOCKS)
        tune.in_time(end)
        blocks = now.get(("h100", 64, 16, "bfloat16")) or now.get(("h100", 64, "bfloat16"))
        if blocks and blocks.stages == 6:
            raise RuntimeError("refused: too many stages")
        return {"shape": 0.5 if blocks in (tuning.DecodeTuning(128, 4, 2), prefill_tuning.PrefillBlocks(192, 4, True)) else 1.0}

    monkeypatch.setattr(tuning, "TUNED", path)
    monkeypatch.setattr(tune, "measure", measure)
    monkeypatch.setattr(tune, "make_case", lambda shape, batch, *args, **options: batch)
    monkeypatch.setattr(tune, "attention", lambda *args, **options: (None, None))
    monkeypatch.setattr("jax.default_backend", lambda: "gpu")
    return path


def test_tuning_writes_the_rows_that_the_kernels_read(tuned_json, tmp_path, monkeypatch):
    out = tmp_path / "out.json"
    monkeypatch.setattr("sys.argv", ["tune", "--head-dim", "64", "--json", str(out)])
    assert tune.main() == 0 and json.loads(tuned_json.read_text()) == json.loads(TABLE.read_text())  # no --write
    monkeypatch.setattr("sys.argv", ["tune", "--head-dim", "64", "--write", "--json", str(out)])
    for _ in range(2):  # the second time in place of the first
        assert tune.main() == 0
        rows = json.loads(tuned_json.read_text())
        assert [len(rows[kind]) for kind in ("decode", "prefill")] == [1, 1]
        assert rows["decode"][0]["score"] == 0.5 and {"device", "jax", "driver", "commit"} <= set(rows["decode"][0])
    decode = tuning.tuned("decode", tuning.DecodeTuning, tuned_json)
    assert decode == {("h100", 64, 16, "bfloat16"): tuning.DecodeTuning(128, 4, 2)}
    monkeypatch.setattr(tuning, "DECODE", tuning.DECODE | decode)
    chip = tuning.CHIPS["h100"]
    assert tuning.decode_tuning(chip, 64, 16, "bfloat16") == tuning.DecodeTuning(128, 4, 2)
    assert tuning.decode_tuning(chip, 64, 32, "bfloat16") == tuning.DecodeTuning(64, 4, 2)  # another page size
    assert tuning.tuned("prefill", prefill_tuning.PrefillBlocks, tuned_json) == {
        ("h100", 64, "bfloat16"): prefill_tuning.PrefillBlocks(192, 4, True)}
    document = json.loads(out.read_text())
    assert {"command", "device", "jax", "driver", "commit"} <= set(document)
    first, *others = document["results"]["decode"]
    assert first == {"candidate": str(tuning.DecodeTuning(64, 4, 2)), "score": 1.0, "seconds": {"shape": 1.0}}
    assert len(others) == 23 and {"refused: too many stages"} == {f["reason"] for f in others if f["score"] is None}


def test_tuning_ends_in_time(tuned_json, tmp_path, monkeypatch):
    out = tmp_path / "out.json"
    monkeypatch.setattr("sys.argv", ["tune", "--head-dim", "64", "--seconds", "0", "--write", "--json", str(out)])
    assert tune.main() == 0 and json.loads(tuned_json.read_text()) == json.loads(TABLE.read_text())
    for (first, *others) in json.loads(out.read_text())["results"].values():
        assert first["score"] == 1.0 and {f["reason"] for f in others} == {"out of time"}


def test_the_candidates_most_like_today_come_first():
    today = tuning.DecodeTuning(64, 2, 2)
    found = tune.candidates("decode", 128, today)
    assert today not in found and len(found) == len(set(found)) == 23
    assert [sum(a != b for a, b in zip(c, today)) for c in found[:7]] == [1] * 6 + [2]


def test_a_head_dim_without_blocks_is_one_line(tuned_json, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["tune", "prefill", "--head-dim", "72", "--json", str(tmp_path / "out.json")])
    assert tune.main() == 1 and "no block sizes for head_dim=72" in capsys.readouterr().err


def test_tuning_the_kernels_needs_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["tune", "decode"])
    assert tune.main() == 2 and capsys.readouterr().err.count("\n") == 1
