"""The compiled step on CPU holds nothing that grows with the KV pools besides the donated pools themselves."""

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from jaxkv.device.batch import BatchShape
from jaxkv.device.spec import KVSpec, kv_groups
from jaxkv.device.state import pool_structs
from jaxkv.runtime.page_ops import PageForm, compile_page_ops
from tests.device.test_h100_compile import compile_step
from tests.engine_harness import PAGE, POOL, model


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_step_updates_the_pools_in_place(dtype, as_shipped):
    mesh = Mesh(np.array(jax.devices()[:1]), ("tp",))
    small, small_pool = compile_step(mesh, dtype, BatchShape(64, 64, 64), pages=512)
    large, large_pool = compile_step(mesh, dtype, BatchShape(64, 64, 64), pages=4096)
    a, b = small.memory_analysis(), large.memory_analysis()
    assert a.alias_size_in_bytes >= small_pool and b.alias_size_in_bytes >= large_pool
    assert b.temp_size_in_bytes - a.temp_size_in_bytes < (large_pool - small_pool) / 100, "temporaries grow with the pool"


def test_page_moves_update_the_pools_in_place(as_shipped):
    spec, _, mesh = model(True)
    groups = kv_groups(spec, 1, "float32")
    kv = KVSpec(groups, (POOL,) * len(groups), PAGE, "head_major")
    for (g, name, _), op in compile_page_ops(kv, mesh, PageForm(kv, mesh)).items():
        pool = sum(p.size * p.dtype.itemsize for p in jax.tree.leaves(pool_structs(kv, mesh)[g]))
        assert name == "gather" or op.memory_analysis().alias_size_in_bytes >= pool, name
