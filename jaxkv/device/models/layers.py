"""Layers every family is made of: pure functions of arrays.

``linear`` is the only place where a weight matrix meets an activation; whoever adds quantised leaves, adapters or
another storage order changes that function and nothing else. T is any number of rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxkv.device.spec import Rope


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QuantizedWeight:
    """A weight as narrow values and one float32 scale per output: ``weight = values * scales``.

    ``values`` [out, in] or [in, out] (the spec's order), e.g. int8; ``scales`` [out]; both may have a leading expert
    axis.
    """

    values: jax.Array
    scales: jax.Array

    @property
    def ndim(self) -> int:
        return self.values.ndim


Weight = jax.Array | QuantizedWeight
Leaves = dict[str, Any]  # by name: a Weight where it goes through linear, else an array
MAX_LEFT_ROWS = 64  # see _product


def linear(
    x: jax.Array, w: Weight, bias: jax.Array | None = None, *, out_first: bool, dtype: jnp.dtype | None = None
) -> jax.Array:
    """``x @ w + bias``: [T, in] -> [T, out], in ``dtype`` (default: that of x).

    ``w`` is [out, in] when ``out_first``, else [in, out]. The product runs in the weight's dtype (x is rounded to it
    when that is narrower) and accumulates in float32. With an expert axis, w [E, ...] and x [E, T, in] give
    [E, T, out].
    """
    dtype = x.dtype if dtype is None else dtype
    if w.ndim == 3:
        each = partial(linear, out_first=out_first, dtype=dtype)
        return jax.vmap(each, in_axes=(0, 0, None if bias is None else 0))(x, w, bias)
    if isinstance(w, QuantizedWeight):
        y = _product(x, w.values.astype(x.dtype), out_first) * w.scales.astype(jnp.float32)[None, :]
    else:
        y = _product(x.astype(w.dtype), w, out_first)
    if bias is not None:
        y = y + bias.astype(jnp.float32)[None, :]
    return y.astype(dtype)


def _product(x: jax.Array, w: jax.Array, out_first: bool) -> jax.Array:
    """[T, in] x weight -> [T, out] float32.

    On CPU, float32 [out, in] weights stream at full rate for one row as they are, and for a few rows as the *left*
    operand; XLA would turn that product around again, so a barrier holds its result. Measured for 12 layers of
    768x2048 (ms, a busy machine's best; [in, out] / [out, in] / left operand): 1 row 17/15/15, 2 rows 19/34/24,
    8 rows 22/48/27, 32 rows 262/338/244, 128 rows 737/750/765.
    """
    rows = x.shape[0]
    if rows == 1 and x.dtype == jnp.bfloat16:  # pathological on CPU, 10x slower than two rows; free elsewhere
        x = jnp.concatenate([x, x])
    dot = partial(jax.lax.dot_general, preferred_element_type=jnp.float32)
    if not out_first:
        return dot(x, w, (((1,), (0,)), ((), ())))[:rows]

    def right(x: jax.Array, w: jax.Array) -> jax.Array:
        return dot(x, w, (((1,), (1,)), ((), ())))

    def left(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.optimization_barrier(dot(w, x, (((1,), (1,)), ((), ())))).T

    if x.dtype == jnp.float32 and 1 < rows <= MAX_LEFT_ROWS:
        return jax.lax.platform_dependent(x, w, cpu=left, default=right)
    return right(x, w)[:rows]


def embed(table: jax.Array, ids: jax.Array, dtype: str) -> jax.Array:
    """Rows of ``table`` [V, d] by ``ids`` i32 [T] -> [T, d]. Ids out of range are clipped (padding)."""
    return table.at[ids].get(mode="clip").astype(dtype)


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """Over the last axis, in float32. x [..., d], weight [d]."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return (y * _last(weight, y)).astype(x.dtype)


def layer_norm(x: jax.Array, weight: jax.Array | None, bias: jax.Array | None, eps: float) -> jax.Array:
    """Over the last axis, in float32; weight and bias [d] or None."""
    y = x.astype(jnp.float32)
    y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    if weight is not None:
        y = y * _last(weight, y)
    if bias is not None:
        y = y + _last(bias, y)
    return y.astype(x.dtype)


def _last(weight: jax.Array, like: jax.Array) -> jax.Array:
    """A [d] weight as float32 with as many axes as ``like``."""
    return weight.astype(jnp.float32).reshape((1,) * (like.ndim - 1) + (-1,))


def rope_frequencies(rope: Rope, head_dim: int) -> np.ndarray:
    """Radians per position, float32 [head_dim / 2], as transformers' rope_utils computes them."""
    freq = 1.0 / rope.theta ** (np.arange(0, head_dim, 2, dtype=np.float32) / head_dim)
    if rope.kind == "linear":
        freq = freq / rope.factor
    elif rope.kind == "llama3":
        wavelength = 2 * math.pi / freq
        low = rope.original_max_position / rope.low_freq_factor
        high = rope.original_max_position / rope.high_freq_factor
        smooth = (rope.original_max_position / wavelength - rope.low_freq_factor) / (
            rope.high_freq_factor - rope.low_freq_factor)
        middle = (1 - smooth) * freq / rope.factor + smooth * freq
        freq = np.where(wavelength > low, freq / rope.factor, np.where(wavelength < high, freq, middle))
    return freq.astype(np.float32)


def rope_angles(rope: Rope, head_dim: int, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos and sin, float32 [T, 1, head_dim / 2], of ``positions`` i32 [T].

    XLA:CPU would compute them again for every head of every layer, because it fuses whatever it can into the readers and has
    dropped optimisation barriers by then. It does not fuse products, and that with the identity changes no finite number.
    """
    angles = positions.astype(jnp.float32)[:, None] * rope_frequencies(rope, head_dim)[None, :]
    both = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=1)
    once = partial(jnp.matmul, precision="highest", b=jnp.eye(head_dim, dtype=jnp.float32))
    cos, sin = jnp.split(jax.lax.platform_dependent(both, cpu=once, default=lambda x: x)[:, None, :], 2, axis=-1)
    return cos, sin


def rotate(x: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotate x [T, H, D] by its positions' angles, in float32; halves are the pairs."""
    cos, sin = angles
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = MappingProxyType({
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "relu": jax.nn.relu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_new": partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
})


def split_blocks(x: jax.Array, blocks: int, sizes: tuple[int, ...]) -> tuple[jax.Array, ...]:
    """Undo a fused product: x [T, blocks * sum(sizes)] -> one [T, blocks * size] per size.

    A fused weight holds, device by device, that device's rows of every part (see ``table.Source``), so the split
    moves nothing between devices.
    """
    rows = x.shape[0]
    x = x.reshape(rows, blocks, sum(sizes))
    ends = np.cumsum(sizes)
    return tuple(x[:, :, end - size : end].reshape(rows, blocks * size) for end, size in zip(ends, sizes))
