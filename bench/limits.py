"""The machine's limits, measured: how fast it copies, and how fast it multiplies matrices."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from bench.roofline import Limits
from bench.timing import Candidate, time_together


def measure_limits(platform: str, dtypes: tuple[str, ...] = ("bfloat16", "float32")) -> Limits:
    """Sizes by platform ("cpu", "gpu", "tpu"). Copy: an elementwise pass over an array far larger than any cache, in place of a
    memcpy, which a compiler may drop; float32 products are exact ones ("highest"), not TF32."""
    big, side = (2**26, 1536) if platform == "cpu" else (2**28, 8192)
    return Limits(copy_rate(big), {dtype: matmul_rate(dtype, side) for dtype in dtypes})


def copy_rate(words: int) -> float:
    """Bytes read plus written per second by a pass over `words` 32-bit words."""
    add = jax.jit(lambda x: x + jnp.uint32(1))
    x = jnp.zeros(words, jnp.uint32)
    timing = time_together({"copy": Candidate(partial(add, x), jax.block_until_ready, 1)}, samples=9)["copy"]
    return 2 * 4 * words / timing.median


def matmul_rate(dtype: str, side: int) -> float:
    """FLOP/s of a square product with operands in `dtype` (the result too)."""
    x = jax.random.normal(jax.random.key(0), (side, side), dtype)
    dot = jax.jit(partial(jnp.matmul, precision="highest" if dtype == "float32" else None))
    timing = time_together({"dot": Candidate(partial(dot, x, x), jax.block_until_ready, 1)})["dot"]
    return 2 * side**3 / timing.median
