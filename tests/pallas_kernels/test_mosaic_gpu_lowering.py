"""The calls of test_on_gpu.py lower for CUDA, with arguments that have shardings over a mesh of one, as the engine's have, and
no mesh in context. Neither a GPU nor its plugin is needed; test_h100_*.py compile what comes of it."""

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

pytest.importorskip("absl", reason="Mosaic GPU needs absl-py")

from .test_on_gpu import CALLS, attend, prepare


@pytest.mark.parametrize("name", CALLS)
def test_attention_lowers(name):
    where = NamedSharding(Mesh(np.array(jax.devices()[:1]), ("tp",)), PartitionSpec())
    _, args, options = prepare(CALLS[name], "mosaic_gpu")
    args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), args)
    traced = attend.trace(*args, impl="mosaic_gpu", **options)
    assert "tanh" not in str(traced.jaxpr), "the hardware's errs by 5e-4"
    kernels = traced.lower(lowering_platforms=("cuda",)).as_text().count("@mosaic_gpu_v2")
    assert kernels == 2 + (options["max_q_len"] is None) + ("return_mass" in options), "decode, merge, prefill, mass"
