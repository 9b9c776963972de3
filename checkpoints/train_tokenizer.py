"""Owns the tokenizer: trains the byte-level BPE, writes it as a Hugging Face directory, picks the recall words."""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from pathlib import Path

from recall_tasks import PHRASES
from text_data import stdlib_texts
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

HERE = Path(__file__).resolve().parent
VOCAB_SIZE = 4096
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CONTEXT = 4096
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)


def train_tokenizer() -> Tokenizer:
    """A lossless byte-level BPE over the training split: digits one by one, no prefix space, no normaliser."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    corpus = [text for _, text in stdlib_texts(held_out=False)]
    tokenizer.train_from_iterator([*corpus, *([PHRASES] * 400)], trainer)
    return tokenizer


def write_tokenizer(tokenizer: Tokenizer, out: Path) -> None:
    """The files transformers.AutoTokenizer needs, chat template included."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": CONTEXT,
        "clean_up_tokenization_spaces": False,
        "bos_token": "<|endoftext|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "chat_template": CHAT_TEMPLATE,
        "added_tokens_decoder": {
            str(index): {
                "content": token,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "single_word": False,
                "special": True,
            }
            for index, token in enumerate(SPECIAL_TOKENS)
        },
    }
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (out / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    names = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    (out / "special_tokens_map.json").write_text(json.dumps(names, indent=2) + "\n")


def recall_words(tokenizer: Tokenizer) -> dict[str, list[str]]:
    """Word pools of the recall tasks: every word is one token after a space."""
    vocab = tokenizer.get_vocab()
    seen = Counter(word for _, text in stdlib_texts(held_out=False) for word in re.findall("[A-Za-z]+", text))
    spaced = [t[1:] for t in vocab if t[0] == "Ġ" and len(t) > 4 and t[1:].isascii() and t[1:].isalpha()]
    spaced = sorted((w for w in spaced if w.islower() and seen[w] >= 40), key=lambda w: -vocab["Ġ" + w])
    return {"keys": sorted(spaced[0::3]), "words": sorted(spaced[1::3] + spaced[2::3])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE / "default")
    out = parser.parse_args().out
    tokenizer = train_tokenizer()
    write_tokenizer(tokenizer, out)
    words = recall_words(tokenizer)
    lines = [f' "{name}": "{" ".join(pool)}"' for name, pool in words.items()]
    (HERE / "recall_words.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print({name: len(pool) for name, pool in words.items()}, "vocabulary", tokenizer.get_vocab_size())


if __name__ == "__main__":
    main()
