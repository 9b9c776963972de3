"""The disk benchmark measures what it says, and a soak goes on where it was interrupted."""

import json

import pytest

from bench import disk, soak


def test_the_disk_bench_runs(tmp_path):
    row = disk.measure(tmp_path, "tiny", (2, 2, 16, 2, 8), 100_000, 1)
    assert row["pages"] == 48 and row["bytes"] == 48 * row["page_bytes"]
    assert set(row["gb_per_s"]) == {f"{who}_{job}" for who in ("plain", "store") for job in ("write", "read", "read cold")}
    assert all(rate > 0 for rate in row["gb_per_s"].values()) and row["reopen_s"] > 0


def test_a_soak_is_resumed_and_stops_at_a_fault(tmp_path, monkeypatch):
    steps = []

    def step(folder, number):
        assert folder.is_dir()
        steps.append(number)
        return {"done": number % 2, "bad": int(number == 5)}

    monkeypatch.setitem(soak.PROOFS, "fake", soak.Proof(2, step, "done", ("bad",)))
    path = tmp_path / "soak.json"
    for argv in (["--steps", "1"], []):
        monkeypatch.setattr("sys.argv", ["soak", "--only", "fake", "--json", str(path), *argv])
        soak.main()
    assert steps == [0, 1, 2, 3]
    state = json.loads(path.read_text())
    assert state["fake"]["steps"] == 4 and state["fake"]["counts"] == {"done": 2, "bad": 0}
    monkeypatch.setitem(soak.PROOFS, "fake", soak.Proof(9, step, "done", ("bad",)))
    with pytest.raises(AssertionError, match="fake failed in step 5"):
        soak.main()


@pytest.mark.parametrize("name", ["cache_operations", "aborts"])
def test_one_in_a_hundred_lives(name, tmp_path):
    goal, state = soak.PROOFS[name].goal // 100, {}
    while sum(state.get(name, {}).get("counts", {}).get(key, 0) for key in [soak.PROOFS[name].unit]) < goal:
        soak.run(name, state, 1, lambda: None)
    counts = state[name]["counts"]
    assert counts["evictions"] > 0 and counts["leaked"] == 0 and counts["preemptions"] > 0
