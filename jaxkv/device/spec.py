"""Static descriptions that a jitted step closes over: the model and its KV pools.

Owns frozen, hashable values and what follows from their numbers alone (KV groups, divisibility over the mesh).
Owns no arrays and reads no files: ``models`` makes a ``ModelSpec`` from a Hugging Face config.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from jaxkv.config import ConfigError
from jaxkv.types import KVGroup


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding in Hugging Face's half-rotation layout.

    ``kind`` is "default", "linear" (frequencies divided by ``factor``) or "llama3" (low frequencies divided by
    ``factor``, a smooth ramp between the two wavelengths ``original_max_position / {low,high}_freq_factor``).
    """

    theta: float
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 0


@dataclass(frozen=True)
class ModelSpec:
    """Everything ``forward`` needs to know besides the weights.

    Activations, and the KV cache unless told otherwise, are in ``dtype``; weights are stored in ``weight_dtype``; norms, RoPE,
    softmax and logits are float32. ``tp`` is the number of mesh devices the weights are laid out for: fused leaves are
    blocked by it and KV heads repeated for it, see ``models.table``.
    """

    family: str  # module of jaxkv.device.models
    vocab_size: int
    hidden_size: int
    mlp_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    windows: tuple[int | None, ...]  # by layer, in tokens; None: full attention
    max_position: int  # tokens
    scale: float  # of the attention scores
    activation: str  # a key of layers.ACTIVATIONS
    norm_eps: float
    rope: Rope | None = None
    soft_cap: float | None = None
    tied: bool = False  # logits use the embedding table
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm on each query and key head
    norm_first: bool = True  # OPT-350m normalises after the residual
    final_norm: bool = True
    init_std: float = 0.02
    dtype: str = "float32"
    weight_dtype: str = "float32"
    tp: int = 1
    out_first: bool = False  # weights stored [out, in]; else [in, out]

    @property
    def num_layers(self) -> int:
        return len(self.windows)

    @property
    def stored_kv_heads(self) -> int:
        """KV heads over the whole mesh, repeated ones included."""
        return stored_kv_heads(self, self.tp)

    @property
    def padded_vocab(self) -> int:
        """Rows of the embedding table: the vocabulary rounded up to a multiple of ``tp``."""
        return -(-self.vocab_size // self.tp) * self.tp

    def attention(self, layer: int) -> int | None:
        """Window of a layer in tokens; None: full attention."""
        return self.windows[layer]

    def over(self, tp: int) -> ModelSpec:
        """The same model laid out for ``tp`` devices. ConfigError when a dimension does not divide."""
        stored_kv_heads(self, tp)
        for name, size in (("attention heads", self.num_heads), ("MLP width", self.mlp_size)):
            if size % tp:
                raise ConfigError(f"tensor_parallel_size {tp} does not divide the model's {name} ({size})")
        return replace(self, tp=tp)


def stored_kv_heads(spec: ModelSpec, tp: int) -> int:
    """KV heads held over a mesh of ``tp`` devices: all once, or each repeated so that every device has one."""
    heads = spec.num_kv_heads
    if tp <= heads and heads % tp == 0:
        return heads
    if tp > heads and tp % heads == 0:
        return tp
    raise ConfigError(f"tensor_parallel_size {tp} neither divides the model's KV heads ({heads}) nor is a multiple "
                      "of them")


def cached_dtype(kv_cache_dtype: str, dtype: str) -> str:
    """The dtype of keys and values that the setting ``kv_cache_dtype`` stands for in a model of ``dtype``."""
    return {"auto": dtype, "fp8_e4m3": "float8_e4m3fn"}.get(kv_cache_dtype, kv_cache_dtype)


def kv_groups(spec: ModelSpec, tp: int, dtype: str) -> tuple[KVGroup, ...]:
    """Layers of equal window share a group; full attention first, then windows from wide to narrow.

    ``dtype`` is that of the cached keys and values. ConfigError when the KV heads do not spread over ``tp``.
    """
    heads = stored_kv_heads(spec, tp)
    windows = sorted(set(spec.windows), key=lambda w: (w is not None, -(w or 0)))
    return tuple(
        KVGroup(tuple(i for i, w in enumerate(spec.windows) if w == window), heads, spec.head_dim, dtype, window)
        for window in windows
    )


@dataclass(frozen=True)
class KVSpec:
    """The KV pools: groups, pages per group, tokens per page, and the layout name only pallas_kernels understands."""

    groups: tuple[KVGroup, ...]
    num_pages: tuple[int, ...]
    page_size: int
    layout: str
