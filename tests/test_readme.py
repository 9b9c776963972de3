"""The README's own code, run as it stands there."""

import re
from pathlib import Path

import pytest

from jaxkv.cache.eviction import POLICIES
from tests.sched.sched_driver import Driver, request

README = (Path(__file__).resolve().parent.parent / "README.md").read_text()


def block(heading: str) -> str:
    section = README.split(f"## {heading}")[1].split("\n## ")[0]
    found = re.search(r"```python\n(.*?)```", section, re.S)
    assert found
    return found[1]


def test_the_policy_in_20_lines_works(monkeypatch):
    code = block("Write your own policy in 20 lines")
    assert code.count("\n") <= 20
    names: dict = {}
    exec(code, names)
    monkeypatch.setitem(POLICIES, "reused", names["Reused"])
    driver = Driver(pages=24, host_pages=30, policy="reused", max_model_len=64)
    for round_ in range(2):
        for base in range(0, 300, 50):
            driver.add(request(f"r{base}.{round_}", range(base, base + 30), 4, arrival=driver.clock))
        driver.run()
    driver.check_outputs()
    stats = driver.inner.cache.stats
    assert stats.demotions > 0 and stats.evictions > 0 and stats.hit_tokens > 0


@pytest.mark.parametrize("heading", ["Offline in six lines"])
def test_the_examples_compile(heading):
    compile(block(heading), heading, "exec")
