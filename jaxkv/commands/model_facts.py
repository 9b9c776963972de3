"""What a model directory would need, and what a directory of the disk tier holds, without an engine and without a device."""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import pallas_kernels as ops
from jaxkv.config import ConfigError, SchedConfig
from jaxkv.device import models
from jaxkv.device.spec import cached_dtype, kv_groups
from jaxkv.runtime.disk.directory import SUFFIX
from jaxkv.runtime.disk.format import HEADER_BYTES, CorruptError, DiskFormat, Layout, read_format
from jaxkv.runtime.disk.segment import scan
from jaxkv.runtime.memory import plan_capacity
from jaxkv.runtime.orbax_io import is_orbax
from jaxkv.runtime.safetensors_io import read_headers
from jaxkv.runtime.weights import find_model, read_config, resolve_dtype


def model_facts(model: str | None, *, platform: str, dtype: str, kv_cache_dtype: str, page_size: int,
                memory: int | None) -> dict[str, Any]:
    """The model of a directory (None: the built-in one) as the engine understands it. Bytes, of KV those in the memory of one
    device of a platform ("cpu", "gpu", "tpu"): padding included, per token rounded up; ``kv_tokens`` fit into ``memory``.
    ConfigError for a directory that holds no model that can be served."""
    if model is not None and not Path(model).expanduser().is_dir():
        raise ConfigError(f"{model!r} is neither a directory nor a server's URL")
    directory = find_model(model)
    config = read_config(directory)
    entries = {} if is_orbax(directory) else read_headers(directory)
    dtype = resolve_dtype(dtype, platform, config, entries)
    spec = models.spec_from_config(config, dtype)
    table = models.weight_table(spec)
    kv_dtype = cached_dtype(kv_cache_dtype, dtype)
    groups = kv_groups(spec, 1, kv_dtype)
    layout = ops.resolve_layout("auto", spec.head_dim, platform)
    page_bytes = [len(g.layers) * ops.pool_page_bytes(layout, page_size, g.kv_heads, g.head_dim, g.dtype, platform)
                  for g in groups]
    found: dict[str, Any] = {
        "directory": str(directory), "family": spec.family, "parameters": sum(math.prod(decl.shape) for decl in table),
        "platform": platform, "dtype": dtype, "weight_bytes": sum(decl.nbytes for decl in table), "layers": spec.num_layers,
        "heads": spec.num_heads, "kv_heads": spec.num_kv_heads, "head_dim": spec.head_dim, "window": spec.max_position,
        "vocabulary": spec.vocab_size, "kv_cache_dtype": kv_dtype,
        "kv_groups": [{"layers": len(g.layers), "window": g.window, "bytes_per_token": -(-size // page_size)}
                      for g, size in zip(groups, page_bytes)],
        "kv_bytes_per_token": -(-sum(page_bytes) // page_size),
    }
    if memory is not None:
        capacity = plan_capacity(groups, page_size, SchedConfig(), spec.max_position, kv_cache_memory=memory, host_kv_memory=0,
                                 free_device=(memory, memory), free_host=0, page_bytes=page_bytes)
        found |= {"memory": memory, "kv_pages": list(capacity.num_pages), "kv_tokens": min(capacity.num_pages) * page_size}
    return found


def disk_facts(path: Path) -> list[dict[str, Any]]:
    """The segments of a directory of the disk tier by format (each is a model with its settings). Changes nothing, so it may
    be asked while engines use the directory."""
    by_format: dict[DiskFormat | None, list[Path]] = defaultdict(list)
    for file in sorted(path.glob(f"*{SUFFIX}")):
        with file.open("rb") as segment:
            by_format[read_format(segment.read(HEADER_BYTES), file.name)].append(file)
    return [_one_format(form, files) for form, files in by_format.items()]


def _one_format(form: DiskFormat | None, files: list[Path]) -> dict[str, Any]:
    found: dict[str, Any] = {"segments": len(files), "bytes": sum(file.stat().st_size for file in files)}
    if form is None:
        return {"fingerprint": None, **found}
    layout, pages, damaged = Layout(form), 0, 0
    for file in files:
        try:
            held = scan(file, layout)
            pages += len(held.entries) if held else 0
        except (CorruptError, FileNotFoundError):  # the latter: dropped by its engine meanwhile
            damaged += file.exists()
    return {"fingerprint": form.fingerprint, "page_size": form.page_size, "pages": pages, "tokens": pages * form.page_size,
            "kv": [f"{dtype} {list(shape)}" for shape, dtype in form.pages], "damaged": damaged, **found}
