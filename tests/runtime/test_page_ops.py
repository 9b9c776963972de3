"""Whose kernels move the engine's pages."""

import jax.numpy as jnp
import pytest

import pallas_kernels as ops
from jaxkv.device.spec import KVSpec, kv_groups
from jaxkv.runtime.page_ops import PageForm, compile_page_ops
from jaxkv.runtime.tiers import Tiers
from jaxkv.types import Fetch, PageMove, StepPlan, Tier
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


@pytest.mark.parametrize("page", [-1, POOL])
@pytest.mark.parametrize("move", ["copy from", "copy to", "promote", "demote", "save", "land"])
def test_pages_that_no_pool_has_are_refused(move, page):
    spec, _, mesh = model(True)
    groups = kv_groups(spec, 1, "float32")
    kv = KVSpec(groups, (POOL,) * len(groups), PAGE, "head_major")
    tiers = Tiers(kv, mesh, 2**20, PageForm(kv, mesh), check=True)
    tiers.host[1, 0] = jnp.zeros((1, 1, 1, 1))
    ends = {"copy from": ((Tier.HBM, page), (Tier.HBM, 0)), "copy to": ((Tier.HBM, 0), (Tier.HBM, page)),
            "demote": ((Tier.HBM, page), (Tier.HOST, 0)), "save": ((Tier.HBM, page), (Tier.DISK, 0))}
    moves = (PageMove(1, *ends.get(move, ((Tier.HOST, 0), (Tier.HBM, page)))),)
    plan = StepPlan(1, moves=moves)
    if move == "land":
        tiers.fetches.start(Fetch(7, moves, ()), tiers.host)
        plan = StepPlan(1, landings=((7, True),))
    with pytest.raises(ValueError, match=rf"must be in \[0, {POOL}\) in group 1, got {page}"):
        tiers.apply(((), ()), plan)
