"""Whose kernels move the engine's pages."""

import pytest

import pallas_kernels as ops
from jaxkv.device.spec import KVSpec, kv_groups
from jaxkv.runtime.page_ops import PageForm, compile_page_ops
from tests.engine_harness import PAGE, POOL, model


@pytest.mark.parametrize("refuses", [False, True])
def test_moves_follow_the_family_where_it_can(refuses, monkeypatch):
    """"mosaic_gpu" has no copy of its own and may refuse a page."""
    calls = []

    def fake(name, op):
        def run(*args, **options):
            calls.append(name)
            if refuses:
                raise NotImplementedError("no such page")
            return op(*args, **options)
        return run

    for name in ("gather", "scatter"):
        table = ops.PAGE_MOVE_IMPLEMENTATIONS[name]
        monkeypatch.setitem(table, "mosaic_gpu", fake(name, table["xla"]))
    spec, _, mesh = model(True)
    groups = kv_groups(spec, 1, "float32")
    kv = KVSpec(groups, (POOL,) * len(groups), PAGE, "head_major")
    found = compile_page_ops(kv, mesh, PageForm(kv, mesh), "mosaic_gpu")
    assert {name for _, name, _ in found} == {"gather", "scatter", "copy"} and len(found) == 3 * 3 * len(groups)
    assert calls.count("gather") == calls.count("scatter") == 3 * len(groups)
