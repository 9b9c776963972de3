"""Converted parameters as an Orbax checkpoint: leaves by name, laid out for one device, output-first.

A converted directory holds ``config.json``, whatever tokenizer files were beside it, and ``orbax/``. It loads over any
mesh: a leaf that the mesh wants laid out otherwise is repacked on the way. Orbax is imported when first needed (2 s).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxkv.config import ConfigError
from jaxkv.device import models
from jaxkv.device.models.table import WeightDecl, pack, unpack
from jaxkv.device.spec import ModelSpec

FOLDER = "orbax"


def is_orbax(directory: Path) -> bool:
    """Whether the directory holds a conversion and no safetensors, which come first."""
    return (directory / FOLDER).is_dir() and not any(directory.glob("*.safetensors*"))


def canonical(spec: ModelSpec) -> ModelSpec:
    """The layout on disk."""
    return replace(spec, tp=1, out_first=True)


def to_tensors(decls: tuple[WeightDecl, ...], leaves: Any) -> dict[str, np.ndarray]:
    """Hugging Face tensors, by name, from leaves laid out as ``decls`` say (arrays or what numpy can read)."""
    pieces: dict[str, list[tuple[int, np.ndarray]]] = {}
    flips: dict[str, bool] = {}
    for decl, leaf in zip(decls, leaves, strict=True):
        for source, rows in zip(decl.sources, unpack(decl, np.asarray(leaf)).values()):
            pieces.setdefault(source.name, []).append((source.rows[0] if source.rows else 0, rows))
            flips[source.name] = source.transpose
    return {
        name: np.concatenate([p for _, p in sorted(parts, key=lambda p: p[0])], axis=-1 if flips[name] else 0)
        for name, parts in pieces.items()
    }


def save_params(directory: Path, spec: ModelSpec, params: models.Params) -> None:
    """Write ``params`` under ``directory``/orbax; there must be none yet."""
    import orbax.checkpoint as ocp

    decls, target = models.weight_table(spec), models.weight_table(canonical(spec))
    tree = {}
    for decl, leaf, wanted in zip(decls, params, target, strict=True):
        array = np.asarray(leaf)
        tree[decl.name] = array if decl == wanted else pack(wanted, to_tensors((decl,), (array,)))
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save((directory / FOLDER).resolve(), tree)


def read_leaves(directory: Path, spec: ModelSpec, seen: Callable[[str, np.ndarray], None]) -> Iterator[np.ndarray]:
    """The leaves in the layout of ``spec``, one at a time, in the dtype they were saved in. ``seen`` is given each as saved.

    ConfigError names a leaf that is missing, extra or misshapen.
    """
    import orbax.checkpoint as ocp

    path = (directory / FOLDER).resolve()
    decls, saved = models.weight_table(spec), models.weight_table(canonical(spec))
    with ocp.PyTreeCheckpointer() as checkpointer:
        try:
            found = dict(checkpointer.metadata(path).item_metadata.tree)
        except Exception as error:  # whatever Orbax raises for a damaged folder
            raise ConfigError(f"cannot read the Orbax checkpoint {path}: {str(error).splitlines()[0]}") from None
        check_leaves(path, saved, {name: tuple(meta.shape) for name, meta in found.items()})
        for decl, origin in zip(decls, saved):
            item = {origin.name: jax.ShapeDtypeStruct(origin.shape, found[origin.name].dtype)}
            args = {origin.name: ocp.RestoreArgs(restore_type=np.ndarray)}
            wish = ocp.args.PyTreeRestore(item, args, partial_restore=True)
            leaf = checkpointer.restore(path, args=wish)[origin.name]
            seen(origin.name, leaf)
            yield leaf if decl == replace(origin, dtype=decl.dtype) else pack(decl, to_tensors((origin,), (leaf,)))


def check_leaves(path: Path, wanted: tuple[WeightDecl, ...], found: dict[str, tuple[int, ...]]) -> None:
    """ConfigError that names the first leaf which differs."""
    for decl in wanted:
        if decl.name not in found:
            raise ConfigError(f"{path}: tensor {decl.name} is missing")
        if found[decl.name] != decl.shape:
            raise ConfigError(f"{path}: tensor {decl.name} has shape {found[decl.name]}, expected {decl.shape}")
    extra = sorted(found.keys() - {decl.name for decl in wanted})
    if extra:
        raise ConfigError(f"{path}: unexpected tensor {extra[0]}")
