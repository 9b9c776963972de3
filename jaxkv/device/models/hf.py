"""What the families share around their layers: reading a Hugging Face config, and the attention callback's shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxkv.config import ConfigError
from jaxkv.device.models import layers
from jaxkv.device.spec import ModelSpec, Rope

LARGEST = float(jnp.finfo(jnp.float32).max)
Attend = Callable[[int, jax.Array, jax.Array, jax.Array], jax.Array]
"""attend(layer, q [T, Hq, D], k [T, Hkv, D], v [T, Hkv, D]) -> [T, Hq, D]; k is already rotated."""


def integer(config: dict[str, Any], *names: str, default: int | None = None, least: int = 1) -> int:
    """The first of ``names`` that the config has, as an int from ``least``. ConfigError names the field."""
    value = next((config[n] for n in names if config.get(n) is not None), default)
    if value is None:
        raise ConfigError(f"config.json lacks {names[0]}")
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        kind = "a positive integer" if least == 1 else f"an integer of at least {least}"
        raise ConfigError(f"config.json: {names[0]} must be {kind}, got {value!r}")
    return value


def number(config: dict[str, Any], name: str, default: float | None = None) -> float:
    """A positive number that float32 holds. ConfigError names the field."""
    value = config.get(name, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= LARGEST:
        raise ConfigError(f"config.json: {name} must be a positive number, got {value!r}")
    return float(value)


def flag(config: dict[str, Any], name: str, default: bool) -> bool:
    """True or false; ``default`` where the config has none. ConfigError names the field."""
    value = config.get(name)
    if value is not None and not isinstance(value, bool):
        raise ConfigError(f"config.json: {name} must be true or false, got {value!r}")
    return default if value is None else value


def activation(config: dict[str, Any], name: str, default: str) -> str:
    """A key of ``layers.ACTIVATIONS``."""
    value = config.get(name) or default
    if not isinstance(value, str) or value not in layers.ACTIVATIONS:
        raise ConfigError(f"config.json: {name} {value!r} is not supported ({', '.join(layers.ACTIVATIONS)} are)")
    return value


def refuse(config: dict[str, Any], **harmless: Any) -> None:
    """ConfigError when a field asks for something this family's code does not do."""
    for name, value in harmless.items():
        if config.get(name, value) not in (value, None):
            raise ConfigError(f"config.json: {name}={config[name]!r} is not supported (only {value!r} is)")


def rope(config: dict[str, Any]) -> Rope:
    """From ``rope_parameters`` (transformers 5) or ``rope_theta`` with ``rope_scaling`` (before)."""
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(scaling, dict):
        raise ConfigError(f"config.json: rope_parameters must be an object, got {scaling!r}")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    theta = next((c["rope_theta"] for c in (scaling, config) if c.get("rope_theta") is not None), 10000.0)
    theta = number({"rope_theta": theta}, "rope_theta")
    refuse({**config, **scaling}, partial_rotary_factor=1.0)
    if kind == "default":
        return Rope(theta)
    if kind == "linear":
        return Rope(theta, kind, factor=number(scaling, "factor"))
    if kind == "llama3":
        return Rope(theta, kind, number(scaling, "factor"), number(scaling, "low_freq_factor"),
                    number(scaling, "high_freq_factor"), integer(scaling, "original_max_position_embeddings"))
    raise ConfigError(f"config.json: rope_type {kind!r} is not supported (default, linear and llama3 are)")


def windows(config: dict[str, Any], count: int) -> tuple[int | None, ...]:
    """Attention window of each layer from ``layer_types``, else the same ``sliding_window`` for all."""
    window = config.get("sliding_window")
    window = None if window is None else integer(config, "sliding_window")
    kinds = config.get("layer_types")
    if kinds is None:
        return (window,) * count
    if not isinstance(kinds, list) or len(kinds) != count:
        raise ConfigError(f"config.json: layer_types must list {count} layers, got {kinds!r}")
    unknown = sorted({str(k) for k in kinds} - {"full_attention", "sliding_attention"})
    if unknown:
        raise ConfigError(f"config.json: layer_types {', '.join(unknown)} not supported")
    if "sliding_attention" in kinds and window is None:
        raise ConfigError("config.json: layer_types has sliding_attention but sliding_window is not set")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def gated_spec(family: str, config: dict[str, Any], **features: Any) -> ModelSpec:
    """The spec of a Llama-like model; ``features`` are ModelSpec fields this family sets."""
    refuse(config, pretraining_tp=1)
    hidden, heads = integer(config, "hidden_size"), integer(config, "num_attention_heads")
    count = integer(config, "num_hidden_layers")
    dim = integer(config, "head_dim", default=hidden // heads)
    kv = integer(config, "num_key_value_heads", default=heads)
    check_heads(heads, kv, dim)
    if dim % 2:
        raise ConfigError(f"config.json: head_dim must be even for rotary embeddings, got {dim}")
    return ModelSpec(**{
        "family": family,
        "vocab_size": integer(config, "vocab_size"),
        "hidden_size": hidden,
        "mlp_size": integer(config, "intermediate_size"),
        "num_heads": heads,
        "num_kv_heads": kv,
        "head_dim": dim,
        "windows": (None,) * count,
        "max_position": integer(config, "max_position_embeddings"),
        "scale": dim**-0.5,
        "activation": activation(config, "hidden_act", "silu"),
        "norm_eps": number(config, "rms_norm_eps", 1e-6),
        "rope": rope(config),
        "tied": flag(config, "tie_word_embeddings", False),
        "init_std": number(config, "initializer_range", 0.02),
        **features,
    })


def check_heads(heads: int, kv: int, dim: int) -> None:
    """ConfigError when query heads do not group over KV heads."""
    if heads % kv:
        raise ConfigError(f"config.json: num_attention_heads ({heads}) must be a multiple of num_key_value_heads "
                          f"({kv})")
    if dim < 1:
        raise ConfigError(f"config.json: head_dim must be positive, got {dim}")


def split_heads(spec: ModelSpec, qkv: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The fused projection [T, ...] -> q [T, Hq, D], k and v [T, Hkv as stored, D]."""
    kv = spec.stored_kv_heads
    sizes = tuple(n * spec.head_dim // spec.tp for n in (spec.num_heads, kv, kv))
    q, k, v = layers.split_blocks(qkv, spec.tp, sizes)
    return (q.reshape(-1, spec.num_heads, spec.head_dim), k.reshape(-1, kv, spec.head_dim),
            v.reshape(-1, kv, spec.head_dim))
