"""The one declaration of a weight, and what derives from it: packing from and to Hugging Face tensors, initial values.

A family lists ``WeightDecl``s; sharding (device.sharding), loading (runtime.weights) and initialisation read them.
Owns no file access and no devices.

Fused leaves. A leaf may hold several Hugging Face tensors (q, k, v; gate, up) along its output axis. It is then a
sequence of ``blocks``, one per device of the mesh, each with that device's rows of every source, so that sharding the
axis evenly gives each device whole heads. A source with fewer groups than blocks is repeated: that is how KV heads
are replicated when there are more devices than heads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxkv.device.spec import ModelSpec


@dataclass(frozen=True)
class Source:
    """A Hugging Face tensor, or a range of its output rows, that goes into a leaf.

    ``shape`` is the tensor's shape in the file; ``transpose`` marks [in, out] files (GPT-2's Conv1D); ``rows`` selects
    output rows; ``groups`` says into how many equal parts those rows are dealt out over the blocks.
    """

    name: str
    shape: tuple[int, ...]
    transpose: bool = False
    rows: tuple[int, int] | None = None
    groups: int = 1


@dataclass(frozen=True)
class Part:
    """One output range of a matrix: ``size`` outputs from the tensor ``name``, in ``units`` that stay on one device.

    ``units`` is the number of heads or of MLP columns; 1 for outputs that are never dealt out. When the tensor holds
    more than this part, ``file_size`` is its number of outputs and ``start`` where this part begins.
    """

    name: str
    size: int
    units: int = 1
    start: int = 0
    file_size: int | None = None


@dataclass(frozen=True)
class WeightDecl:
    """One leaf of the parameters.

    ``shape`` is as stored, ``axes`` names its dimensions ("embed", "heads", "mlp", "vocab", "position", "norm"), which
    device.sharding maps to mesh axes. ``swap``: stored [in, out], the transpose of what the sources give. ``init`` is
    "normal" (standard deviation ``std``), "ones" or "zeros". Output rows beyond the sources are zero (padding).
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    axes: tuple[str, ...]
    sources: tuple[Source, ...]
    init: str = "normal"
    std: float = 0.02
    blocks: int = 1
    swap: bool = False

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * jnp.dtype(self.dtype).itemsize


def pack(decl: WeightDecl, tensors: dict[str, Any], xp: Any = np) -> Any:
    """The leaf from its sources' tensors (by name, file order and dtype); ``xp`` is numpy or jax.numpy.

    The result has ``decl.shape``; its dtype is that of the tensors.
    """
    parts: list[list[Any]] = [[] for _ in range(decl.blocks)]
    for source in decl.sources:
        tensor = tensors[source.name]
        tensor = tensor.T if source.transpose else tensor
        tensor = tensor if source.rows is None else tensor[source.rows[0] : source.rows[1]]
        step = tensor.shape[0] // source.groups
        for block in range(decl.blocks):
            group = block * source.groups // decl.blocks
            parts[block].append(tensor[group * step : (group + 1) * step])
    rows = [part for block in parts for part in block]
    leaf = rows[0] if len(rows) == 1 else xp.concatenate(rows)
    out = decl.shape[-1] if decl.swap else decl.shape[0]
    if leaf.shape[0] < out:
        leaf = xp.concatenate([leaf, xp.zeros((out - leaf.shape[0], *leaf.shape[1:]), leaf.dtype)])
    return leaf.T if decl.swap else leaf


