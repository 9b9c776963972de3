"""Traced steps, kept between processes: a start that finds its own traces nothing.

JAX's compile cache spares the compiling, but what to look for in it is known only when a step has been traced and lowered,
which takes Python longer than loading the executables. So a step is kept as ``jax.export`` writes it (StableHLO in a
flatbuffer: data, nothing that Python runs) under a digest of all that it follows from. Tried on CPU devices only.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
import zipfile
from collections.abc import Callable
from hashlib import blake2b
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import jax
from jax import export

import pallas_kernels as ops
from jaxkv.device.sampling import SamplerState, TokenLogprobs
from jaxkv.device.state import EngineState
from jaxkv.device.step import StepOutput

log = logging.getLogger("jaxkv")

for kind in (EngineState, SamplerState, StepOutput, TokenLogprobs, ops.QuantPool):
    export.register_namedtuple_serialization(kind, serialized_name=f"jaxkv.{kind.__name__}")


class TracedSteps:
    """A folder of traced steps, each a zip file (for its checksums) of the step and of the names of its kernels."""

    def __init__(self, folder: Path, *made_from: object) -> None:
        """``made_from``: what the steps follow from, by ``repr``, besides the sources, the versions and JAX's settings."""
        settings = sorted((name, str(value)) for name, value in jax.config.values.items())  # type: ignore[attr-defined]
        self._folder = folder
        self._digest = blake2b(repr((version("jax"), version("jaxlib"), settings, made_from)).encode(), digest_size=20)
        for package in (Path(__file__).parent.parent, Path(ops.__path__[0])):
            for path in sorted(package.rglob("*")):
                if path.suffix in (".py", ".json"):
                    self._digest.update(path.name.encode() + path.read_bytes())

    def get(self, name: object, trace: Callable[[], export.Exported]) -> export.Exported:
        """The step of that name (``made_from`` too), kept or traced now. A file that cannot be used is replaced."""
        digest = self._digest.copy()
        digest.update(repr(name).encode())
        path = self._folder / f"{digest.hexdigest()}.zip"
        try:
            return _read(path)
        except FileNotFoundError:
            pass
        except Exception as error:  # of whatever stands in the file: it is not ours to know
            log.warning("%s cannot be used (%s: %s); tracing that step", path, type(error).__name__, error)
        with ops.implementations_used() as used:
            step = trace()
        data = step.serialize()
        try:
            _write(path, data, used)
        except OSError as error:
            log.warning("cannot keep traced steps in %s: %s", self._folder, error)
        return export.deserialize(data)  # as later starts have it, or JAX's cache would not know it again


def traced_steps(platform: str, *made_from: object) -> TracedSteps | None:
    """Those beside JAX's compile cache, if it has a folder on this machine."""
    folder = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    enabled = jax.config.jax_enable_compilation_cache  # type: ignore[attr-defined]
    if platform != "cpu" or not enabled or not folder or "://" in folder or find_spec("flatbuffers") is None:
        return None
    return TracedSteps(Path(folder) / "traced-steps", *made_from)


def _read(path: Path) -> export.Exported:
    with zipfile.ZipFile(path) as file:
        step = export.deserialize(bytearray(file.read("step")))
        for op, name in json.loads(file.read("kernels.json")):
            ops.note_implementation(op, name)
    return step


def _write(path: Path, step: bytearray, used: dict[tuple[str, str], None]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as part:
        with zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED) as file:
            file.writestr("kernels.json", json.dumps(list(used)))
            file.writestr("step", bytes(step))
    os.replace(part.name, path)
