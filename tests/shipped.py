"""Compiling as in service, inside a suite that asks XLA for less (see conftest)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import jax
import pytest


@contextmanager
def as_shipped() -> Iterator[None]:
    """What is compiled ahead of time in here is fused as in service, and so needs the memory that it needs there."""
    compile_lowered = jax.stages.Lowered.compile
    fused = {"xla_cpu_use_fusion_emitters": True} if "fusion_emitters" in os.environ["XLA_FLAGS"] else {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.stages.Lowered, "compile", lambda self, compiler_options=None: compile_lowered(
            self, compiler_options=fused | (compiler_options or {})))
        yield
