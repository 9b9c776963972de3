"""Qwen3: Llama's block with an RMSNorm on every query and key head before they are rotated."""

from __future__ import annotations

from typing import Any

from jaxkv.device.models import hf
from jaxkv.device.models.llama import BASE, finish, forward, weight_table
from jaxkv.device.models.qwen2 import layer_windows
from jaxkv.device.spec import ModelSpec

__all__ = ["BASE", "finish", "forward", "make_spec", "weight_table"]


def make_spec(config: dict[str, Any]) -> ModelSpec:
    """From a Hugging Face config dict. ConfigError names what is missing or unsupported."""
    bias = hf.flag(config, "attention_bias", False)
    return hf.gated_spec("qwen3", {"head_dim": 128, **config}, windows=layer_windows(config), qk_norm=True,
                         qkv_bias=bias, out_bias=bias)
