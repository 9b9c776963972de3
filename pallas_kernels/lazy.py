"""Modules imported when first used: Mosaic GPU takes 0.1 s and, with jax 0.10, absl-py, neither of which CPU needs."""

from __future__ import annotations

import importlib
from typing import Any


class LazyModule:
    """Stands for the module `name`."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(importlib.import_module(self._name), attribute)
