"""Every family against transformers: small random checkpoints written by torch, logits and greedy tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from jaxkv.runtime.weights import load_model
from tests.oracle import DenseOracle

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

GQA = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
       "num_key_value_heads": 2, "max_position_embeddings": 512}
GPT2 = {"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
OPT = {"vocab_size": 99, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
       "max_position_embeddings": 128, "word_embed_proj_dim": 32}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}
SLIDE = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1, "num_hidden_layers": 3}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-untied": ("Llama", GQA),
    "llama-tied-bias": ("Llama", {**GQA, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "llama3-rope": ("Llama", {**GQA, "rope_parameters": LLAMA3, "head_dim": 16}),
    "llama-linear-rope": ("Llama", {**GQA, "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4}}),
    "llama-mha": ("Llama", {**GQA, "num_key_value_heads": 4}),
    "mistral-window": ("Mistral", {**GQA, "sliding_window": 9, "head_dim": 8}),
    "mistral-full": ("Mistral", {**GQA, "sliding_window": None, "head_dim": 8}),
    "qwen2": ("Qwen2", {**GQA, "sliding_window": 7}),
    "qwen2-window": ("Qwen2", {**GQA, **SLIDE, "tie_word_embeddings": True}),
    "qwen2-layer-types": ("Qwen2", {**GQA, **SLIDE, "layer_types": ["sliding_attention", "full_attention",
                                                                   "sliding_attention"]}),
    "qwen3": ("Qwen3", {**GQA, "head_dim": 16}),
    "qwen3-window-bias": ("Qwen3", {**GQA, **SLIDE, "head_dim": 16, "attention_bias": True,
                                    "tie_word_embeddings": True}),
    "gpt2": ("GPT2", GPT2),
    "gpt2-untied-inner": ("GPT2", {**GPT2, "n_inner": 40, "tie_word_embeddings": False}),
    "opt": ("OPT", OPT),
    "opt-post-norm": ("OPT", {**OPT, "do_layer_norm_before": False}),
    "opt-plain": ("OPT", {**OPT, "enable_bias": False, "tie_word_embeddings": False}),
}


def make_model(family: str, options: dict[str, Any], seed: int = 0) -> Any:
    """A random transformers model whose every weight, biases and norms included, matters to the logits."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    config = getattr(transformers, f"{family}Config")(**options, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    config._attn_implementation = "eager"
    name = {"GPT2": "GPT2LMHeadModel"}.get(family, f"{family}ForCausalLM")
    model = getattr(transformers, name)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model


def torch_logits(model: Any, tokens: list[int]) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].float().numpy()


def tp_mesh(size: int) -> Mesh:
    return Mesh(np.array(jax.devices()[:size]), ("tp",))


TOKENS = np.random.default_rng(0).integers(0, 99, 90).tolist()


@pytest.mark.parametrize("case", CASES)
def test_logits_and_greedy_tokens(case: str, tmp_path: Path) -> None:
    model = make_model(*CASES[case])
    model.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), tp_mesh(1))
    oracle = DenseOracle(loaded.spec, loaded.params, bucket=96)
    expected = torch_logits(model, TOKENS)
    np.testing.assert_allclose(oracle.logits(TOKENS), expected, rtol=0, atol=1e-4)

    model.generation_config.eos_token_id = None  # run on to the end
    prompt, mask = TOKENS[:70], torch.ones(1, 70, dtype=torch.long)
    with torch.no_grad():
        output = model.generate(torch.tensor([prompt]), attention_mask=mask, max_new_tokens=20, do_sample=False)
    output = output[0, 70:].tolist()
    assert len(output) == 20 and output == oracle.teacher_forced(prompt, output)[0].tolist()


@pytest.mark.parametrize("case", ["llama3-rope", "qwen3-window-bias"])
def test_far_positions(case: str, tmp_path: Path) -> None:
    """RoPE beyond the original window, where the llama3 bands differ most; windows far behind the start."""
    model = make_model(*CASES[case])
    model.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), tp_mesh(1))
    tokens = np.random.default_rng(1).integers(0, 99, 500).tolist()
    got = DenseOracle(loaded.spec, loaded.params, bucket=500).logits(tokens)
    np.testing.assert_allclose(got, torch_logits(model, tokens), rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_sources(dtype: str, tmp_path: Path) -> None:
    """A half-precision file widened to float32 holds exactly the same numbers."""
    model = make_model("Llama", CASES["llama-tied-bias"][1]).to(getattr(torch, dtype))
    model.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), tp_mesh(1))
    assert loaded.spec.dtype == "float32"
    widened = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager")
    got = DenseOracle(loaded.spec, loaded.params, bucket=96).logits(TOKENS)
    np.testing.assert_allclose(got, torch_logits(widened, TOKENS), rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", ["Llama", "GPT2"])
def test_sharded_files(family: str, tmp_path: Path) -> None:
    model = make_model(family, GQA if family == "Llama" else GPT2)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2 and (tmp_path / "model.safetensors.index.json").is_file()
    loaded = load_model(str(tmp_path), tp_mesh(1))
    got = DenseOracle(loaded.spec, loaded.params, bucket=96).logits(TOKENS)
    np.testing.assert_allclose(got, torch_logits(model, TOKENS), rtol=0, atol=1e-4)


@pytest.mark.parametrize("case", ["llama-untied", "qwen2-window", "gpt2", "opt"])
@pytest.mark.parametrize("tp", [2, 4])
def test_tensor_parallel(case: str, tp: int, tmp_path: Path) -> None:
    """Weights over 2 and 4 devices (KV heads repeated, vocabulary padded) give the logits of one."""
    model = make_model(*CASES[case])
    model.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), tp_mesh(tp))
    assert all(len(leaf.sharding.device_set) == tp for leaf in loaded.params)
    got = DenseOracle(loaded.spec, loaded.params, bucket=96).logits(TOKENS)
    np.testing.assert_allclose(got, torch_logits(model, TOKENS), rtol=0, atol=1e-4)


def test_bfloat16_is_close(tmp_path: Path) -> None:
    """bfloat16 weights and activations: an error of rounding size, not of structure."""
    model = make_model("Llama", GQA)
    model.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), tp_mesh(1), dtype="bfloat16")
    assert {str(leaf.dtype) for leaf in loaded.params} == {"bfloat16"}
    expected = torch_logits(model, TOKENS)
    got = DenseOracle(loaded.spec, loaded.params, bucket=96).logits(TOKENS)
    assert np.abs(got - expected).mean() < 0.05 * np.abs(expected).mean()
