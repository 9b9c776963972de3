"""Engine options shared by the command lines and by ``LLM``: one table, every way in. And the sampling options of the commands.

Owns the names, types and help texts of the options. Owns no default: those are the fields of ``jaxkv.config``. Standard
library only, so that ``--help`` starts no device.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypedDict

from jaxkv.config import (
    ATTENTION_IMPLS,
    DISK_WRITES,
    DTYPES,
    EVICTION_POLICIES,
    KV_CACHE_DTYPES,
    KV_LAYOUTS,
    CacheConfig,
    ConfigError,
    EngineConfig,
    MeshConfig,
    ModelConfig,
    SchedConfig,
    parse_size,
)
from jaxkv.params import SamplingParams


class EngineOptions(TypedDict, total=False):
    """Keyword arguments of ``LLM``. Sizes are bytes, or text such as "2G"."""

    dtype: str
    max_model_len: int | None
    skip_tokenizer_init: bool
    load_format: str
    generation_config: str
    page_size: int
    kv_cache_memory: int | str | None
    host_kv_memory: int | str | None
    disk_kv_path: str | None
    disk_kv_memory: int | str | None
    disk_kv_write: str
    disk_kv_required: bool
    kv_codec: str
    eviction_policy: str
    answer_worth: int
    enable_prefix_caching: bool
    kv_cache_dtype: str
    kv_layout: str
    attention_impl: str
    max_num_seqs: int
    max_num_batched_tokens: int
    enable_chunked_prefill: bool
    overlap: bool
    check_batches: bool
    tensor_parallel_size: int
    seed: int


@dataclass(frozen=True)
class _Option:
    name: str
    kind: str  # "text", "dir", "int", "size" or "switch"
    help: str
    choices: tuple[str, ...] | None = None
    synonym: str | None = None


_OPTIONS = {
    "model": (
        _Option("model", "dir", "model directory or hub id (default: the built-in model)"),
        _Option("dtype", "text", "dtype of the weights and activations", choices=DTYPES),
        _Option("max_model_len", "int", "longest prompt plus answer in tokens (default: the model's window)"),
        _Option("load_format", "text", "auto: safetensors; dummy: random weights", choices=("auto", "dummy")),
        _Option("generation_config", "text", "auto: sampling fields that a request leaves out are those of the model's "
                                             "generation_config.json; none: not", choices=("auto", "none")),
        _Option("skip_tokenizer_init", "switch", "token ids in, token ids out"),
        _Option("tensor_parallel_size", "int", "devices that share the model"),
        _Option("attention_impl", "text", "kernels of attention and of KV moves; auto: the best that is proven on the platform",
                choices=ATTENTION_IMPLS),
        _Option("seed", "int", "seed of the requests that bring none"),
    ),
    "KV cache": (
        _Option("kv_cache_memory", "size", "KV pool on the device: bytes or with K, M, G (default: from free memory)"),
        _Option("host_kv_memory", "size", "KV tier in host memory: bytes or with K, M, G; 0: none "
                                          "(default: from free memory)"),
        _Option("disk_kv_path", "dir", "directory of a KV tier on disk, which restarts and other processes share "
                                        "(default: none)"),
        _Option("disk_kv_memory", "size", "size of its files: bytes or with K, M, G (default: 8G)"),
        _Option("disk_kv_write", "text", "reuse: pages are written when they are used again, and when memory drops them; "
                                         "evict: only then", choices=DISK_WRITES),
        _Option("disk_kv_required", "switch", "do not start without the disk tier"),
        _Option("kv_cache_dtype", "text", "dtype of the KV cache; auto: that of the model; int8, fp8_e4m3: quantised, "
                                          "approximate", choices=KV_CACHE_DTYPES),
        _Option("kv_codec", "text", "form of KV pages in host memory and on disk: exact; int8, int4, mixed (int8, deeper half "
                                    "int4 but for the last layer), or a level for each layer with commas between: approximate"),
        _Option("page_size", "int", "tokens per KV page", synonym="block_size"),
        _Option("kv_layout", "text", "physical layout of the KV pool", choices=KV_LAYOUTS),
        _Option("eviction_policy", "text", "which pages leave first", choices=EVICTION_POLICIES),
        _Option("answer_worth", "int", "log2 of what a use of an answer's KV counts beside a prompt's, for the eviction "
                                       "policy"),
        _Option("enable_prefix_caching", "switch", "reuse the KV of shared prefixes"),
    ),
    "scheduling": (
        _Option("max_num_seqs", "int", "sequences that may run at once"),
        _Option("max_num_batched_tokens", "int", "token budget of one step"),
        _Option("enable_chunked_prefill", "switch", "split long prompts over steps"),
        _Option("overlap", "switch", "plan a step while the previous one runs"),
        _Option("check_batches", "switch", "look at the pages and lengths of a step before it runs; for debugging"),
    ),
}
_KINDS = {option.name: option.kind for options in _OPTIONS.values() for option in options}
BASIC_ENGINE_OPTIONS = ("model", "dtype", "max_model_len", "tensor_parallel_size", "kv_cache_memory", "host_kv_memory",
                        "disk_kv_path", "disk_kv_memory", "kv_cache_dtype", "max_num_seqs")

SAMPLING_OPTIONS: dict[str, type] = {
    "max_tokens": int, "min_tokens": int, "n": int, "temperature": float, "top_p": float, "top_k": int, "min_p": float,
    "repetition_penalty": float, "presence_penalty": float, "frequency_penalty": float,
}


def add_engine_args(parser: argparse.ArgumentParser) -> None:
    """Adds every engine option; those not given stay out of the namespace, so that defaults live in one place."""
    defaults = _defaults()
    for title, options in _OPTIONS.items():
        _add_group(parser.add_argument_group(title), options, defaults)


def _add_group(group: Any, options: tuple[_Option, ...], defaults: Mapping[str, Any]) -> None:
    for option in options:
        flags = [f"--{name.replace('_', '-')}" for name in (option.name, option.synonym) if name]
        default = defaults[option.name]
        extra: dict[str, Any] = {"help": option.help + (f" (default: {default})" if default is not None else "")}
        if option.kind == "switch":
            extra["action"] = argparse.BooleanOptionalAction
        else:
            metavar = None if option.choices else {"int": "N", "size": "SIZE", "dir": "DIR"}.get(option.kind, "NAME")
            extra |= {"type": int if option.kind == "int" else str, "choices": option.choices, "metavar": metavar}
        group.add_argument(*flags, dest=option.name, default=argparse.SUPPRESS, **extra)


def config_from_namespace(namespace: argparse.Namespace) -> EngineConfig:
    """The settings of a parsed command line. Raises ConfigError that names the field and the limit."""
    return engine_config({name: value for name, value in vars(namespace).items() if name in _KINDS})


def engine_config(options: Mapping[str, Any]) -> EngineConfig:
    """Settings from option names and values; names left out keep their default. Raises ConfigError."""
    if unknown := sorted(set(options) - set(_KINDS)):
        raise ConfigError(f"unknown option {unknown[0]!r}; known: {', '.join(sorted(_KINDS))}")
    values: dict[str, Any] = {name: parse_size(value, name) if _KINDS[name] == "size" else value
                              for name, value in options.items()}
    values |= {name: str(value) for name, value in values.items() if isinstance(value, Path)}

    def part(cls: type) -> Any:
        return cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values})

    return EngineConfig(part(ModelConfig), part(CacheConfig), part(SchedConfig), part(MeshConfig), values.get("seed", 0))


def add_sampling_args(group: Any, names: Iterable[str] = SAMPLING_OPTIONS) -> None:
    """Adds sampling options to a group of options; those not given are None."""
    for name in names:
        kind = SAMPLING_OPTIONS[name]
        group.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar="N" if kind is int else "X")
    group.add_argument("--stop", action="append", metavar="TEXT", help="may be repeated")


def sampling_overrides(args: argparse.Namespace, names: Iterable[str] = (*SAMPLING_OPTIONS, "stop")) -> dict[str, Any]:
    """The sampling fields that were given. ConfigError names the field and the limit."""
    overrides = {name: value for name in names if (value := getattr(args, name)) is not None}
    try:  # a min_tokens alone must not be held against the default max_tokens
        SamplingParams(**({"max_tokens": None} | overrides))
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return overrides


def _defaults() -> dict[str, Any]:
    parts = (ModelConfig(), CacheConfig(), SchedConfig(), MeshConfig())
    return {f.name: getattr(part, f.name) for part in parts for f in fields(part)} | {"seed": EngineConfig().seed}
