"""Qwen2 and Qwen2.5: Llama's block with biases on q, k, v, and a window on the layers after the first few."""

from __future__ import annotations

from typing import Any

from jaxkv.device.models import hf
from jaxkv.device.models.llama import BASE, finish, forward, weight_table
from jaxkv.device.spec import ModelSpec

__all__ = ["BASE", "finish", "forward", "make_spec", "weight_table"]


def make_spec(config: dict[str, Any]) -> ModelSpec:
    """From a Hugging Face config dict. ConfigError names what is missing or unsupported."""
    return hf.gated_spec("qwen2", config, windows=layer_windows(config), qkv_bias=True)


def layer_windows(config: dict[str, Any]) -> tuple[int | None, ...]:
    """By layer: ``layer_types`` decides, else layers from ``max_window_layers`` on slide.

    Without ``use_sliding_window`` nothing does, whatever ``sliding_window`` says.
    """
    count = hf.integer(config, "num_hidden_layers")
    if not hf.flag(config, "use_sliding_window", False):
        config = {**config, "layer_types": None, "sliding_window": None}
    elif config.get("sliding_window", 4096) is not None and config.get("layer_types") is None:
        first = hf.integer({"max_window_layers": 28, **config}, "max_window_layers", least=0)
        kinds = ["sliding_attention" if i >= first else "full_attention" for i in range(count)]
        config = {**config, "sliding_window": config.get("sliding_window", 4096), "layer_types": kinds}
    return hf.windows(config, count)
