"""Reading safetensors files: headers, and tensors one at a time.

Tensors are read, not memory-mapped: mapped pages of a checkpoint would count towards the process as long as the map
lives. bfloat16 is ml_dtypes' (numpy has none). Owns no knowledge of models.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxkv.config import ConfigError

DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
MAX_HEADER = 100_000_000  # bytes, the format's own limit
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies: ``start`` and ``nbytes`` in bytes of the file, ``dtype`` as the format spells it."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int

    def read(self) -> np.ndarray:
        """The tensor in its own memory. ConfigError names it when its dtype is no float or the file is short."""
        if self.dtype not in DTYPES:
            raise ConfigError(f"tensor {self.name} in {self.file} has dtype {self.dtype}; "
                              f"supported: {', '.join(DTYPES)}")
        data = np.empty(self.shape, DTYPES[self.dtype])
        with open(self.file, "rb", buffering=0) as f:
            f.seek(self.start)
            view, done = data.reshape(-1).view(np.uint8).data, 0
            while done < self.nbytes:
                got = f.readinto(view[done:])
                if not got:
                    raise ConfigError(f"tensor {self.name} in {self.file} is cut off")
                done += got
        return data


def read_header(file: Path) -> dict[str, TensorEntry]:
    """The tensors of one file, by name. ConfigError when it is not a whole, well-formed safetensors file."""
    try:
        size = file.stat().st_size
        with open(file, "rb") as f:
            length = int.from_bytes(f.read(8), "little")
            if not 0 < length <= min(MAX_HEADER, size - 8):
                raise ValueError("header length out of range")
            header = json.loads(f.read(length))
        entries = {name: _entry(file, name, info, 8 + length) for name, info in header.items()
                   if name != "__metadata__"}
        last = 8 + length
        for entry in sorted(entries.values(), key=lambda e: (e.start, e.nbytes)):
            if entry.nbytes and entry.start < last:
                raise ValueError(f"tensor {entry.name} overlaps another")
            last = max(last, entry.start + entry.nbytes)
        if last > size:
            raise ValueError(f"cut off: {size} bytes, {last} expected")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"cannot read {file}: {error}") from None
    return entries


def _entry(file: Path, name: str, info: dict[str, Any], base: int) -> TensorEntry:
    (start, end), shape, dtype = info["data_offsets"], info["shape"], info["dtype"]
    sizes = [start, end, end - start, *shape]
    if not isinstance(shape, list) or not isinstance(dtype, str) or any(type(n) is not int or n < 0 for n in sizes):
        raise ValueError(f"tensor {name} has shape {shape!r}, data_offsets {[start, end]} and dtype {dtype!r}")
    if dtype in DTYPES and end - start != math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize:
        raise ValueError(f"tensor {name} has {end - start} bytes for shape {tuple(shape)} of {dtype}")
    return TensorEntry(file, name, dtype, tuple(shape), base + start, end - start)


def read_headers(directory: Path) -> dict[str, TensorEntry]:
    """All tensors of a model directory: of model.safetensors, else those that the index names, each from its file, else of all
    files. ConfigError when there are none, and for a tensor in two files or not in the one that the index names."""
    single, index = directory / "model.safetensors", directory / INDEX
    if single.is_file():
        return read_header(single)
    if index.is_file():
        names = _read_index(index)
        headers = {name: read_header(directory / name) for name in sorted(set(names.values()))}
        for tensor, name in names.items():
            if tensor not in headers[name]:
                raise ConfigError(f"tensor {tensor} is not in {directory / name}, where {INDEX} has it")
        return {tensor: headers[name][tensor] for tensor, name in names.items()}
    files = sorted(f for f in directory.glob("*.safetensors") if not f.name.startswith("consolidated"))
    if not files:
        raise ConfigError(f"{directory} has no weights (no *.safetensors file)")
    entries: dict[str, TensorEntry] = {}
    for file in files:
        header = read_header(file)
        if twice := sorted(header.keys() & entries.keys()):
            raise ConfigError(f"tensor {twice[0]} is both in {entries[twice[0]].file} and in {file}")
        entries |= header
    return entries


def _read_index(index: Path) -> dict[str, str]:
    """The file of each tensor. ConfigError for a file outside of the directory."""
    try:
        names = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        for tensor, name in names.items():
            if not isinstance(name, str) or not name or Path(name).is_absolute() or ".." in Path(name).parts:
                raise ValueError(f"weight_map has {name!r} for {tensor}, which is no file of the directory")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"cannot read {index}: {error!r}") from None
    return names
