"""Engine settings: small frozen parts, validated once, never mutated after they are built. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, get_args, get_type_hints

EVICTION_POLICIES = ("lfu", "lru", "lfu-plain", "lfu-decayed", "arc", "2q", "gdsf")
DTYPES = ("auto", "float32", "bfloat16", "float16")
DISK_WRITES = ("reuse", "evict")
KV_CACHE_DTYPES = ("auto", "bfloat16", "int8", "fp8_e4m3")
KV_CODEC_LEVELS = ("exact", "int8", "int4")
KV_CODECS = (*KV_CODEC_LEVELS, "mixed")
KV_LAYOUTS = ("auto", "token_major", "head_major", "paired")
ATTENTION_IMPLS = ("auto", "xla", "mosaic_gpu", "mosaic_tpu", "ref")
_TYPES = {int: "an integer", str: "a string", bool: "True or False", type(None): "None"}


class ConfigError(ValueError):
    """A setting that cannot work; the message names the field and the limit. Commands end with exit code 2."""


def parse_size(text: str | int | None, name: str = "size") -> int | None:
    """Bytes from an int or from text with a K, M, G or T suffix (powers of 1024); None stays None."""
    if text is None:
        return None
    try:
        if isinstance(text, bool):
            raise TypeError
        if isinstance(text, str):
            body = text.strip().upper().removesuffix("B").removesuffix("I")
            scale = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}.get(body[-1:], 1)
            value = int(float(body[:-1] if scale > 1 else body) * scale)
        else:
            value = int(text)
    except (TypeError, ValueError, OverflowError):
        raise ConfigError(f"{name} must be bytes or a number with K, M or G, got {text!r}") from None
    if value < 0:
        raise ConfigError(f"{name} must not be negative, got {text!r}")
    return value


def _check_types(part: Any) -> None:
    """ConfigError names the first field of a dataclass whose value is not of its type."""
    for name, kind in get_type_hints(type(part)).items():
        value, kinds = getattr(part, name), get_args(kind) or (kind,)
        if not isinstance(value, kind) or isinstance(value, bool) and bool not in kinds:
            raise ConfigError(f"{name} must be {' or '.join(_TYPES.get(k, k.__name__) for k in kinds)}, got {value!r}")


def _at_least(name: str, value: int | None, low: int) -> None:
    if value is not None and value < low:
        raise ConfigError(f"{name} must be an integer of at least {low}, got {value!r}")


@dataclass(frozen=True)
class ModelConfig:
    model: str | None = None  # local directory or hub id; None: the built-in model
    dtype: str = "auto"  # of the weights; auto: float32 on CPU, else the checkpoint's
    max_model_len: int | None = None  # tokens; None: the model's window
    skip_tokenizer_init: bool = False
    load_format: str = "auto"  # auto: safetensors; dummy: random weights
    generation_config: str = "auto"  # auto: the sampling defaults of the model's generation_config.json; none: ours
    attention_impl: str = "auto"  # which kernels run; auto: the best that is proven on the platform

    def __post_init__(self) -> None:
        _check_types(self)
        _at_least("max_model_len", self.max_model_len, 2)  # a token of the prompt and one of the answer
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.load_format not in ("auto", "dummy"):
            raise ConfigError(f"load_format must be auto or dummy, got {self.load_format!r}")
        if self.generation_config not in ("auto", "none"):
            raise ConfigError(f"generation_config must be auto or none, got {self.generation_config!r}")
        if self.attention_impl not in ATTENTION_IMPLS:
            raise ConfigError(f"attention_impl must be one of {', '.join(ATTENTION_IMPLS)}, got {self.attention_impl!r}")


@dataclass(frozen=True)
class CacheConfig:
    page_size: int = 16  # tokens
    kv_cache_memory: int | None = None  # bytes over the whole mesh; None: from free memory
    host_kv_memory: int | None = None  # bytes; None: from free memory; 0: no host tier
    eviction_policy: str = "lfu"
    answer_worth: int = 0  # log2 of what a use of an answer's KV counts for the policy, beside a prompt's
    enable_prefix_caching: bool = True
    kv_cache_dtype: str = "auto"  # auto: the model's dtype; int8 and fp8_e4m3 with a scale per token and KV head
    kv_codec: str = "exact"  # form of pages below the device: exact, int8, int4, mixed, or a level for each layer
    disk_kv_path: str | None = None  # directory of the disk tier; None: no disk tier
    disk_kv_memory: int | None = None  # bytes of files; None: 8 GiB
    disk_kv_write: str = "reuse"  # when pages are written: at their second use and when memory drops them, or then only
    disk_kv_required: bool = False  # a disk tier that cannot start is an error
    kv_layout: str = "auto"  # physical pool layout, which only pallas_kernels understands; auto: the best on the platform

    def __post_init__(self) -> None:
        _check_types(self)
        _at_least("page_size", self.page_size, 1)
        _at_least("kv_cache_memory", self.kv_cache_memory, 1)
        _at_least("host_kv_memory", self.host_kv_memory, 0)
        if self.eviction_policy not in EVICTION_POLICIES:
            raise ConfigError(f"eviction_policy must be one of {', '.join(EVICTION_POLICIES)}, "
                              f"got {self.eviction_policy!r}")
        _at_least("disk_kv_memory", self.disk_kv_memory, 1)
        if not -4 <= self.answer_worth <= 4:
            raise ConfigError(f"answer_worth must be in [-4, 4], got {self.answer_worth}")
        if self.disk_kv_write not in DISK_WRITES:
            raise ConfigError(f"disk_kv_write must be one of {', '.join(DISK_WRITES)}, got {self.disk_kv_write!r}")
        if self.disk_kv_path is None and (self.disk_kv_memory is not None or self.disk_kv_required):
            raise ConfigError("disk_kv_memory and disk_kv_required need disk_kv_path")
        if self.kv_cache_dtype not in KV_CACHE_DTYPES:
            raise ConfigError(f"kv_cache_dtype must be one of {', '.join(KV_CACHE_DTYPES)}, got {self.kv_cache_dtype!r}")
        levels = set(self.kv_codec.split(","))
        if self.kv_codec not in KV_CODECS and not levels <= set(KV_CODEC_LEVELS):
            raise ConfigError(f"kv_codec must be one of {', '.join(KV_CODECS)}, or one of {', '.join(KV_CODEC_LEVELS)} for "
                              f"each layer with commas between, got {self.kv_codec!r}")
        if self.kv_cache_dtype in ("int8", "fp8_e4m3") and levels != {"exact"}:
            raise ConfigError(f"kv_codec must be exact with kv_cache_dtype {self.kv_cache_dtype}, which is quantised already, "
                              f"got {self.kv_codec!r}")
        if self.kv_layout not in KV_LAYOUTS:
            raise ConfigError(f"kv_layout must be one of {', '.join(KV_LAYOUTS)}, got {self.kv_layout!r}")


@dataclass(frozen=True)
class SchedConfig:
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    enable_chunked_prefill: bool = True
    overlap: bool = True  # plan and submit step n + 1 before step n is read
    check_batches: bool = False  # look at the pages and lengths of a step before it runs; for debugging

    def __post_init__(self) -> None:
        _check_types(self)
        _at_least("max_num_seqs", self.max_num_seqs, 1)
        _at_least("max_num_batched_tokens", self.max_num_batched_tokens, 1)
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(f"max_num_batched_tokens must be at least max_num_seqs ({self.max_num_seqs}) so that "
                              f"decodes never stall, got {self.max_num_batched_tokens}")


@dataclass(frozen=True)
class MeshConfig:
    tensor_parallel_size: int = 1

    def __post_init__(self) -> None:
        _check_types(self)
        _at_least("tensor_parallel_size", self.tensor_parallel_size, 1)


@dataclass(frozen=True)
class EngineConfig:
    model: ModelConfig = field(default_factory=ModelConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    sched: SchedConfig = field(default_factory=SchedConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    seed: int = 0

    def __post_init__(self) -> None:
        _check_types(self)
