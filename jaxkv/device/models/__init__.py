"""The families and the calls the engine makes: a spec from a config, a weight table, ``forward``, ``finish``, ``logits``.

Parameters are a flat tuple of leaves in table order (a tuple of 300 leaves costs 48 us to pass to a jitted function,
a dict 71). Owns no files and no devices.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from types import MappingProxyType, ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from jaxkv.config import ConfigError
from jaxkv.device.models import gpt2, layers, llama, mistral, opt, qwen2, qwen3
from jaxkv.device.models.hf import Attend
from jaxkv.device.models.table import WeightDecl, init_leaf
from jaxkv.device.spec import ModelSpec

Params = tuple[layers.Weight, ...]

FAMILIES: Mapping[str, ModuleType] = MappingProxyType(
    {"llama": llama, "mistral": mistral, "qwen2": qwen2, "qwen3": qwen3, "gpt2": gpt2, "opt": opt}
)
ARCHITECTURES: Mapping[str, str] = MappingProxyType({
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "GPT2LMHeadModel": "gpt2",
    "OPTForCausalLM": "opt",
})


def family_of(config: dict[str, Any]) -> str:
    """The family of a Hugging Face config, by ``architectures[0]``, else ``model_type``. ConfigError names it."""
    names = config.get("architectures") or []
    name = names[0] if isinstance(names, list) and names else None
    family = config.get("model_type") if name is None else ARCHITECTURES.get(str(name))
    if not isinstance(family, str) or family not in FAMILIES:
        raise ConfigError(f"unsupported architecture {name or config.get('model_type')!r}; supported: "
                          f"{', '.join(ARCHITECTURES)}")
    return family


def spec_from_config(
    config: dict[str, Any], dtype: str = "float32", *, weight_dtype: str | None = None, tp: int = 1,
    out_first: bool = False,
) -> ModelSpec:
    """The spec of a Hugging Face config dict over ``tp`` devices. ConfigError for anything unsupported."""
    spec = FAMILIES[family_of(config)].make_spec(config)
    return replace(spec, dtype=dtype, weight_dtype=weight_dtype or dtype, out_first=out_first).over(tp)


def weight_table(spec: ModelSpec) -> tuple[WeightDecl, ...]:
    """Every leaf of the model, in the order of ``params``."""
    return FAMILIES[spec.family].weight_table(spec)


def init_leaves(spec: ModelSpec, key: jax.Array) -> Iterator[jax.Array]:
    """Random weights, one leaf at a time, on the default device; the same model for every ``tp`` and storage order."""
    for i, decl in enumerate(weight_table(spec)):
        yield init_leaf(decl, jax.random.fold_in(key, i))


def forward(
    spec: ModelSpec, params: Params, token_ids: jax.Array, positions: jax.Array, attend: Attend
) -> tuple[jax.Array, jax.Array]:
    """token_ids, positions i32 [T] -> the residual stream before the last layer [T, d_model] and what its attention gives
    [T, Hq * D], in ``spec.dtype``: as far as every token must go for its KV to be written. ``finish`` does the rest.

    ``attend(layer, q [T, Hq, D], k [T, Hkv, D], v)`` -> [T, Hq, D] gets rotated keys, once per layer, in order.
    """
    return FAMILIES[spec.family].forward(spec, _by_name(spec, params), token_ids, positions, attend)


def finish(spec: ModelSpec, params: Params, x: jax.Array, y: jax.Array) -> jax.Array:
    """Rows of what ``forward`` gives, any R of them -> hidden [R, d_model] in ``spec.dtype``, final norm applied."""
    return FAMILIES[spec.family].finish(spec, _by_name(spec, params), x, y)


def logits(spec: ModelSpec, params: Params, hidden: jax.Array) -> jax.Array:
    """hidden [R, d_model] -> float32 [R, V]."""
    w = _by_name(spec, params)
    table = w["embed" if spec.tied else "head"]
    return layers.linear(hidden, table, out_first=True, dtype=jnp.dtype(jnp.float32))[:, : spec.vocab_size]


def _by_name(spec: ModelSpec, params: Params) -> layers.Leaves:
    return {decl.name: leaf for decl, leaf in zip(weight_table(spec), params, strict=True)}
