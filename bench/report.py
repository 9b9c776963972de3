"""What a benchmark writes where ``--json FILE`` asks for it: its figures, and the command, commit, versions and machine that
they come from.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any


def add_json(parser: argparse.ArgumentParser, default: Path | None = None, text: str = "write the figures there too") -> None:
    """Adds ``--json FILE``."""
    parser.add_argument("--json", type=Path, metavar="FILE", default=default, help=text)
    commit()  # asked for now, as the tree may change while a benchmark runs


def write(path: Path | None, figures: dict[str, Any], *, device: bool = True) -> None:
    """The figures behind their ``origin``, which no field of an earlier file replaces; nothing without a path."""
    if path is not None:
        facts = origin(device)
        replace(path, facts | figures | facts)


def earlier(path: Path | None) -> dict[str, Any]:
    """What an earlier run wrote there, for one that measures a part and keeps the others."""
    return json.loads(path.read_text()) if path is not None and path.exists() else {}


def replace(path: Path, document: dict[str, Any]) -> None:
    """Whole or not at all, so that a process that is killed leaves the document before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
    part.replace(path)


def origin(device: bool = True) -> dict[str, Any]:
    """Command, commit, versions and machine; None for what is not there. ``device``: JAX's too, which this process then holds;
    CUDA and cuDNN are those that JAX loaded."""
    facts = {"command": shlex.join(["python", *sys.orig_argv[1:]]), "commit": commit(), "machine": platform.machine(),
             "processor": processor(), "cpus": os.cpu_count(), "python": platform.python_version(),
             **{name: installed(name) for name in ("jax", "jaxlib", "torch")}, "flashinfer": installed("flashinfer-python")}
    if device:
        import jax

        facts |= {"device": jax.devices()[0].device_kind, "platform": jax.default_backend(), "driver": driver(),
                  "cuda": cuda("cuda_runtime"), "cudnn": cuda("cudnn")}
    return facts


@functools.cache
def commit() -> str:
    """With "-dirty" if a file of it was changed."""
    try:
        done = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True,
                              cwd=Path(__file__).parent)
    except OSError:  # no git
        return "unknown"
    return done.stdout.strip() or "unknown"


def processor() -> str | None:
    """The CPU's name, where Linux tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)


def installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cuda(library: str) -> int | None:
    """The version of "cuda_runtime" or "cudnn" as JAX's plugin gives it, one number."""
    for plugin in ("jax_cuda13_plugin", "jax_cuda12_plugin"):
        try:
            return getattr(importlib.import_module(f"{plugin}._versions"), f"{library}_get_version")()
        except Exception:  # no plugin, or one whose library does not load
            continue
    return None


@functools.cache
def driver() -> str | None:
    """The GPU driver's version, where there is one to ask."""
    try:
        done = subprocess.run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True,
                              text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip().split("\n")[0] or None if done.returncode == 0 else None
