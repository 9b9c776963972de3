"""What /debug/kv says, on a real engine's cache and through HTTP."""

import httpx
import orjson
import pytest
from serve_fakes import FakeEngine, serving

from jaxkv.cache.inspect import inspect
from tests.sched.sched_driver import Driver, request


def test_the_trie_as_json():
    driver = Driver(pages=40, host_pages=60, max_model_len=96)
    for base in (0, 100, 200, 300):
        driver.add(request(f"r{base}", range(base, base + 40), 4, arrival=driver.clock))
        driver.run()
    seen = inspect(driver.inner.cache, 5)
    assert {node["tier"] for node in seen["nodes"]} == {"HBM", "HOST"} and len(seen["nodes"]) == 5 < seen["nodes_total"]
    assert seen["tiers"]["hbm"]["pages_total"] == [40] and seen["tiers"]["host"]["pages_used"][0] > 0
    digests = [node["digest"] for node in seen["nodes"]]
    for index, node in enumerate(seen["nodes"]):
        assert node["parent"] is None or node["parent"] in digests[:index], "parents come first and are shown"
        assert node["pages_below"] >= node["pages"] > 0 and node["tokens"] <= 4 * node["pages"]
    assert seen["stats"]["demotions"] > 0 and orjson.loads(orjson.dumps(seen)) == seen


def test_an_answer_looks_at_a_part_of_a_large_trie(monkeypatch):
    """Pages below a node are counted as they come and go; the best of the nodes looked at are shown, and that it is a part."""
    driver = Driver(pages=400, max_model_len=96)
    for base in range(30):
        driver.add(*(request(f"r{base}.{i}", [base] * 8 + [i] * (4 + 4 * i), 1, arrival=driver.clock) for i in range(3)))
        driver.run()
    cache = driver.inner.cache
    whole = inspect(cache, 1000)
    assert not whole["sampled"] and len(whole["nodes"]) == whole["nodes_total"] == len(list(cache.trie.nodes()))
    order = [node["digest"] for node in whole["nodes"]]
    assert all(node["parent"] is None or node["parent"] in order[:i] for i, node in enumerate(whole["nodes"]))
    assert [node["pages_below"] for node in inspect(cache, 30)["nodes"] if node["parent"] is None] == [8] * 30
    monkeypatch.setattr("jaxkv.cache.inspect.SEEN_CHILDREN", 10)
    part = inspect(cache, 1000)
    assert part["sampled"] and 0 < len(part["nodes"]) < len(order) and {node["digest"] for node in part["nodes"]} < set(order)
    assert len([node for node in part["nodes"] if node["parent"] is None]) == 10
    monkeypatch.setattr("jaxkv.cache.inspect.SEEN_NODES", 12)
    assert len(inspect(cache, 1000)["nodes"]) <= 12


def test_hits_are_uses_by_others_and_salted_tokens_stay_private():
    driver = Driver()
    for name, salt in (("a", ""), ("b", ""), ("c", ""), ("private", "secret"), ("again", "secret")):
        driver.add(request(name, range(20), 4, namespace=salt, arrival=driver.clock))
        driver.run()
    tops = [node for node in inspect(driver.inner.cache, 100)["nodes"] if node["start"] == 0]
    assert {node["head"] and tuple(node["head"]): node["hits"] for node in tops} == {tuple(range(16)): 2, None: 1}


def test_over_http(tokenizer):
    with serving(lambda: FakeEngine(tokenizer)) as server:
        assert httpx.get(f"{server.url}/debug/kv").json()["top"] == 100
        assert httpx.get(f"{server.url}/debug/kv?top=7").json()["top"] == 7
        for top in (0, 2001):
            bad = httpx.get(f"{server.url}/debug/kv?top={top}")
            assert bad.status_code == 400 and bad.json()["error"]["param"] == "top"
    assert server.engine.closed


def test_the_key_guards_it(tokenizer):
    with serving(lambda: FakeEngine(tokenizer), api_keys=("secret",)) as server:
        assert httpx.get(f"{server.url}/debug/kv").status_code == 401
        assert httpx.get(f"{server.url}/debug/kv", headers={"authorization": "Bearer secret"}).status_code == 200


@pytest.mark.parametrize("keys", [("one",), ("one", "two")])
def test_holders_of_different_keys_do_not_see_tokens(tokenizer, keys):
    with serving(lambda: FakeEngine(tokenizer), api_keys=keys) as server:
        server.engine.inspect_kv = lambda top: {"nodes": [{"head": [1, 2], "hits": 3}]}
        seen = httpx.get(f"{server.url}/debug/kv", headers={"authorization": "Bearer one"}).json()
        assert seen["nodes"] == [{"head": [1, 2] if len(keys) == 1 else None, "hits": 3}]
