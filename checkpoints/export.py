"""Owns the export: an Orbax training checkpoint becomes a Hugging Face directory (bfloat16 safetensors, configs).

Usage: python checkpoints/export.py --run /tmp/tiny [--step N] [--out checkpoints/default]
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
from safetensors.numpy import save_file
from tiny_model import TinyConfig

HERE = Path(__file__).resolve().parent
END_OF_TEXT, END_OF_TURN = 0, 2  # ids of <|endoftext|> and <|im_end|>, fixed by train_tokenizer.SPECIAL_TOKENS


def hf_config(config: TinyConfig) -> dict[str, Any]:
    """config.json of a transformers LlamaForCausalLM."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_positions,
        "rope_theta": config.rope_theta,
        "rms_norm_eps": config.rms_eps,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": END_OF_TEXT,
        "eos_token_id": END_OF_TURN,
        "pad_token_id": END_OF_TEXT,
        "torch_dtype": "bfloat16",
    }


def hf_weights(params: dict[str, Any]) -> dict[str, np.ndarray]:
    """Flax parameters -> Hugging Face names, [out, in], bfloat16. Tied: there is no lm_head."""
    out: dict[str, np.ndarray] = {}
    for name, leaf in params.items():
        if name == "embed_tokens":
            out["model.embed_tokens.weight"] = leaf["embedding"]
        elif name == "norm":
            out["model.norm.weight"] = leaf["scale"]
        else:
            prefix = f"model.layers.{name.removeprefix('layers_')}."
            for part, weight in leaf.items():
                block = "mlp." if part in ("gate_proj", "up_proj", "down_proj") else "self_attn."
                if "kernel" in weight:
                    out[f"{prefix}{block}{part}.weight"] = weight["kernel"].T
                else:
                    out[f"{prefix}{part}.weight"] = weight["scale"]
    return {key: np.ascontiguousarray(np.asarray(value).astype(ml_dtypes.bfloat16)) for key, value in out.items()}


def flax_params(weights: dict[str, np.ndarray], config: TinyConfig) -> dict[str, Any]:
    """The inverse: a Hugging Face directory's weights as float32 flax parameters."""
    params: dict[str, Any] = {f"layers_{layer}": {} for layer in range(config.num_layers)}
    for key, value in weights.items():
        value = value.astype(np.float32)
        names = key.removeprefix("model.").removesuffix(".weight").split(".")
        if names[0] == "layers":
            leaf = {"kernel": value.T} if value.ndim == 2 else {"scale": value}
            params[f"layers_{names[1]}"][names[-1]] = leaf
        else:
            params[names[0]] = {"embedding": value} if names[0] == "embed_tokens" else {"scale": value}
    return {"params": params}


def restore_params(run: Path, step: int | None = None) -> tuple[int, dict[str, Any]]:
    """The parameters of one training checkpoint (the latest by default)."""
    folder = (run / "checkpoints").absolute()
    steps = sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())
    step = step if step is not None else steps[-1]
    state = ocp.StandardCheckpointer().restore(folder / str(step) / "state")
    return step, state["params"]["params"]


def write_atomically(path: Path, data: bytes) -> None:
    """Readers see the old file or the new one, never half of one."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".export-", delete=False) as handle:
        handle.write(data)
    os.chmod(handle.name, 0o644)
    os.replace(handle.name, path)


def export(params: dict[str, Any], out: Path, config: TinyConfig) -> None:
    """Write weights and configs beside the tokenizer that train_tokenizer.py put there."""
    out.mkdir(parents=True, exist_ok=True)
    generation = {"bos_token_id": END_OF_TEXT, "eos_token_id": [END_OF_TURN, END_OF_TEXT],
                  "pad_token_id": END_OF_TEXT, "do_sample": False}  # fmt: skip
    write_atomically(out / "config.json", (json.dumps(hf_config(config), indent=2) + "\n").encode())
    write_atomically(out / "generation_config.json", (json.dumps(generation, indent=2) + "\n").encode())
    with tempfile.TemporaryDirectory(dir=out) as folder:
        save_file(hf_weights(params), Path(folder) / "model.safetensors", metadata={"format": "pt"})
        os.chmod(Path(folder) / "model.safetensors", 0o644)
        os.replace(Path(folder) / "model.safetensors", out / "model.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--step", type=int)
    parser.add_argument("--out", type=Path, default=HERE / "default")
    args = parser.parse_args()
    step, params = restore_params(args.run, args.step)
    export(params, args.out, TinyConfig())
    print(f"exported step {step} to {args.out}")


if __name__ == "__main__":
    main()
