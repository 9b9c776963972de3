"""Traced steps, kept between processes: a start that finds its own traces nothing.

JAX's compile cache spares the compiling, but what to look for in it is known only when a step has been traced and lowered,
which takes Python longer than loading the executables. So a step is kept as ``jax.export`` writes it (StableHLO in a
flatbuffer: data, nothing that Python runs) under a digest of all that it follows from. Tried on CPU devices only.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import zipfile
from collections.abc import Callable
from hashlib import blake2b
from importlib.util import find_spec
from pathlib import Path

import jax
from jax import export

import pallas_kernels as ops
from jaxkv.device.sampling import SamplerState, TokenLogprobs
from jaxkv.device.state import EngineState
from jaxkv.device.step import StepOutput

log = logging.getLogger("jaxkv")
KEPT = 1000  # files, of some 50 KB for a model of few layers; the ones not used for longest go at a start

for kind in (EngineState, SamplerState, StepOutput, TokenLogprobs, ops.QuantPool):
    export.register_namedtuple_serialization(kind, serialized_name=f"jaxkv.{kind.__name__}")


def sources_digest(*packages: Path) -> bytes:
    """Of the Python and JSON files below these folders."""
    digest = blake2b(digest_size=20)
    for package in packages:
        for path in sorted(package.rglob("*")):
            if path.suffix in (".py", ".json") and path.is_file():
                digest.update(path.name.encode() + path.read_bytes())
    return digest.digest()


SOURCES = sources_digest(Path(__file__).parent.parent, Path(ops.__file__).parent)  # as they are imported, not as edited since


class TracedSteps:
    """A folder of traced steps, each a zip file (for its checksums) of the step and of the names of its kernels."""

    def __init__(self, folder: Path, *made_from: object) -> None:
        """``made_from``: what the steps follow from, by ``repr``, besides the sources, JAX's version and its settings."""
        self._folder, self._made_from = folder, made_from
        for path in sorted(folder.glob("*.zip"), key=_last_used, reverse=True)[KEPT:]:
            path.unlink(missing_ok=True)

    def get(self, name: object, trace: Callable[[], export.Exported]) -> export.Exported:
        """The step of that name (``made_from`` too), kept or traced now. A file that cannot be used is replaced."""
        settings = jax.config.values | {"jax_compilation_cache_dir": None}  # type: ignore[attr-defined]  # of this thread
        made_from = SOURCES, jax.__version__, sorted((k, str(v)) for k, v in settings.items()), self._made_from, name
        path = self._folder / f"{blake2b(repr(made_from).encode(), digest_size=20).hexdigest()}.zip"
        try:
            return _read(path)
        except FileNotFoundError:
            pass
        except Exception as error:  # of whatever stands in the file: it is not ours to know
            log.warning("%s cannot be used (%s: %s); tracing that step", path, type(error).__name__, error)
        with ops.implementations_used() as used:
            data = trace().serialize()
        try:
            _write(path, data, used)
        except OSError as error:
            log.warning("cannot keep traced steps in %s: %s", self._folder, error)
        return export.deserialize(data)  # as later starts have it, or JAX's cache would not know it again


def traced_steps(platform: str, *made_from: object) -> TracedSteps | None:
    """Those beside JAX's compile cache; None for other platforms than CPU, and without a folder on this machine, sources to
    know them by or what ``jax.export`` writes with."""
    folder = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    enabled = jax.config.jax_enable_compilation_cache and folder and "://" not in folder  # type: ignore[attr-defined]
    if platform != "cpu" or not enabled or not __file__.endswith(".py") or find_spec("flatbuffers") is None:
        return None
    return TracedSteps(Path(folder) / "traced-steps", *made_from)


def _last_used(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:  # another process was quicker
        return 0.0


def _read(path: Path) -> export.Exported:
    with zipfile.ZipFile(path) as file:
        step = export.deserialize(bytearray(file.read("step")))
        kernels = json.loads(file.read("kernels.json"))
    for op, name in kernels:
        ops.note_implementation(op, name)
    if os.access(path, os.W_OK):
        os.utime(path)
    return step


def _write(path: Path, step: bytearray, used: dict[tuple[str, str], None]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}-{threading.get_ident()}.part")
    try:
        with zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED) as file:
            file.writestr("kernels.json", json.dumps(list(used)))
            file.writestr("step", bytes(step))
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
