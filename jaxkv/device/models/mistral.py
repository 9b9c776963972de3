"""Mistral: Llama's block, every layer with the same sliding window (or none)."""

from __future__ import annotations

from typing import Any

from jaxkv.device.models import hf
from jaxkv.device.models.llama import BASE, finish, forward, weight_table
from jaxkv.device.spec import ModelSpec

__all__ = ["BASE", "finish", "forward", "make_spec", "weight_table"]


def make_spec(config: dict[str, Any]) -> ModelSpec:
    """From a Hugging Face config dict. ConfigError names what is missing or unsupported."""
    window = config.get("sliding_window", 4096)  # absent means 4096 to transformers, null means none
    count = hf.integer(config, "num_hidden_layers")
    return hf.gated_spec("mistral", config, windows=hf.windows({"sliding_window": window}, count))
