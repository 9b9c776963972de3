"""Llama 2 and 3, and the block that Mistral and Qwen share with it: RMSNorm, rotary GQA attention, gated MLP.

What differs between these families is in their ``ModelSpec``; this file asks for features, never for names.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxkv.device.models import hf, layers
from jaxkv.device.models.hf import Attend
from jaxkv.device.models.table import Part, TableBuilder, WeightDecl
from jaxkv.device.spec import ModelSpec

BASE = "model."  # prefix of the decoder's tensors; a bare decoder's file lacks it


def make_spec(config: dict[str, Any]) -> ModelSpec:
    """From a Hugging Face config dict. ConfigError names what is missing or unsupported."""
    return hf.gated_spec(
        "llama", config,
        qkv_bias=hf.flag(config, "attention_bias", False),
        out_bias=hf.flag(config, "attention_bias", False),
        mlp_bias=hf.flag(config, "mlp_bias", False),
    )


def weight_table(spec: ModelSpec) -> tuple[WeightDecl, ...]:
    """Embedding, layers, final norm and, when not tied, the head."""
    d, heads, kv, dim, mlp = spec.hidden_size, spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.mlp_size
    t = TableBuilder(spec)
    t.vocab("embed", "model.embed_tokens.weight")
    for i in range(spec.num_layers):
        us, hub = f"layers.{i}.", f"model.layers.{i}."
        t.vector(us + "norm1", hub + "input_layernorm.weight", d, "ones")
        qkv = tuple(Part(hub + f"self_attn.{n}_proj", count * dim, count) for n, count in zip("qkv", (heads, kv, kv)))
        t.matrix(us + "qkv", d, qkv, ("embed", "heads"), bias=spec.qkv_bias)
        if spec.qk_norm:
            t.vector(us + "q_norm", hub + "self_attn.q_norm.weight", dim, "ones")
            t.vector(us + "k_norm", hub + "self_attn.k_norm.weight", dim, "ones")
        t.matrix(us + "out", heads * dim, (Part(hub + "self_attn.o_proj", d),), ("heads", "embed"), bias=spec.out_bias)
        t.vector(us + "norm2", hub + "post_attention_layernorm.weight", d, "ones")
        gate_up = tuple(Part(hub + f"mlp.{n}_proj", mlp, mlp) for n in ("gate", "up"))
        t.matrix(us + "gate_up", d, gate_up, ("embed", "mlp"), bias=spec.mlp_bias)
        t.matrix(us + "down", mlp, (Part(hub + "mlp.down_proj", d),), ("mlp", "embed"), bias=spec.mlp_bias)
    t.vector("norm", "model.norm.weight", d, "ones")
    if not spec.tied:
        t.vocab("head", "lm_head.weight")
    return t.build()


def forward(
    spec: ModelSpec, w: layers.Leaves, token_ids: jax.Array, positions: jax.Array, attend: Attend
) -> tuple[jax.Array, jax.Array]:
    """token_ids, positions i32 [T] -> residual stream [T, d] and attention [T, Hq * D] of the last layer. ``w``: by name."""
    assert spec.rope is not None
    x = layers.embed(w["embed"], token_ids, spec.dtype)
    angles = layers.rope_angles(spec.rope, spec.head_dim, positions)
    y = attention(spec, w, 0, x, angles, attend)
    for i in range(1, spec.num_layers):
        x = after_attention(spec, w, i - 1, x, y)
        y = attention(spec, w, i, x, angles, attend)
    return x, y


def finish(spec: ModelSpec, w: layers.Leaves, x: jax.Array, y: jax.Array) -> jax.Array:
    """Rows of what ``forward`` gives -> hidden [R, d] after the final norm."""
    return layers.rms_norm(after_attention(spec, w, spec.num_layers - 1, x, y), w["norm"], spec.norm_eps)


def attention(
    spec: ModelSpec, w: layers.Leaves, i: int, x: jax.Array, angles: tuple[jax.Array, jax.Array], attend: Attend
) -> jax.Array:
    """Attention of layer i on x [T, d] -> [T, Hq * D]; keys are rotated before ``attend`` sees them."""
    at = f"layers.{i}."
    x = layers.rms_norm(x, w[at + "norm1"], spec.norm_eps)
    q, k, v = hf.split_heads(spec, layers.linear(x, w[at + "qkv"], w.get(at + "qkv.bias"), out_first=spec.out_first))
    if spec.qk_norm:
        q = layers.rms_norm(q, w[at + "q_norm"], spec.norm_eps)
        k = layers.rms_norm(k, w[at + "k_norm"], spec.norm_eps)
    return attend(i, layers.rotate(q, angles), layers.rotate(k, angles), v).reshape(x.shape[0], -1)


def after_attention(spec: ModelSpec, w: layers.Leaves, i: int, x: jax.Array, y: jax.Array) -> jax.Array:
    """The rest of layer i, row by row: x [T, d] with the projection of attention y [T, Hq * D], and with the MLP."""
    at = f"layers.{i}."
    x = x + layers.linear(y, w[at + "out"], w.get(at + "out.bias"), out_first=spec.out_first)
    return x + mlp(spec, w, at, layers.rms_norm(x, w[at + "norm2"], spec.norm_eps))


def mlp(spec: ModelSpec, w: layers.Leaves, at: str, x: jax.Array) -> jax.Array:
    """Gated MLP on normalised x [T, d]."""
    both = layers.linear(x, w[at + "gate_up"], w.get(at + "gate_up.bias"), out_first=spec.out_first)
    gate, up = layers.split_blocks(both, spec.tp, (spec.mlp_size // spec.tp,) * 2)
    hidden = layers.ACTIVATIONS[spec.activation](gate.astype(jnp.float32)) * up.astype(jnp.float32)
    return layers.linear(hidden.astype(x.dtype), w[at + "down"], w.get(at + "down.bias"), out_first=spec.out_first)
