"""jaxkv: an LLM inference engine built around its KV cache.

``LLM`` is imported when first asked for, so that ``import jaxkv`` loads neither JAX nor a tokenizer.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from jaxkv.config import CacheConfig, ConfigError, EngineConfig, MeshConfig, ModelConfig, SchedConfig
from jaxkv.params import SamplingParams, Structured

if TYPE_CHECKING:
    from jaxkv.llm import LLM
    from jaxkv.runtime.outputs import CompletionOutput, Logprob, RequestOutput

__version__ = "0.1.0"

_LAZY = {"LLM": "jaxkv.llm", "CompletionOutput": "jaxkv.runtime.outputs", "Logprob": "jaxkv.runtime.outputs",
         "RequestOutput": "jaxkv.runtime.outputs"}

__all__ = ["LLM", "CacheConfig", "CompletionOutput", "ConfigError", "EngineConfig", "Logprob", "MeshConfig",
           "ModelConfig", "RequestOutput", "SamplingParams", "SchedConfig", "Structured"]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)
