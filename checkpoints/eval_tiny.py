"""Measures an exported model: held-out perplexity, and recall / join / copy over unseen prompts; writes JSON.

Usage: python checkpoints/eval_tiny.py [--model checkpoints/default] [--prompts 500]

Every answer is judged by its whole value: all tokens of the value and of its end must be the argmax given the prompt
and the value so far, which is exactly the case when greedy decoding yields the value and then ends it.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from export import flax_params
from recall_tasks import Task, make_task
from safetensors.numpy import load_file
from text_data import stdlib_texts, token_stream
from tiny_model import TinyConfig, TinyLlama
from tokenizers import Tokenizer

HERE = Path(__file__).resolve().parent
WINDOW, ROWS = 2048, 4
MIN_DISTANCE, FAR_DISTANCE, PAIRS = 1024, 2816, (32, 48)


def load_model(folder: Path) -> tuple[TinyConfig, dict]:
    """Config and float32 parameters of an exported directory (the bfloat16 weights, as shipped)."""
    raw = json.loads((folder / "config.json").read_text())
    config = TinyConfig(
        vocab_size=raw["vocab_size"], hidden_size=raw["hidden_size"], intermediate_size=raw["intermediate_size"],
        num_layers=raw["num_hidden_layers"], num_heads=raw["num_attention_heads"],
        num_kv_heads=raw["num_key_value_heads"], head_dim=raw["head_dim"], rope_theta=raw["rope_theta"],
        rms_eps=raw["rms_norm_eps"], max_positions=raw["max_position_embeddings"],
    )  # fmt: skip
    return config, flax_params(load_file(folder / "model.safetensors"), config)


def scorer(config: TinyConfig):
    """ids [rows, time + 1] -> (negative log likelihood, hit) [rows, time] of every next token."""

    @jax.jit
    def score(params: dict, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = TinyLlama(config).apply(params, ids[:, :-1])
        logp = jax.nn.log_softmax(logits)
        nll = -jnp.take_along_axis(logp, ids[:, 1:, None], -1)[..., 0]
        return nll, logits.argmax(-1) == ids[:, 1:]

    return score


def perplexity(score, tokenizer: Tokenizer, limit: int | None = None) -> dict[str, float]:
    """Over the held-out files, in windows of 2,048 tokens without overlap: the first ``limit``, or what whole batches hold."""
    stream = token_stream(tokenizer, held_out=True).astype(np.int32)
    size = sum(len(text.encode()) for _, text in stdlib_texts(held_out=True))
    there = (len(stream) - 1) // WINDOW
    count = there - there % ROWS if limit is None else limit
    if not 1 <= count <= there:
        raise ValueError(f"windows must be in [1, {there}], got {count}")
    total = 0.0
    for first in range(0, count, ROWS):
        rows = [stream[i * WINDOW : (i + 1) * WINDOW + 1] for i in range(first, min(first + ROWS, count))]
        total += float(score(np.stack(rows))[0].sum())
    nll = total / (count * WINDOW)
    bytes_per_token = size / len(stream)
    return {"tokens": count * WINDOW, "loss": nll, "perplexity_per_token": math.exp(nll),
            "perplexity_per_byte": math.exp(nll / bytes_per_token),
            "bits_per_byte": nll / bytes_per_token / math.log(2)}  # fmt: skip


def unseen_task(tokenizer: Tokenizer, texts: list[str], seed: int, kind: str, chat: bool, distance: int = MIN_DISTANCE) -> Task:
    """A task whose filler is held-out text and whose question is >= `distance` tokens after the last pair."""
    rng = random.Random(f"eval:{kind}:{seed}")
    want = rng.randint(distance, distance + 300)
    while True:
        text = rng.choice(texts)
        starts = [match.start() for match in re.finditer(r"^\S", text, re.MULTILINE)]
        tail = text[rng.choice(starts) :]
        offsets = tokenizer.encode(tail).offsets
        if len(offsets) > want + 200:
            break
    filler = tail[: tail.index("\n", offsets[want][1]) + 1]
    return make_task(rng, rng.randint(*PAIRS), filler, chat, [kind])


def answers(score, tokenizer: Tokenizer, kind: str, prompts: int, distance: int = MIN_DISTANCE) -> dict[str, float]:
    """Share of prompts answered right as a whole; half of the prompts are chats."""
    texts = [text for _, text in stdlib_texts(held_out=True) if len(text) > 6 * distance]
    right: dict[bool, list[bool]] = {False: [], True: []}
    length = distance + 832
    for first in range(0, prompts, ROWS):
        rows, spans = [], []
        for seed in range(first, first + ROWS):
            task = unseen_task(tokenizer, texts, seed, kind, chat=seed % 2 == 1, distance=distance)
            prompt = tokenizer.encode(task.prompt()).ids
            answer = tokenizer.encode(task.queries[0].answer + task.queries[0].close).ids
            assert len(answer) >= 3 and len(prompt) + len(answer) <= length
            spans.append((len(prompt) - 1, len(prompt) - 1 + len(answer), seed % 2 == 1))
            rows.append(prompt + answer + [0] * (length + 1 - len(prompt) - len(answer)))
        hits = np.asarray(score(np.asarray(rows, np.int32))[1])
        for hit, (start, stop, chat) in zip(hits, spans, strict=True):
            right[chat].append(bool(hit[start:stop].all()))
    both = right[False] + right[True]
    return {"prompts": len(both), "whole_value_right": float(np.mean(both)),
            "plain": float(np.mean(right[False])), "chat": float(np.mean(right[True]))}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=HERE / "default")
    parser.add_argument("--prompts", type=int, default=500)
    parser.add_argument("--windows", type=int, help="held-out windows for the perplexity (default: all)")
    parser.add_argument("--out", type=Path, default=HERE / "default_eval.json")
    args = parser.parse_args()
    config, params = load_model(args.model)
    score = partial(scorer(config), params)
    tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    result: dict = {"held_out": perplexity(score, tokenizer, args.windows)}
    for kind in ("recall", "join", "copy"):
        result[kind] = answers(score, tokenizer, kind, args.prompts)
        print(kind, result[kind], flush=True)
    result["recall_far"] = answers(score, tokenizer, "recall", args.prompts // 5, FAR_DISTANCE)
    args.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
