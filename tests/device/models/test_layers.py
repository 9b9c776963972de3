"""``linear`` in all its forms, the shared layers, and the weight table's pack and unpack."""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkv.config import ConfigError
from jaxkv.device import models
from jaxkv.device.models import layers
from jaxkv.device.models.table import Source, WeightDecl, pack, unpack
from jaxkv.device.spec import kv_groups

LLAMA = {"architectures": ["LlamaForCausalLM"], "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48,
         "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 64}
RNG = np.random.default_rng(0)


def random(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape, dtype=np.float32)


@pytest.mark.usefixtures("highest_precision")
@pytest.mark.parametrize("rows", [1, 2, 64, 65])
@pytest.mark.parametrize("out_first", [True, False])
def test_linear_plain(rows: int, out_first: bool) -> None:
    x, w, b = random(rows, 12), random(12, 7), random(7)
    stored = w.T if out_first else w
    y = layers.linear(jnp.asarray(x), jnp.asarray(stored), jnp.asarray(b), out_first=out_first)
    np.testing.assert_allclose(y, x @ w + b, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("x_dtype", ["float32", "bfloat16"])
def test_linear_bfloat16_weights(rows: int, x_dtype: str) -> None:
    """Rounded to the weight's dtype, accumulated in float32; the result keeps the activation's dtype."""
    x, w = jnp.asarray(random(rows, 64)).astype(x_dtype), jnp.asarray(random(5, 64)).astype("bfloat16")
    y = layers.linear(x, w, out_first=True)
    assert y.dtype == x.dtype and y.shape == (rows, 5)
    exact = np.asarray(x.astype("bfloat16").astype("float32")) @ np.asarray(w.astype("float32")).T
    tolerance = 1e-2 if x_dtype == "bfloat16" else 1e-5
    np.testing.assert_allclose(np.asarray(y.astype("float32")), exact, rtol=tolerance, atol=1e-4)
    assert layers.linear(x, w, out_first=True, dtype=jnp.dtype("float32")).dtype == jnp.float32


@pytest.mark.usefixtures("highest_precision")
@pytest.mark.parametrize("out_first", [True, False])
@pytest.mark.parametrize("experts", [0, 3])
def test_linear_quantised(out_first: bool, experts: int) -> None:
    """int8 values and per-output scales, with and without an expert axis, also through a jit boundary."""
    lead = (experts,) if experts else ()
    values = RNG.integers(-127, 128, (*lead, 12, 7)).astype(np.int8)
    scales = RNG.uniform(0.001, 0.1, (*lead, 7)).astype(np.float32)
    x, b = random(*lead, 4, 12), random(*lead, 7)
    stored = np.swapaxes(values, -1, -2) if out_first else values
    leaf = layers.QuantizedWeight(jnp.asarray(stored), jnp.asarray(scales))
    y = jax.jit(lambda x, w, b: layers.linear(x, w, b, out_first=out_first))(x, leaf, b)
    np.testing.assert_allclose(y, x @ (values * scales[..., None, :]) + b[..., None, :], atol=1e-4)


@pytest.mark.usefixtures("highest_precision")
def test_linear_experts() -> None:
    x, w = random(3, 4, 12), random(3, 12, 7)
    np.testing.assert_allclose(layers.linear(jnp.asarray(x), jnp.asarray(w), out_first=False), x @ w, atol=1e-5)


def test_quantised_model_runs() -> None:
    """A params tuple may mix plain and quantised leaves; the model code does not change."""
    spec = models.spec_from_config(LLAMA, out_first=True)
    params = list(models.init_leaves(spec, jax.random.key(0)))
    attend = lambda layer, q, k, v: q  # noqa: E731
    ids = jnp.arange(6, dtype=jnp.int32)
    run = jax.jit(lambda params: models.finish(spec, params, *models.forward(spec, params, ids, ids, attend)))
    plain = run(tuple(params))
    for i, decl in enumerate(models.weight_table(spec)):
        if decl.name.endswith(("gate_up", "down")):
            scales = jnp.max(jnp.abs(params[i]), axis=1) / 127
            params[i] = layers.QuantizedWeight(jnp.round(params[i] / scales[:, None]).astype(jnp.int8), scales)
    close = run(tuple(params))
    assert 0 < np.abs(np.asarray(plain - close)).max() < 0.02


def test_angles_are_computed_once() -> None:
    """Not for every head of every layer, as XLA:CPU would; and what it is told to do about that changes no bit."""
    spec = models.spec_from_config(LLAMA, out_first=True)
    ids = jnp.arange(40, dtype=jnp.int32)
    params = tuple(models.init_leaves(spec, jax.random.key(0)))
    run = jax.jit(lambda ids: models.forward(spec, params, ids, ids, lambda layer, q, k, v: q + jnp.tile(k + v, (1, 4, 1))))
    assert spec.num_layers > 1 and run.lower(ids).compile().as_text().count(" cosine(") == 1
    positions = jnp.asarray([0, 1, 77, 5000, 131071], jnp.int32)
    cos, sin = jax.jit(partial(layers.rope_angles, spec.rope, 64))(positions)
    angles = np.asarray(positions, np.float32)[:, None, None] * layers.rope_frequencies(spec.rope, 64)
    np.testing.assert_array_equal(cos, jax.jit(jnp.cos)(angles))
    np.testing.assert_array_equal(sin, jax.jit(jnp.sin)(angles))


def test_embedding_clips_padding_ids() -> None:
    table = jnp.asarray(random(5, 3))
    got = layers.embed(table, jnp.asarray([4, 99], jnp.int32), "float32")
    np.testing.assert_array_equal(got, np.asarray(table)[[4, 4]])


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
@pytest.mark.parametrize("out_first", [True, False])
def test_pack_unpack(tp: int, out_first: bool) -> None:
    """Every leaf goes to its sources and back; each device's block starts with that device's query heads."""
    spec = models.spec_from_config({**LLAMA, "attention_bias": True}, tp=tp, out_first=out_first)
    for decl in models.weight_table(spec):
        tensors = {s.name: random(*s.shape) for s in decl.sources}
        leaf = pack(decl, tensors)
        assert leaf.shape == decl.shape
        for (name, rows), tensor in unpack(decl, leaf).items():
            assert rows is None
            np.testing.assert_array_equal(tensor, tensors[name])
        if decl.name == "layers.0.qkv":
            out = leaf if out_first else leaf.T
            blocks = out.reshape(tp, -1, 32)
            q = tensors["model.layers.0.self_attn.q_proj.weight"].reshape(tp, -1, 32)
            k = tensors["model.layers.0.self_attn.k_proj.weight"].reshape(2, 4, 32)
            width = spec.stored_kv_heads // tp * 4
            for d in range(tp):
                np.testing.assert_array_equal(blocks[d, : q.shape[1]], q[d])
                heads = [(d * max(tp, 2) // tp + j) * 2 // max(tp, 2) for j in range(max(tp, 2) // tp)]
                np.testing.assert_array_equal(blocks[d, q.shape[1] : q.shape[1] + width], np.concatenate(k[heads]))


def test_pack_conv1d_ranges() -> None:
    """GPT-2's one [in, 3 * out] tensor is dealt out by ranges and put together again."""
    parts = tuple(Source("c_attn", (4, 24), transpose=True, rows=(8 * i, 8 * i + 8), groups=2) for i in range(3))
    decl = WeightDecl("qkv", (24, 4), "float32", ("heads", "embed"), parts, blocks=2)
    tensor = random(4, 24)
    leaf = pack(decl, {"c_attn": tensor})
    np.testing.assert_array_equal(leaf[:12], np.concatenate([tensor.T[s : s + 4] for s in (0, 8, 16)]))
    back = unpack(decl, leaf)
    np.testing.assert_array_equal(np.concatenate([back["c_attn", s.rows] for s in parts], axis=1), tensor)


def test_same_random_model_for_every_mesh() -> None:
    ids = jnp.arange(5, dtype=jnp.int32)
    attend = lambda layer, q, k, v: q + jnp.repeat(k + v, q.shape[1] // k.shape[1], axis=1)  # noqa: E731
    outs = []
    for tp, out_first in ((1, True), (1, False), (2, False), (4, True)):
        spec = models.spec_from_config(LLAMA, tp=tp, out_first=out_first)
        params = tuple(models.init_leaves(spec, jax.random.key(3)))

        def run(params: models.Params, spec=spec) -> jax.Array:
            hidden = models.finish(spec, params, *models.forward(spec, params, ids, ids, attend))
            return models.logits(spec, params, hidden)

        outs.append(jax.jit(run)(params))
    for out in outs:
        assert out.shape == (5, 50)
        np.testing.assert_allclose(out, outs[0], atol=1e-5)


def test_kv_groups() -> None:
    config = {**LLAMA, "architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True, "sliding_window": 9,
              "layer_types": ["sliding_attention", "full_attention"]}
    spec = models.spec_from_config(config)
    assert spec.windows == (9, None) and spec.attention(0) == 9 and hash(spec) == hash(models.spec_from_config(config))
    full, window = kv_groups(spec, 1, "bfloat16")
    assert (full.layers, full.window, full.kv_heads, full.head_dim, full.dtype) == ((1,), None, 2, 4, "bfloat16")
    assert (window.layers, window.window) == ((0,), 9)
    assert [kv_groups(spec, tp, "float32")[0].kv_heads for tp in (1, 2, 4, 8)] == [2, 2, 4, 8]


@pytest.mark.parametrize("change,tp,words", [
    ({}, 3, ("3", "KV heads (2)")),
    ({"num_key_value_heads": 8}, 16, ("16", "attention heads (8)")),
    ({"intermediate_size": 50}, 4, ("4", "MLP width (50)")),
    ({"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 4}, 2, ("2", "KV heads (3)")),
])
def test_indivisible_shapes_are_refused(change: dict, tp: int, words: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as error:
        models.spec_from_config({**LLAMA, **change}, tp=tp)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize("change,word", [
    ({"architectures": ["MixtralForCausalLM"]}, "MixtralForCausalLM"),
    ({"architectures": None, "model_type": "bert"}, "bert"),
    ({"hidden_size": None}, "hidden_size"),
    ({"num_hidden_layers": "two"}, "num_hidden_layers"),
    ({"num_attention_heads": 7}, "num_attention_heads"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "yarn"),
    ({"rope_scaling": {"rope_type": "llama3"}}, "factor"),
    ({"rope_scaling": 3}, "rope_parameters"),
    ({"hidden_act": "mish"}, "mish"),
    ({"rms_norm_eps": 0}, "rms_norm_eps"),
    ({"pretraining_tp": 2}, "pretraining_tp"),
    ({"architectures": ["OPTForCausalLM"], "ffn_dim": 8, "word_embed_proj_dim": 16}, "word_embed_proj_dim"),
    ({"architectures": ["GPT2LMHeadModel"], "scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse"),
    ({"architectures": ["Qwen3ForCausalLM"], "use_sliding_window": True, "layer_types": ["x"]}, "layer_types"),
    *(({"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True, "max_window_layers": v}, "max_window_layers")
      for v in (None, "1", [1], True, -1)),
    ({"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": "yes"}, "use_sliding_window"),
    ({"architectures": [["LlamaForCausalLM"]]}, "architecture"),
    ({"hidden_act": ["silu"]}, "hidden_act"),
    *(({"rope_theta": v}, "rope_theta") for v in (math.inf, math.nan, 10**400, 0, False, "1e4")),
    ({"rope_parameters": {"rope_theta": math.inf}}, "rope_theta"),
    *(({"rms_norm_eps": v}, "rms_norm_eps") for v in (math.inf, math.nan, None, [1e-5])),
    *(({n: v}, n) for n in ("tie_word_embeddings", "attention_bias", "mlp_bias") for v in (1, "false", [])),
    ({"architectures": ["GPT2LMHeadModel"], "n_positions": 8, "layer_norm_epsilon": math.inf}, "layer_norm_epsilon"),
    ({"architectures": ["GPT2LMHeadModel"], "n_positions": 8, "tie_word_embeddings": 0}, "tie_word_embeddings"),
    *(({"architectures": ["OPTForCausalLM"], "ffn_dim": 8, n: "x"}, n)
      for n in ("do_layer_norm_before", "enable_bias", "_remove_final_layer_norm", "tie_word_embeddings")),
])
def test_unsupported_configs_are_named(change: dict, word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        models.spec_from_config({**LLAMA, **change})
