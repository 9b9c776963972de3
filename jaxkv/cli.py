"""Engine options shared by the command lines and by ``LLM``: one table, three ways in.

Owns the names, types and help texts of the options and how an error ends a command. Owns no default: those are the
fields of ``jaxkv.config``. Standard library only, so that ``--help`` starts no device.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, NoReturn, TypedDict

from jaxkv.config import (
    ATTENTION_IMPLS,
    DISK_WRITES,
    DTYPES,
    EVICTION_POLICIES,
    KV_CACHE_DTYPES,
    CacheConfig,
    ConfigError,
    EngineConfig,
    MeshConfig,
    ModelConfig,
    SchedConfig,
    parse_size,
)


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
    tensor_parallel_size: int
    seed: int


@dataclass(frozen=True)
class _Option:
    name: str
    kind: str  # "text", "int", "size" or "switch"
    help: str
    choices: tuple[str, ...] | None = None
    synonym: str | None = None


_OPTIONS = (
    _Option("model", "text", "model directory or hub id (default: the built-in model)"),
    _Option("dtype", "text", "dtype of the weights and activations", choices=DTYPES),
    _Option("max_model_len", "int", "longest prompt plus answer in tokens (default: the model's window)"),
    _Option("max_num_seqs", "int", "sequences that may run at once"),
    _Option("max_num_batched_tokens", "int", "token budget of one step"),
    _Option("page_size", "int", "tokens per KV page", synonym="block_size"),
    _Option("kv_cache_memory", "size", "KV pool on the device: bytes or with K, M, G (default: from free memory)"),
    _Option("host_kv_memory", "size", "KV tier in host memory: bytes or with K, M, G; 0: none "
                                      "(default: from free memory)"),
    _Option("disk_kv_path", "text", "directory of a KV tier on disk, which restarts and other processes share (default: none)"),
    _Option("disk_kv_memory", "size", "size of its files: bytes or with K, M, G (default: 8G)"),
    _Option("disk_kv_write", "text", "reuse: pages are written when they are used again, and when memory drops them; "
                                     "evict: only then", choices=DISK_WRITES),
    _Option("disk_kv_required", "switch", "do not start without the disk tier"),
    _Option("kv_codec", "text", "form of KV pages in host memory and on disk: exact; int8, int4, mixed (int8, deeper half "
                                "int4 but for the last layer), or a level for each layer with commas between: approximate"),
    _Option("eviction_policy", "text", "which pages leave first", choices=EVICTION_POLICIES),
    _Option("answer_worth", "int", "log2 of what a use of an answer's KV counts beside a prompt's, for the eviction policy"),
    _Option("tensor_parallel_size", "int", "devices that share the model"),
    _Option("load_format", "text", "auto: safetensors; dummy: random weights", choices=("auto", "dummy")),
    _Option("generation_config", "text", "auto: sampling fields that a request leaves out are those of the model's "
                                         "generation_config.json; none: not", choices=("auto", "none")),
    _Option("kv_cache_dtype", "text", "dtype of the KV cache; auto: that of the model; int8, fp8_e4m3: quantised, approximate",
            choices=KV_CACHE_DTYPES),
    _Option("kv_layout", "text", "physical layout of the KV pool"),
    _Option("attention_impl", "text", "kernels of attention and KV write; auto: the best that is proven on the platform",
            choices=ATTENTION_IMPLS),
    _Option("seed", "int", "seed of the requests that bring none"),
    _Option("skip_tokenizer_init", "switch", "token ids in, token ids out"),
    _Option("enable_prefix_caching", "switch", "reuse the KV of shared prefixes"),
    _Option("enable_chunked_prefill", "switch", "split long prompts over steps"),
    _Option("overlap", "switch", "plan a step while the previous one runs"),
)


class OneLineParser(argparse.ArgumentParser):
    """Ends with exit code 2 and one line instead of the whole usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def add_engine_args(parser: argparse.ArgumentParser) -> None:
    """Adds every engine option; those not given stay out of the namespace, so that defaults live in one place."""
    defaults = _defaults()
    group = parser.add_argument_group("engine")
    for option in _OPTIONS:
        flags = [f"--{name.replace('_', '-')}" for name in (option.name, option.synonym) if name]
        default = defaults[option.name]
        extra: dict[str, Any] = {"help": option.help + (f" (default: {default})" if default is not None else "")}
        if option.kind == "switch":
            extra["action"] = argparse.BooleanOptionalAction
        else:
            extra |= {"type": int if option.kind == "int" else str, "choices": option.choices,
                      "metavar": None if option.choices else {"int": "N", "size": "SIZE"}.get(option.kind, "NAME")}
        group.add_argument(*flags, dest=option.name, default=argparse.SUPPRESS, **extra)


def config_from_namespace(namespace: argparse.Namespace) -> EngineConfig:
    """The settings of a parsed command line. Raises ConfigError that names the field and the limit."""
    names = {option.name for option in _OPTIONS}
    return engine_config({name: value for name, value in vars(namespace).items() if name in names})


def engine_config(options: Mapping[str, Any]) -> EngineConfig:
    """Settings from option names and values; names left out keep their default. Raises ConfigError."""
    kinds = {option.name: option.kind for option in _OPTIONS}
    if unknown := sorted(set(options) - set(kinds)):
        raise ConfigError(f"unknown option {unknown[0]!r}; known: {', '.join(sorted(kinds))}")
    values = {name: parse_size(value, name) if kinds[name] == "size" else value for name, value in options.items()}
    for name, value in values.items():
        if kinds[name] == "switch" and not isinstance(value, bool):
            raise ConfigError(f"{name} must be True or False, got {value!r}")
    seed = values.pop("seed", 0)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ConfigError(f"seed must be an integer, got {seed!r}")

    def part(cls: type) -> Any:
        return cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values})

    return EngineConfig(part(ModelConfig), part(CacheConfig), part(SchedConfig), part(MeshConfig), seed)


@contextlib.contextmanager
def one_line_errors(prog: str) -> Iterator[None]:
    """Turns a ConfigError into one line on stderr and exit code 2."""
    try:
        yield
    except ConfigError as error:
        print(f"{prog}: error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None


def _defaults() -> dict[str, Any]:
    parts = (ModelConfig(), CacheConfig(), SchedConfig(), MeshConfig())
    return {f.name: getattr(part, f.name) for part in parts for f in fields(part)} | {"seed": EngineConfig().seed}
