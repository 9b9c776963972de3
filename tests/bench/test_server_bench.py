"""The server's benchmark and long proofs at one in a hundred, against one real server."""

import urllib.request

import pytest

from bench import server, soak_server
from bench.soak import PROOFS


@pytest.fixture(scope="module")
def running():
    with server.Server(soak_server.FLAGS) as running:
        yield running


@pytest.mark.parametrize(("proof", "unit"), [
    (soak_server.queue, "queued"), (soak_server.disconnect, "disconnected"), (soak_server.malform, "malformed"),
    (soak_server.flat, "requests")])
def test_one_in_a_hundred(running, proof, unit):
    goal, zero = next((p.goal // 100, p.zero) for p in PROOFS.values() if p.unit == unit)
    counts = proof(running.url, goal, 0)
    assert counts[unit] > goal // 2 and not any(counts[name] for name in zero), counts
    assert urllib.request.urlopen(f"{running.url}/health").status == 200


def test_the_client_sees_every_token(running):
    jobs = server.jobs(4000, 5, 12, 4, 10)
    before = running.api_cpu()
    results = running.send(server.bodies(jobs, text=False))
    assert [r["tokens"] for r in results] == [12] * 4
    for r in results:
        assert r["sent"] < r["times"][0] and r["times"] == sorted(r["times"]) and len(r["times"]) == 12
    assert 0 < running.api_cpu() - before < running.cpu() + 1
    assert server.idle(running, 1.0) <= 0.1
