"""The engine's step with the Mosaic GPU kernels lowers for CUDA as the executor calls it: arguments with shardings over a mesh
of one, and no mesh in context. Neither a GPU nor its plugin is needed; test_h100_compile.py compiles what comes of it."""

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

pytest.importorskip("absl", reason="Mosaic GPU needs absl-py")

from jaxkv.device.batch import BatchShape
from tests.device.test_h100_compile import LLAMA, step_of


@pytest.mark.parametrize("shape, kernels", [(BatchShape(8, 8, 8, decode=True), 2), (BatchShape(64, 8, 8), 3)],
                         ids=["decode", "mixed"])
def test_step_with_our_kernels_lowers(shape, kernels):
    mesh = Mesh(np.array(jax.devices()[:1]), ("tp",))
    step, arguments, _ = step_of(mesh, "bfloat16", shape, 64, LLAMA | dict(num_hidden_layers=2), impl="mosaic_gpu",
                                 platform="gpu")
    text = step.trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu_v2") == 2 * kernels, "of each of two groups: decode, merge and, of chunks, prefill"