def unpack(decl: WeightDecl, leaf: np.ndarray) -> dict[tuple[str, tuple[int, int] | None], np.ndarray]:
    """The inverse of ``pack``: each source's rows, in file order, by (name, rows)."""
    leaf = leaf.T if decl.swap else leaf
    lengths = [(s.rows[1] - s.rows[0] if s.rows else s.shape[-1 if s.transpose else 0]) // s.groups
               for s in decl.sources]
    result = {}
    for i, source in enumerate(decl.sources):
        first = [-(-group * decl.blocks // source.groups) for group in range(source.groups)]  # block that holds it
        starts = [block * sum(lengths) + sum(lengths[:i]) for block in first]
        rows = np.concatenate([leaf[start : start + lengths[i]] for start in starts])
        result[source.name, source.rows] = rows.T if source.transpose else rows
    return result


def init_leaf(decl: WeightDecl, key: jax.Array) -> jax.Array:
    """Initial values, laid out like a loaded leaf: the same model whatever the mesh."""
    def values(source: Source, key: jax.Array) -> jax.Array:
        if decl.init == "normal":
            return jax.random.normal(key, source.shape, jnp.float32) * decl.std
        return jnp.full(source.shape, 1.0 if decl.init == "ones" else 0.0, jnp.float32)

    keys = jax.random.split(key, len(decl.sources))
    tensors = {source.name: values(source, k) for source, k in zip(decl.sources, keys)}
    return pack(decl, tensors, jnp).astype(decl.dtype)


class TableBuilder:
    """Collects a family's declarations in order; knows the storage order and the blocks of fused leaves."""

    def __init__(self, spec: ModelSpec) -> None:
        self._spec = spec
        self._decls: list[WeightDecl] = []

    def build(self) -> tuple[WeightDecl, ...]:
        return tuple(self._decls)

    def add(self, name: str, shape: tuple[int, ...], axes: tuple[str, ...], *sources: Source, **options: Any) -> None:
        """A leaf as it is, for what the methods below do not cover."""
        options = {"dtype": self._spec.weight_dtype, "std": self._spec.init_std, **options}
        self._decls.append(WeightDecl(name, shape, axes=axes, sources=sources, **options))

    def vocab(self, name: str, source: str) -> None:
        """A [vocabulary, hidden] table, output-first on every backend because the tied head shares it."""
        rows, width = self._spec.vocab_size, self._spec.hidden_size
        self.add(name, (self._spec.padded_vocab, width), ("vocab", "embed"), Source(source, (rows, width)))

    def vector(self, name: str, source: str, size: int, init: str) -> None:
        """A replicated vector: norm weights and biases of whole outputs."""
        self.add(name, (size,), ("embed",), Source(source, (size,)), init=init)

    def norm(self, name: str, source: str) -> None:
        """Weight and bias of a LayerNorm over the hidden axis."""
        self.vector(name, source + ".weight", self._spec.hidden_size, "ones")
        self.vector(name + ".bias", source + ".bias", self._spec.hidden_size, "zeros")

    def matrix(
        self, name: str, inputs: int, parts: tuple[Part, ...], axes: tuple[str, str], *, bias: bool,
        conv1d: bool = False,
    ) -> None:
        """A weight [in, out] or [out, in] and its bias, fused from ``parts``; ``axes`` names (in, out).

        ``conv1d``: the file holds [in, out].
        """
        swap, blocks = not self._spec.out_first, self._spec.tp
        groups = [min(blocks, part.units) for part in parts]
        sizes = [part.size * blocks // g for part, g in zip(parts, groups)]
        out = sum(sizes) if max(groups) > 1 else sum(part.size for part in parts)
        blocks = blocks if max(groups) > 1 else 1

        def sources(suffix: str, inner: tuple[int, ...]) -> tuple[Source, ...]:
            result = []
            for part, group in zip(parts, groups):
                shape = (part.file_size or part.size, *inner)
                rows = None if part.file_size is None else (part.start, part.start + part.size)
                flip = conv1d and bool(inner)
                result.append(Source(part.name + suffix, shape[::-1] if flip else shape, flip, rows, group))
            return tuple(result)

        shape, names = ((inputs, out), axes) if swap else ((out, inputs), axes[::-1])
        self.add(name, shape, names, *sources(".weight", (inputs,)), blocks=blocks, swap=swap)
        if bias:
            self.add(name + ".bias", (out,), axes[1:], *sources(".bias", ()), blocks=blocks, init="zeros")
