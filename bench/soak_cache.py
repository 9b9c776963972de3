"""Steps of the long proofs of scheduler and cache: random lives on the simulated device, all ownership checked throughout.

The device is an executable model that knows what every page holds, so a page read too early, twice owned or lost is an error.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from jaxkv.params import SamplingParams
from tests.sched.sched_driver import FULL, FULL_AND_WINDOW, Driver, children

MODEL_LEN = 64
OPERATIONS = 500  # of one life
TEXTS = [[i] * 80 for i in (1, 2)] + [[1] * 9 + [3] * 71, list(range(10, 90)), [*range(10, 40), *range(200, 250)]]


def _life(seed: int, aborts: float) -> tuple[Driver, dict[str, int]]:
    """Random arrivals, steps and, with probability ``aborts``, aborts; then everything runs to its end."""
    rng = random.Random(seed)
    settings: dict[str, Any] = dict(
        pages=rng.choice([17, 24, 60]), host_pages=rng.choice([0, 8, 60]), disk=rng.random() < 0.5,
        policy=rng.choice(["lfu", "lru", "arc"]), groups=rng.choice([FULL, FULL_AND_WINDOW]), max_num_seqs=rng.randint(1, 6),
        budget=rng.choice([8, 24, MODEL_LEN]), overlap=rng.randint(0, 1), fetch_pages=rng.choice([1, 4, 64]),
        delay=rng.randint(1, 6), failures=rng.choice([0, 0, 3]), max_model_len=MODEL_LEN)
    driver = Driver(**settings)
    counts = {"operations": 0, "requests": 0, "aborted": 0}
    names: list[str] = []
    for index in range(OPERATIONS):
        draw = rng.random()
        if draw < 0.15:
            length = rng.randint(1, MODEL_LEN - 2)
            tokens = rng.randint(1, min(20, MODEL_LEN - length))
            some = children(f"r{index}", rng.choice(TEXTS)[:length], rng.choice([1, 1, 1, 3]), tokens, params=SamplingParams(),
                            priority=rng.randint(-1, 1), arrival=driver.clock, namespace=rng.choice(["", "", "x"]))
            driver.add(*some)
            names += [one.id for one in some]
            counts["requests"] += len(some)
        elif draw < 0.15 + aborts:
            driver.abort(rng.choice(names) if names else "nobody")
        else:
            driver.step()
        driver.check()
        counts["operations"] += 1
    driver.run()
    driver.check_outputs()
    counts["aborted"] = sum(reason == "abort" for reason in driver.reasons.values())
    cache, pages = driver.inner.cache, settings["pages"]
    counts["leaked"] = sum(pages - cache.available(g) for g in range(len(cache.groups)))
    moves, stats = driver.device.num_moves, cache.stats
    counts |= {"evictions": stats.evictions, "demotions": stats.demotions, "loads": stats.loads,
               "failed_loads": stats.failed_loads, "from_disk": moves["fetch disk"],
               "preemptions": driver.inner.num_preemptions}
    return driver, counts


def operate(folder: Path, step: int) -> dict[str, int]:
    """One life with few aborts."""
    return _life(step, 0.02)[1]


def abort(folder: Path, step: int) -> dict[str, int]:
    """One life in which every other request is aborted somewhere."""
    return _life(10**6 + step, 0.2)[1]
