"""The one packed int32 buffer that carries a step's arguments: declared by one table, packed by numpy, unpacked in the jit.

Owns the columns and their order. A new per-sequence column is one line in ``FIELDS``; nothing else changes.
Passing one numpy buffer costs ~9 us a step, eight separate arrays ~260 us.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import ARGUMENT_ALIGN


@dataclass(frozen=True, slots=True)
class BatchShape:
    """Static sizes of a step, and the only thing that can cause a compile."""

    tokens: int  # T
    seqs: int  # S
    rows: int  # R, positions that yield logits
    decode: bool = False  # every sequence has exactly one token


class Field(NamedTuple):
    name: str
    dims: tuple[str | int, ...]
    dtype: str = "int32"


# T tokens, S sequences, R logit rows, G KV groups, P pages per sequence, A words of attention plan per group.
FIELDS = (
    Field("token_ids", ("T",)),  # below 0: ~slot, the token that slot sampled last
    Field("positions", ("T",)),  # for the rotary embedding
    Field("cache_index", ("T",)),  # where in its sequence's pages the KV goes; < 0: nowhere (padding)
    Field("token_seq", ("T",)),  # row of the page table
    Field("prompt_targets", ("T",)),  # the next prompt token where its log-probability is wanted, else -1
    Field("cu_q_lens", ("S+1",)),
    Field("kv_lens", ("G", "S")),
    Field("page_table", ("G", "S", "P")),
    Field("attention_plan", ("G", "A")),
    Field("row_token", ("R",)),  # index into tokens; 0: padding too
    Field("row_position", ("R",)),  # position of the token to be sampled
    Field("row_slot", ("R",)),  # B: padding
    Field("temperature", ("R",), "float32"),
    Field("top_k", ("R",)),
    Field("top_p", ("R",), "float32"),
    Field("min_p", ("R",), "float32"),
    Field("repetition_penalty", ("R",), "float32"),
    Field("presence_penalty", ("R",), "float32"),
    Field("frequency_penalty", ("R",), "float32"),
    Field("seed_lo", ("R",)),
    Field("seed_hi", ("R",)),
    Field("child", ("R",)),
    Field("flags", ("R",)),
)


class Column(NamedTuple):
    """Where a column lies: ``parts`` of equal size, ``stride`` 4-byte words apart."""

    start: int
    parts: int
    stride: int
    dims: tuple[int, ...]
    dtype: str

    def of(self, buffer: Any) -> Any:
        """The column of an int32 buffer: of a numpy array a view."""
        whole = buffer[self.start : self.start + self.parts * self.stride].reshape(self.parts, self.stride)
        return whole[:, : math.prod(self.dims) // self.parts].reshape(self.dims)


@dataclass(frozen=True)
class BatchLayout:
    """Where each column of ``FIELDS`` lies in the buffer of one batch shape."""

    shape: BatchShape
    groups: int
    pages_per_seq: int
    plan_words: int

    @cached_property
    def columns(self) -> dict[str, Column]:
        """By name. Each starts at a multiple of ``ARGUMENT_ALIGN`` words, and so does what belongs to each KV group."""
        s = self.shape
        sizes = {"T": s.tokens, "S": s.seqs, "S+1": s.seqs + 1, "R": s.rows, "G": self.groups,
                 "P": self.pages_per_seq, "A": self.plan_words}
        out, at = {}, 0
        for field in FIELDS:
            dims = tuple(d if isinstance(d, int) else sizes[d] for d in field.dims)
            parts = self.groups if field.dims[0] == "G" else 1
            stride = -(-int(np.prod(dims)) // parts // ARGUMENT_ALIGN) * ARGUMENT_ALIGN
            out[field.name] = Column(at, parts, stride, dims, field.dtype)
            at += parts * stride
        return out

    @property
    def words(self) -> int:
        return max(c.start + c.parts * c.stride for c in self.columns.values())

    def new(self) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """A fresh zeroed buffer and writable views of its columns. Fresh, because JAX may alias it while a step is pending."""
        buffer = np.zeros(self.words, np.int32)
        return buffer, {name: column.of(buffer).view(column.dtype) for name, column in self.columns.items()}

    def unpack(self, buffer: jax.Array) -> dict[str, jax.Array]:
        """The columns of a traced buffer, int32 [words]."""
        out = {}
        for name, column in self.columns.items():
            words = column.of(buffer)
            out[name] = words if column.dtype == "int32" else jax.lax.bitcast_convert_type(words, jnp.float32)
        return out


def batch_shapes(max_seqs: int, max_tokens: int) -> tuple[BatchShape, ...]:
    """The step executables of a configuration, smallest first; at most 24.

    Decode-only shapes have one token per sequence. Mixed shapes come in two widths: few logit rows for the
    prompts of a quiet server, all of them when many sequences decode. Their number adds, it does not multiply.
    """
    few = min(8, max_seqs)
    decode = sorted({1 << i for i in range(max_seqs.bit_length())} | {max_seqs})[-8:]
    steps = [1 << i for i in range(4, 32)]
    wide = sorted({t for t in steps if max(max_seqs, 127) < t < max_tokens} | {max_tokens, max(1, max_tokens * 3 // 4)})[-8:]
    narrow = [t for t in steps if few < t <= min(512, max_tokens)]
    shapes = {BatchShape(n, n, n, decode=True) for n in decode}
    shapes |= {BatchShape(t, max_seqs, few) for t in narrow if few < max_seqs}
    shapes |= {BatchShape(t, max_seqs, max_seqs) for t in (wide if few < max_seqs else {*wide, *narrow})}
    return tuple(sorted(shapes, key=lambda s: (not s.decode, s.tokens, s.rows)))


def step_sizes(shapes: tuple[BatchShape, ...]) -> tuple[int, ...]:
    """Token counts that steps with prompts are padded to, ascending. Shapes of few logit rows count only where those of all
    rows begin as small as 128 tokens: elsewhere many decodes would be padded to far more than such a size."""
    mixed = [s for s in shapes if not s.decode]
    wide = [s.tokens for s in mixed if s.rows == max(m.rows for m in mixed)]
    return tuple(sorted({s.tokens for s in mixed} if min(wide) <= 128 else set(wide)))


def choose_shape(shapes: tuple[BatchShape, ...], tokens: int, seqs: int, rows: int) -> BatchShape:
    """The first (smallest) shape that holds a step; a decode shape needs one token per sequence."""
    for s in shapes:
        if s.tokens >= tokens and s.seqs >= seqs and s.rows >= rows and (not s.decode or tokens == seqs):
            return s
    raise AssertionError(f"no batch shape holds {tokens} tokens, {seqs} sequences, {rows} rows: {shapes}")
