"""From a model directory, hub id or nothing at all to a spec and its weights on the mesh.

Owns finding the directory, choosing dtypes and storage order, checking the tensors and placing each leaf with its
sharding, one at a time: the peak above the weights is one leaf. What goes where is the weight table's business.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm
from xxhash import xxh3_128_hexdigest

from jaxkv.config import ConfigError
from jaxkv.device import models
from jaxkv.device.models.table import WeightDecl, pack
from jaxkv.device.sharding import leaf_sharding
from jaxkv.device.spec import ModelSpec
from jaxkv.runtime.orbax_io import is_orbax, read_leaves
from jaxkv.runtime.safetensors_io import DTYPES, TensorEntry, read_headers

BUILT_IN = Path(__file__).resolve().parents[2] / "checkpoints" / "default"  # in a checkout and in site-packages
BUILT_IN_NAME = "jaxkv-tiny"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
HEAD = "lm_head.weight"
HUB_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")

# Buffers that old checkpoints carry along: rotary frequencies, GPT-2's causal masks.
HARMLESS = re.compile(r"(rotary_emb\.inv_freq|\.attn\.bias|\.attn\.masked_bias)$")


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run. ``params`` are in table order, placed on the mesh."""

    spec: ModelSpec
    params: models.Params
    directory: Path  # where tokenizer and generation_config are looked for
    name: str
    config: dict[str, Any]
    fingerprint: str  # hex, 256 bit: see the function of this name

    @property
    def nbytes(self) -> int:
        """Bytes of weights over the whole mesh, replicas not counted."""
        return sum(decl.nbytes for decl in models.weight_table(self.spec))


def load_model(
    model: str | None, mesh: Mesh, *, dtype: str = "auto", weight_dtype: str | None = None, load_format: str = "auto",
    seed: int = 0, show_progress: bool = False, check: Callable[[ModelSpec], None] | None = None,
) -> LoadedModel:
    """Load ``model`` (directory, hub id, None: the built-in model) over the mesh axis "tp".

    ``dtype`` "auto": float32 on CPU, else the checkpoint's. ``load_format`` "dummy": random weights from ``seed``,
    no weight file is opened. ``check`` is given the spec before a weight is read. ConfigError, one line, for everything that
    is wrong with the directory.
    """
    directory = find_model(model)
    config = read_config(directory)
    platform, tp = mesh.devices.flat[0].platform, mesh.shape["tp"]
    entries: dict[str, TensorEntry] = {}
    orbax = is_orbax(directory)
    if load_format != "dummy" and not orbax:
        entries = read_headers(directory)
    dtype = resolve_dtype(dtype, platform, config, entries)
    spec = models.spec_from_config(config, dtype, weight_dtype=weight_dtype, tp=tp, out_first=platform == "cpu")
    if check:
        check(spec)
    contents = hashlib.blake2b(digest_size=32)
    if load_format == "dummy":
        contents.update(f"dummy {seed}".encode())
        leaves: Iterator[np.ndarray | jax.Array] = models.init_leaves(spec, jax.random.key(seed))
    elif orbax:
        leaves = read_leaves(directory, spec, partial(_digest, contents))
    else:
        leaves = pack_tensors(spec, rename(spec, entries), partial(_digest, contents))
    table, params = models.weight_table(spec), []
    with tqdm(desc="loading weights", total=sum(decl.nbytes for decl in table), unit="B", unit_scale=True, leave=False,
              disable=not show_progress) as bar:
        for decl, leaf in zip(table, leaves, strict=True):
            params.append(place(decl, leaf, mesh))
            bar.update(decl.nbytes)
    return LoadedModel(spec, tuple(params), directory, model or BUILT_IN_NAME, config,
                       fingerprint(spec, config, contents.hexdigest()))


def placed_bytes(spec: ModelSpec, mesh: Mesh) -> int:
    """Bytes of weights over the whole mesh, replicas counted."""
    return mesh.size * sum(math.prod(leaf_sharding(decl, mesh).shard_shape(decl.shape)) * np.dtype(decl.dtype).itemsize
                           for decl in models.weight_table(spec))


def find_model(model: str | None) -> Path:
    """The local directory of a model; a hub id is downloaded (or found in the hub's cache)."""
    path = BUILT_IN if model is None else Path(model).expanduser()
    if path.is_dir():
        return path
    if model is None:
        raise ConfigError(f"the built-in model is not installed (no directory {BUILT_IN})")
    if not HUB_ID.fullmatch(model):
        raise ConfigError(f"model {model!r} is no directory")
    from huggingface_hub import snapshot_download  # slow to import, rarely needed

    try:
        return Path(snapshot_download(model, allow_patterns=list(HUB_FILES)))
    except Exception as error:  # offline, unknown, private: each with a type of its own
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ConfigError(f"model {model!r} is no local directory and cannot be fetched from the hub: "
                          f"{reason}") from None


