"""Small real tokenizers, trained in a moment, and one small ``LLM`` that the tests of a session share."""

from __future__ import annotations

import json
import tempfile
from functools import cache
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from jaxkv import LLM

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] not in ('system', 'user', 'assistant') -%}"
    "{{ raise_exception('unknown role') }}{%- endif -%}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}")
SMALL = {"load_format": "dummy", "max_model_len": 128, "max_num_seqs": 4, "max_num_batched_tokens": 32, "page_size": 4,
         "kv_cache_memory": "1M", "host_kv_memory": 0}
TEXT = ["def main(argv):\n    return len(argv) > 1\n", "The quick brown fox jumps over the lazy dog, naïvely. ",
        "日本語のテキスト、中文文本。", "👩‍👩‍👧 family 🎉 and ünïcödé", "0123456789 x = {'a': [1, 2]}\n"] * 4


def write_byte_level(directory: Path, vocab_size: int = 400) -> Path:
    """A byte-level BPE with ChatML-like special tokens, as the built-in model's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=list(SPECIAL), show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(TEXT, trainer)
    return _write(directory, tokenizer, SPECIAL[2], CHAT_TEMPLATE)


def write_characters(directory: Path) -> Path:
    """63 tokens: a special one, then single characters; the model of ``engine_harness`` has four ids more."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789{}[]\":,.-+_()<>/=*\\ABCDEFĠĊ"
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(["<|end|>", *letters])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    return _write(directory, tokenizer, "<|end|>", None)


def write_sentencepiece_like(directory: Path) -> Path:
    """A BPE with the decoder of Llama 2: word borders as U+2581, bytes as <0xNN>, one leading space dropped."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                           decoders.Strip(" ", 1, 0)])
    special = ["<unk>", "<s>", "</s>", *[f"<0x{byte:02X}>" for byte in range(256)]]
    trainer = trainers.BpeTrainer(vocab_size=480, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([text.replace(" ", "▁") for text in TEXT[:2] * 4], trainer)
    data = json.loads(tokenizer.to_str())
    data["added_tokens"] = data["added_tokens"][:3]  # the bytes are ordinary tokens
    return _write(directory, Tokenizer.from_str(json.dumps(data)), "</s>", None)


def _write(directory: Path, tokenizer: Tokenizer, eos: str, chat_template: str | None) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos, "clean_up_tokenization_spaces": False}
    if chat_template:
        config["chat_template"] = chat_template
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def write_model(directory: Path) -> Path:
    """Tokenizer and config of a two-layer Llama; load it with ``load_format="dummy"``."""
    write_byte_level(directory)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 48, "vocab_size": 400,
        "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
        "tie_word_embeddings": False, "initializer_range": 0.4, "eos_token_id": 2,
    }
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@cache
def small_model() -> Path:
    """The directory of ``write_model``, for the whole session."""
    return write_model(Path(tempfile.mkdtemp(prefix="jaxkv-small-")))


@cache
def small_llm() -> LLM:
    """Random weights, settings ``SMALL``; compiled once."""
    return LLM(str(small_model()), **SMALL)
