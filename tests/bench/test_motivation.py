"""Swap against recompute: the break-even by hand, real moves of random KV, a real prefill, and the table."""

import numpy as np
import pytest

from bench.motivation import plot, table
from bench.swap import PAGE, Swapper, break_even, compute_seconds, swap_seconds
from jaxkv.types import KVGroup
from tests.engine_harness import engine, executor

GROUP = KVGroup((0, 1), 2, 8, "float32")


@pytest.mark.parametrize(
    "swap, compute, expected",
    [
        ((1.0, 1.0, 1.0), (2.0, 4.0, 8.0), 0.0),
        ((5.0, 5.0, 5.0), (2.0, 4.0, 8.0), 200 + 200 * 1 / 4),  # 1 s behind at 200, 3 s ahead at 400
        ((9.0, 9.0, 9.0), (2.0, 4.0, 8.0), None),
        ((1.0, 5.0, 5.0), (2.0, 4.0, 8.0), 250.0),  # ahead, behind, ahead: what lasts counts
    ],
    ids=["always", "between", "never", "last"],
)
def test_break_even(swap, compute, expected):
    assert break_even((100, 200, 400), swap, compute) == expected


@pytest.mark.parametrize("codec", ["exact", "int8"])
def test_a_trip_brings_every_page_back(codec):
    swapper = Swapper(GROUP, 3 * PAGE, codec)
    before = [np.asarray(pool) for pool in swapper._pools[0]]
    assert all(seconds > 0 for seconds in swapper.trip(2 * PAGE + 1))
    after = [np.asarray(pool) for pool in swapper._pools[0]]
    assert len(np.unique(before[0])) > 100
    for a, b in zip(before, after):
        np.testing.assert_allclose(a, b, atol=0 if codec == "exact" else 0.05)
    assert swapper.page_bytes == 2 * 2 * PAGE * 2 * 8 * 4 if codec == "exact" else swapper.page_bytes < 4096


def test_experiment_in_small(tmp_path):
    lengths = (8, 16, 32)
    small = engine(executor(False), budget=8, overlap=False, prefix_caching=False)
    once = compute_seconds(small, lengths, 6, 1, 32.0)
    each = compute_seconds(small, lengths, 6, 2, 1.0)
    for took in (once, each):
        assert list(took.prefill) == list(lengths) and 0 < min(took.prefill.values()) and took.decode > 0
    assert once.prefill[8] < once.prefill[16] < once.prefill[32]  # of one prompt
    assert small.metrics.computed_tokens == 37 + (3 * (8 + 16) + 2 * 37 + 32)  # the last of 6 tokens is not run
    swaps = swap_seconds(GROUP, (*lengths, 48), "int8", 2)
    rows = [{"codec": "int8", "kept": 1.0, **swap, "prefill_s": each.prefill[n]} for n, swap in zip(lengths, swaps)]
    assert [row["bytes"] for row in swaps] == [n * swaps[0]["bytes"] for n in (1, 1, 2, 3)]
    result = {"model": "small", "factor": 16.0, "computed_layers": 2, "decode_steps": 5, "rows": rows,
              "requests": [{"codec": "int8", "kept": 1.0, **swaps[-1], "prompt": 32, "answer": 16, "request_s": 2.0}],
              "break_even": [{"codec": "int8", "kept": 1.0, "in": 0.0, "out + in": 12.5}]}
    text = table([result])
    assert "| small | 32 + 16 | int8 | 100% |" in text and "in below 8, out + in 12" in text and "seconds x 16" in text
    plot([result], tmp_path / "swap.png")
    assert (tmp_path / "swap.png").read_bytes()[:4] == b"\x89PNG"