def read_config(directory: Path) -> dict[str, Any]:
    """config.json as a dict. ConfigError when it is missing or no JSON object."""
    path = directory / "config.json"
    if not path.is_file():
        raise ConfigError(f"{directory} has no config.json")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from None
    if not isinstance(config, dict):
        raise ConfigError(f"cannot read {path}: not a JSON object")
    return config


def resolve_dtype(dtype: str, platform: str, config: dict[str, Any], entries: Mapping[str, TensorEntry]) -> str:
    """A dtype name for "auto": float32 on CPU, else what the checkpoint is stored in."""
    if dtype != "auto":
        return dtype
    if platform == "cpu":
        return "float32"
    stored = config.get("dtype") or config.get("torch_dtype")
    if stored is None and entries:
        stored = np.dtype(DTYPES.get(next(iter(entries.values())).dtype, np.float32)).name
    return stored if stored in ("float32", "bfloat16", "float16") else "bfloat16"


def rename(spec: ModelSpec, entries: Mapping[str, TensorEntry]) -> dict[str, TensorEntry]:
    """The checkpoint's tensors under the names of the weight table, exactly those it wants.

    Files of a bare decoder lack the prefix "model." or "transformer."; a tied model may hold its one table under
    either name, or the same under both. ConfigError names a tensor that is missing, extra or misshapen.
    """
    wanted = {s.name: s.shape for decl in models.weight_table(spec) for s in decl.sources}
    base = models.FAMILIES[spec.family].BASE
    if not any(name.startswith(base) for name in entries):
        entries = {name if name in wanted else base + name: entry for name, entry in entries.items()}
    found = {name: entry for name, entry in entries.items() if not HARMLESS.search(name)}
    first, head = next(iter(wanted)), found.pop(HEAD, None) if spec.tied else None
    if head is not None:
        found.setdefault(first, head)
    for name, shape in wanted.items():
        if name not in found:
            raise ConfigError(f"tensor {name} is missing from the checkpoint")
        if found[name].shape != shape:
            raise ConfigError(f"tensor {name} in {found[name].file} has shape {found[name].shape}, expected {shape}")
    for name in found:
        if name not in wanted:
            raise ConfigError(f"unexpected tensor {name} in {found[name].file}")
    if head is not None and not _same(head, found[first]):
        raise ConfigError(f"tensor {HEAD} in {head.file} differs from {first}, but tie_word_embeddings makes them one; "
                          "false in config.json uses both")
    return found


def _same(a: TensorEntry, b: TensorEntry) -> bool:
    if a is b or (a.shape, a.dtype) != (b.shape, b.dtype):
        return a is b
    return np.array_equal(a.read().reshape(-1).view(np.uint8), b.read().reshape(-1).view(np.uint8))


def pack_tensors(
    spec: ModelSpec, entries: Mapping[str, TensorEntry], seen: Callable[[str, np.ndarray], None],
) -> Iterator[np.ndarray]:
    """The leaves in table order, read one at a time, in the file's dtype. ``seen`` is given every tensor, once."""
    for decl in models.weight_table(spec):
        tensors = {name: entries[name].read() for name in dict.fromkeys(s.name for s in decl.sources)}
        for name, tensor in tensors.items():
            seen(name, tensor)
        yield pack(decl, tensors)


def place(decl: WeightDecl, leaf: np.ndarray | jax.Array, mesh: Mesh) -> jax.Array:
    """One leaf in its dtype on the mesh; each device receives its own part only."""
    array = np.ascontiguousarray(np.asarray(leaf).astype(decl.dtype, copy=False))
    return jax.make_array_from_callback(decl.shape, leaf_sharding(decl, mesh), lambda index: array[index])


def fingerprint(spec: ModelSpec, config: dict[str, Any], weights: str) -> str:
    """BLAKE2b (256 bit) of the config, the dtypes and ``weights``, a digest of the weights' contents."""
    text = json.dumps([config, spec.dtype, spec.weight_dtype, weights], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=32).hexdigest()


def _digest(contents: Any, name: str, tensor: np.ndarray) -> None:
    """Feeds a tensor's name, dtype, shape and the XXH3 (128 bit) of all its bytes to the BLAKE2b ``contents``.

    XXH3, since every start waits for it: a core does 12 GB/s where BLAKE2b does 0.8 and SHA-256 1.4 (measured). No two
    checkpoints meet by accident; one made to collide with another could, so a disk tier is for checkpoints one trusts.
    """
    data = np.ascontiguousarray(tensor).reshape(-1).view(np.uint8)
    contents.update(f"{name} {tensor.dtype} {tensor.shape} {xxh3_128_hexdigest(data.data)}\n".encode())
