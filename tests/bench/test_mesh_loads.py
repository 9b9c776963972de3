"""Both ways of loading pages over a mesh leave the same pools."""

import numpy as np

from bench.mesh_loads import Case, measure


def test_both_ways_load_the_same():
    case = Case("default", "bfloat16", 2)
    row = measure(case, 16, 1)
    assert row["bytes"] == 16 * case.page_bytes and min(v for k, v in row.items() if k.endswith("_ms")) > 0
    pool = np.asarray(case.place("pages", case.pools()[0], case.load("pages", 16))[0])
    assert len(np.unique(pool[:16])) > 100 and not pool[16:].any()
