"""GPT-2: learned positions, LayerNorm, one fused [in, out] projection for q, k and v, tied head."""

from __future__ import annotations

from typing import Any

import jax

from jaxkv.device.models import hf, layers
from jaxkv.device.models.hf import Attend
from jaxkv.device.models.table import Part, Source, TableBuilder, WeightDecl
from jaxkv.device.spec import ModelSpec

BASE = "transformer."  # prefix of the decoder's tensors; a bare decoder's file lacks it


def make_spec(config: dict[str, Any]) -> ModelSpec:
    """From a Hugging Face config dict. ConfigError names what is missing or unsupported."""
    hf.refuse(config, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False, scale_attn_weights=True)
    hidden, heads = hf.integer(config, "n_embd", "hidden_size"), hf.integer(config, "n_head", "num_attention_heads")
    hf.check_heads(hidden, heads, hidden // heads)
    return ModelSpec(
        family="gpt2",
        vocab_size=hf.integer(config, "vocab_size"),
        hidden_size=hidden,
        mlp_size=hf.integer(config, "n_inner", default=4 * hidden),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        windows=(None,) * hf.integer(config, "n_layer", "num_hidden_layers"),
        max_position=hf.integer(config, "n_positions", "max_position_embeddings", "n_ctx"),
        scale=(hidden // heads) ** -0.5,
        activation=hf.activation(config, "activation_function", "gelu_new"),
        norm_eps=hf.number(config, "layer_norm_epsilon", 1e-5),
        tied=hf.flag(config, "tie_word_embeddings", True),
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        init_std=hf.number(config, "initializer_range", 0.02),
    )


def weight_table(spec: ModelSpec) -> tuple[WeightDecl, ...]:
    """Embeddings, layers, final norm and, when not tied, the head."""
    d, heads, mlp = spec.hidden_size, spec.num_heads, spec.mlp_size
    t = TableBuilder(spec)
    t.vocab("embed", "transformer.wte.weight")
    shape = (spec.max_position, d)
    t.add("positions", shape, ("position", "embed"), Source("transformer.wpe.weight", shape))
    for i in range(spec.num_layers):
        us, hub = f"layers.{i}.", f"transformer.h.{i}."
        t.norm(us + "norm1", hub + "ln_1")
        qkv = tuple(Part(hub + "attn.c_attn", d, heads, start=j * d, file_size=3 * d) for j in range(3))
        t.matrix(us + "qkv", d, qkv, ("embed", "heads"), bias=True, conv1d=True)
        t.matrix(us + "out", d, (Part(hub + "attn.c_proj", d),), ("heads", "embed"), bias=True, conv1d=True)
        t.norm(us + "norm2", hub + "ln_2")
        t.matrix(us + "up", d, (Part(hub + "mlp.c_fc", mlp, mlp),), ("embed", "mlp"), bias=True, conv1d=True)
        t.matrix(us + "down", mlp, (Part(hub + "mlp.c_proj", d),), ("mlp", "embed"), bias=True, conv1d=True)
    t.norm("norm", "transformer.ln_f")
    if not spec.tied:
        t.vocab("head", "lm_head.weight")
    return t.build()


def forward(
    spec: ModelSpec, w: layers.Leaves, token_ids: jax.Array, positions: jax.Array, attend: Attend
) -> tuple[jax.Array, jax.Array]:
    """token_ids, positions i32 [T] -> residual stream [T, d] and attention [T, Hq * D] of the last layer. ``w``: by name."""
    x = layers.embed(w["embed"], token_ids, spec.dtype) + layers.embed(w["positions"], positions, spec.dtype)
    return run_layers(spec, w, x, attend)


def run_layers(spec: ModelSpec, w: layers.Leaves, x: jax.Array, attend: Attend) -> tuple[jax.Array, jax.Array]:
    """``forward`` from the embeddings x [T, d] on."""
    y = attention(spec, w, 0, x, attend)
    for i in range(1, spec.num_layers):
        x = after_attention(spec, w, i - 1, x, y)
        y = attention(spec, w, i, x, attend)
    return x, y


def finish(spec: ModelSpec, w: layers.Leaves, x: jax.Array, y: jax.Array) -> jax.Array:
    """Rows of what ``forward`` gives -> hidden [R, d] after the final norm."""
    x = after_attention(spec, w, spec.num_layers - 1, x, y)
    return norm(spec, w, "norm", x) if spec.final_norm else x


def norm(spec: ModelSpec, w: layers.Leaves, name: str, x: jax.Array) -> jax.Array:
    """LayerNorm of x [T, d] by the leaves ``name`` and ``name.bias``, where the model has them."""
    return layers.layer_norm(x, w.get(name), w.get(name + ".bias"), spec.norm_eps)


def attention(spec: ModelSpec, w: layers.Leaves, i: int, x: jax.Array, attend: Attend) -> jax.Array:
    """Attention of layer i without rotation on x [T, d] -> [T, Hq * D]."""
    at = f"layers.{i}."
    x = norm(spec, w, at + "norm1", x) if spec.norm_first else x
    q, k, v = hf.split_heads(spec, layers.linear(x, w[at + "qkv"], w.get(at + "qkv.bias"), out_first=spec.out_first))
    return attend(i, q, k, v).reshape(x.shape[0], -1)


def after_attention(spec: ModelSpec, w: layers.Leaves, i: int, x: jax.Array, y: jax.Array) -> jax.Array:
    """The rest of layer i, row by row: x [T, d] with the projection of attention y [T, Hq * D], and with the MLP."""
    at = f"layers.{i}."
    x = x + layers.linear(y, w[at + "out"], w.get(at + "out.bias"), out_first=spec.out_first)
    if spec.norm_first:
        return x + mlp(spec, w, at, norm(spec, w, at + "norm2", x))
    x = norm(spec, w, at + "norm1", x)
    return norm(spec, w, at + "norm2", x + mlp(spec, w, at, x))


def mlp(spec: ModelSpec, w: layers.Leaves, at: str, x: jax.Array) -> jax.Array:
    """Two-matrix MLP on x [T, d]."""
    x = layers.linear(x, w[at + "up"], w.get(at + "up.bias"), out_first=spec.out_first)
    x = layers.ACTIVATIONS[spec.activation](x)
    return layers.linear(x, w[at + "down"], w.get(at + "down.bias"), out_first=spec.out_first)
