"""Converts a model directory between Hugging Face safetensors and an Orbax checkpoint of converted parameters.

    python -m checkpoints.convert --to orbax SRC DST [--dtype bfloat16]
    python -m checkpoints.convert --to hf    SRC DST

SRC is anything ``jaxkv`` loads (directory of either kind, hub id); DST is created. Config and tokenizer files are
copied along. Without --dtype the weights keep the dtype they are stored in.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh
from safetensors.numpy import save_file

from jaxkv.config import ConfigError
from jaxkv.device import models
from jaxkv.runtime.orbax_io import is_orbax, save_params, to_tensors
from jaxkv.runtime.safetensors_io import DTYPES, read_headers
from jaxkv.runtime.weights import LoadedModel, find_model, load_model, read_config

BESIDE = ("*.json", "*.jinja", "*.model", "*.txt")  # config, tokenizer, chat template


def convert(source: str, target: Path, to: str, dtype: str | None = None) -> LoadedModel:
    """Write ``target`` and return the model that was written. ConfigError, one line, when that cannot be."""
    if target.exists() and any(target.iterdir()):
        raise ConfigError(f"{target} already holds files")
    directory = find_model(source)
    mesh = Mesh(np.array(jax.devices()[:1]), ("tp",))
    loaded = load_model(str(directory), mesh, dtype=dtype or stored_dtype(directory))
    target.mkdir(parents=True, exist_ok=True)
    for pattern in BESIDE:
        for file in directory.glob(pattern):
            if file.is_file() and not file.name.endswith(".safetensors.index.json"):
                shutil.copyfile(file, target / file.name)
    config = {k: v for k, v in loaded.config.items() if k != "torch_dtype"} | {"dtype": loaded.spec.weight_dtype}
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if to == "orbax":
        save_params(target, loaded.spec, loaded.params)
    else:
        tensors = to_tensors(models.weight_table(loaded.spec), loaded.params)
        save_file(
            {name: np.ascontiguousarray(t) for name, t in tensors.items()},
            target / "model.safetensors",
            metadata={"format": "pt"},
        )
    return loaded


def stored_dtype(directory: Path) -> str:
    """The dtype of the weights on disk; float32 where it is mixed."""
    if is_orbax(directory):
        return read_config(directory).get("dtype", "float32")
    found = {np.dtype(DTYPES[e.dtype]).name for e in read_headers(directory).values() if e.dtype in DTYPES}
    return found.pop() if len(found) == 1 and "float64" not in found else "float32"


def main(argv: list[str] | None = None) -> int:
    """The command; 0, or 2 with one line on stderr."""
    parser = argparse.ArgumentParser(prog="checkpoints.convert", description="Hugging Face <-> Orbax")
    parser.add_argument("source", help="model directory or hub id")
    parser.add_argument("target", type=Path, help="directory to create")
    parser.add_argument("--to", choices=("orbax", "hf"), required=True)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: as stored")
    args = parser.parse_args(argv)
    try:
        loaded = convert(args.source, args.target, args.to, args.dtype)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{args.target}: {len(loaded.params)} leaves, {loaded.nbytes / 1e6:.1f} MB of {loaded.spec.weight_dtype}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
