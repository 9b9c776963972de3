"""The attention kernels of accelerators over a mesh of two devices: each has half of the heads.

The TPU's run interpreted. The GPU interpreter of jax 0.10.2 can come to a standstill with two devices (it did in pytest, and
once did not elsewhere): they share one simulated memory, and one waits in `_clean_up_shared_memory` for the other, which is in
no callback. So what the Hopper kernel is given is looked at, and the definition runs in its place.
"""

from contextlib import nullcontext
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, NamedSharding

import pallas_kernels as pk
from pallas_kernels.ragged_paged_attention import ref
from pallas_kernels.ragged_paged_attention.api import IMPLEMENTATIONS
from pallas_kernels.ragged_paged_attention.mosaic_gpu import entry, plan

from .paged import TOLERANCE, make_case, quantised


@pytest.mark.parametrize("quant", [None, "int8"])
@pytest.mark.parametrize("impl", ["mosaic_gpu", "mosaic_tpu"])
def test_two_devices_give_what_the_definition_gives(impl, quant, monkeypatch):
    seen = []

    def stand_in(q, pool, page_table, kv_lens, cu_q_lens, sinks, made, *, params):
        spec, shape = entry._shape(q, pool, page_table, params, plan.CHIPS["h100"], interpret=True)
        plan.unpack(made, spec)
        seen.append((q.shape[1], shape.kv_heads, sinks.shape[0]))
        return ref.ragged_paged_attention(q, pool, page_table, kv_lens, cu_q_lens, sinks, None, params=params)

    monkeypatch.setitem(IMPLEMENTATIONS, "mosaic_gpu", stand_in)
    dtype = {"mosaic_gpu": "float16", "mosaic_tpu": "float32"}[impl]
    case = make_case([1, 2, 1], [33, 40, 140], heads=(4, 2), head_dim=64, dtype=dtype)
    q, pool, table, kv_lens, cu = case.args
    pool = quantised(pool, quant) if quant else pool
    sinks = jnp.linspace(-1.0, 1.5, 4, dtype=jnp.float32)
    planner = pk.attention_planner(impl, tokens=q.shape[0], seqs=3, q_heads=2, kv_heads=1, head_dim=64,  # of one device
                                   page_size=16, kv_dtype=quant or dtype, max_q_len=2)
    made = jnp.asarray(planner(np.diff(case.cu_q_lens), case.kv_lens, case.page_table))

    def attend(devices, impl):
        ops = pk.MeshOps(Mesh(np.array(jax.devices()[:devices]), ("tp",)), "head_major")
        run = jax.jit(partial(ops.ragged_paged_attention, scale=0.3, max_q_len=2, impl=impl, return_lse=True,
                              return_mass="token"))
        at = NamedSharding(ops.mesh, ops.pool_spec)
        result = run(q, jax.device_put(pool, at), table, kv_lens, cu, sinks=sinks, plan=made)
        assert all(len(x.sharding.device_set) == devices for x in result)
        return [np.asarray(x, np.float32) for x in result]

    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams()) if impl == "mosaic_tpu" else nullcontext():
        results = attend(2, impl)
    assert seen == ([(2, 1, 2)] if impl == "mosaic_gpu" else [])
    tolerance = TOLERANCE[dtype]
    for got, want, atol in zip(results, attend(1, "ref"), (tolerance, 2e-5, 3e-5)):
        np.testing.assert_allclose(got, want, atol=atol, rtol=atol)
