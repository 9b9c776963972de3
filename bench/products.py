"""The limit of the engine on a machine: what the matrix products of a run take, with nothing around them but the norms,
activations and rotations that come between; no attention, KV, sampling or host."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

import pallas_kernels as pk
from bench.timing import Candidate, time_together
from jaxkv.device import models
from jaxkv.device.batch import BatchShape
from jaxkv.runtime.executor import JaxExecutor
from jaxkv.runtime.weights import find_model, read_config


def count_steps(executor: JaxExecutor) -> Counter[BatchShape]:
    """Counts from now on how many steps of each shape run."""
    counts: Counter[BatchShape] = Counter()

    def counted(shape: BatchShape, step: Any, *args: Any) -> Any:
        counts[shape] += 1
        return step(*args)

    executor.steps = {shape: partial(counted, shape, step) for shape, step in executor.steps.items()}
    return counts


def product_seconds(executor: JaxExecutor, model: str | None, dtype: str, counts: Counter[BatchShape]) -> float:
    """Seconds that the products of so many steps take, each as padded as the engine pads it. model: as for ``load_model``."""
    platform = executor.mesh.devices.flat[0].platform
    spec = models.spec_from_config(read_config(find_model(model)), dtype, tp=executor.mesh.size, out_first=platform == "cpu")

    def products(params: tuple, rows: int, ids: jax.Array) -> jax.Array:
        x, y = models.forward(spec, params, ids, ids, lambda layer, q, k, v: q)
        return models.logits(spec, params, models.finish(spec, params, x[ids[:rows]], y[ids[:rows]])).max()

    total = 0.0
    for shape, steps in counts.items():
        ids = jnp.zeros(shape.tokens, jnp.int32)
        jitted = jax.jit(products, static_argnums=1, compiler_options=pk.compiler_options(platform))
        run = jitted.lower(executor.params, shape.rows, ids).compile()
        call = partial(run, executor.params, ids)
        timing = time_together({"products": Candidate(call, jax.block_until_ready, 1)}, samples=5)["products"]
        total += steps * timing.median
    return total
