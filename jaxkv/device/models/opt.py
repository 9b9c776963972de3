"""OPT: learned positions that start at row 2, LayerNorm before or after each block, ReLU, tied head."""

from __future__ import annotations

from typing import Any

import jax

from jaxkv.config import ConfigError
from jaxkv.device.models import hf, layers
from jaxkv.device.models.gpt2 import finish, run_layers
from jaxkv.device.models.hf import Attend
from jaxkv.device.models.table import Part, Source, TableBuilder, WeightDecl
from jaxkv.device.spec import ModelSpec

__all__ = ["BASE", "finish", "forward", "make_spec", "weight_table"]

BASE = "model."  # prefix of the decoder's tensors; a bare decoder's file lacks it
POSITION_OFFSET = 2  # rows of the position table before position 0


def make_spec(config: dict[str, Any]) -> ModelSpec:
    """From a Hugging Face config dict. ConfigError names what is missing or unsupported."""
    hidden, heads = hf.integer(config, "hidden_size"), hf.integer(config, "num_attention_heads")
    if hf.integer(config, "word_embed_proj_dim", default=hidden) != hidden:
        raise ConfigError(f"config.json: word_embed_proj_dim ({config['word_embed_proj_dim']}) other than hidden_size "
                          f"({hidden}) is not supported")
    hf.refuse(config, layer_norm_elementwise_affine=True)
    hf.check_heads(hidden, heads, hidden // heads)
    bias = hf.flag(config, "enable_bias", True)
    norm_first = hf.flag(config, "do_layer_norm_before", True)
    return ModelSpec(
        family="opt",
        vocab_size=hf.integer(config, "vocab_size"),
        hidden_size=hidden,
        mlp_size=hf.integer(config, "ffn_dim"),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        windows=(None,) * hf.integer(config, "num_hidden_layers"),
        max_position=hf.integer(config, "max_position_embeddings"),
        scale=(hidden // heads) ** -0.5,
        activation=hf.activation(config, "activation_function", "relu"),
        norm_eps=1e-5,
        tied=hf.flag(config, "tie_word_embeddings", True),
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=bias,
        norm_first=norm_first,
        final_norm=norm_first and not hf.flag(config, "_remove_final_layer_norm", False),
        init_std=hf.number(config, "init_std", 0.02),
    )


def weight_table(spec: ModelSpec) -> tuple[WeightDecl, ...]:
    """Embeddings, layers, final norm and, when not tied, the head."""
    d, heads, mlp_size = spec.hidden_size, spec.num_heads, spec.mlp_size
    t = TableBuilder(spec)
    t.vocab("embed", "model.decoder.embed_tokens.weight")
    shape = (spec.max_position + POSITION_OFFSET, d)
    t.add("positions", shape, ("position", "embed"), Source("model.decoder.embed_positions.weight", shape))
    for i in range(spec.num_layers):
        us, hub = f"layers.{i}.", f"model.decoder.layers.{i}."
        t.norm(us + "norm1", hub + "self_attn_layer_norm")
        qkv = tuple(Part(hub + f"self_attn.{n}_proj", d, heads) for n in "qkv")
        t.matrix(us + "qkv", d, qkv, ("embed", "heads"), bias=spec.qkv_bias)
        t.matrix(us + "out", d, (Part(hub + "self_attn.out_proj", d),), ("heads", "embed"), bias=spec.out_bias)
        t.norm(us + "norm2", hub + "final_layer_norm")
        t.matrix(us + "up", d, (Part(hub + "fc1", mlp_size, mlp_size),), ("embed", "mlp"), bias=spec.mlp_bias)
        t.matrix(us + "down", mlp_size, (Part(hub + "fc2", d),), ("mlp", "embed"), bias=spec.mlp_bias)
    if spec.final_norm:
        t.norm("norm", "model.decoder.final_layer_norm")
    if not spec.tied:
        t.vocab("head", "lm_head.weight")
    return t.build()


def forward(
    spec: ModelSpec, w: layers.Leaves, token_ids: jax.Array, positions: jax.Array, attend: Attend
) -> tuple[jax.Array, jax.Array]:
    """token_ids, positions i32 [T] -> residual stream [T, d] and attention [T, Hq * D] of the last layer. ``w``: by name."""
    x = layers.embed(w["embed"], token_ids, spec.dtype)
    x = x + layers.embed(w["positions"], positions + POSITION_OFFSET, spec.dtype)
    return run_layers(spec, w, x, attend)
