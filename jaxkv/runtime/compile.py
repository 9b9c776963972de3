"""Compiles what the executor runs: one step per batch shape, and what tells the sampler of a new sequence."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from contextvars import copy_context
from functools import partial

import jax
import jax.export
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import pallas_kernels as ops
from jaxkv.device import sampling
from jaxkv.device.batch import BatchLayout, BatchShape
from jaxkv.device.spec import KVSpec, ModelSpec
from jaxkv.device.state import EngineState, state_shardings
from jaxkv.device.step import build_step
from jaxkv.runtime.traced_steps import traced_steps

ADMIT_TOKENS = 1024  # tokens of a sequence told to the sampler at once


def compile_steps(
    spec: ModelSpec, kv: KVSpec, mesh: Mesh, params: tuple, state: EngineState, layouts: dict[BatchShape, BatchLayout],
    attention_impl: str, progress: Callable[[int, int], None] | None,
) -> dict[BatchShape, Callable]:
    """One executable per batch shape, compiled ahead of time: afterwards nothing can compile, only fail loudly."""
    whole, platform = NamedSharding(mesh, PartitionSpec()), mesh.devices.flat[0].platform
    state_at, options = state_shardings(kv, mesh), ops.compiler_options(platform)
    like = lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at)  # noqa: E731
    args = tuple(like(x, x.sharding) for x in params), jax.tree.map(like, state, state_at)
    # float32 products are float32 products: by default GPUs round their operands to TF32, TPUs to bfloat16
    exact = spec.dtype == "float32" and platform != "cpu"
    kept = traced_steps(platform, spec, kv, mesh, attention_impl, jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), args))

    def compile_one(layout: BatchLayout) -> Callable:
        shapes = (layout.words,), (layout.shape.rows, sampling.mask_words(spec.vocab_size))
        inputs = (*args, *(jax.ShapeDtypeStruct(s, jnp.int32, sharding=whole) for s in shapes))
        jitted = partial(jax.jit, donate_argnums=1, out_shardings=(state_at, whole))
        step = build_step(spec, kv, layout, mesh, attention_impl)
        with jax.default_matmul_precision("highest") if exact else nullcontext():
            if kept:
                step = kept.get(layout, lambda: jax.export.export(jitted(step), platforms=[platform])(*inputs)).call
            return jitted(step, compiler_options=options).lower(*inputs).compile()

    out: dict[BatchShape, Callable] = {}
    with ThreadPoolExecutor(2) as pool:  # tracing holds the interpreter lock, compiling does not
        compiles = [partial(copy_context().run, compile_one, layout) for layout in layouts.values()]  # kernels traced are noted
        for shape, fn in zip(layouts, pool.map(lambda run: run(), compiles)):
            out[shape] = fn
            if progress:
                progress(len(out), len(layouts))
    return out


def compile_admit(state: EngineState, mesh: Mesh) -> Callable:
    whole = NamedSharding(mesh, PartitionSpec())
    like = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole)  # noqa: E731
    args = jax.tree.map(like, (state.sampler, *sampling.admit_arguments(ADMIT_TOKENS)))
    return jax.jit(sampling.admit, donate_argnums=0, out_shardings=jax.tree.map(lambda _: whole, args[0])).lower(
        *args).compile()
