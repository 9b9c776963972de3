"""What a quantised KV cache costs in quality: perplexity, recall and tokens, through the engine, against exact KV.

    python -m bench.kv_quality                    all dtypes, the built-in model

Perplexity: log-probabilities of the first windows of the held-out standard-library files, in chunks, so that most keys are
read back from the cache. Recall: unseen prompts of the model's own recall task, greedy, the whole value or nothing.
Agreement: share of greedy tokens before the first that differs from exact KV's.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer

from bench.report import add_json, write
from jaxkv import LLM, SamplingParams

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "checkpoints"))

from eval_tiny import MIN_DISTANCE, unseen_task  # noqa: E402  the path comes first
from text_data import stdlib_texts, token_stream  # noqa: E402


class Questions(NamedTuple):
    """What every cache is asked. prompts: (prompt, its one right answer); windows: held-out token ids to score."""

    prompts: list[tuple[str, str]]
    windows: list[list[int]]


def card(llm: LLM, questions: Questions, exact: list[list[int]] | None) -> dict[str, Any]:
    """The figures of an engine's KV cache; `exact`: answers to the same prompts with exact KV."""
    prompts, windows = questions
    scored = llm.generate(windows, SamplingParams(max_tokens=1, prompt_logprobs=0), use_tqdm=False)
    nll = [-row[token].logprob for out, ids in zip(scored, windows)
           for row, token in zip(out.prompt_logprobs[1:], ids[1:])]
    outs = llm.generate([p for p, _ in prompts], SamplingParams(temperature=0.0, max_tokens=24), use_tqdm=True)
    answers = [list(out.outputs[0].token_ids) for out in outs]
    right = sum(out.outputs[0].text.startswith(answer) for out, (_, answer) in zip(outs, prompts))
    same = total = 0
    for mine, other in zip(answers, exact or answers):
        same += next((i for i, (a, b) in enumerate(zip(mine, other)) if a != b), min(len(mine), len(other)))
        total += len(other)
    return {"tokens": len(nll), "loss": sum(nll) / len(nll), "perplexity": math.exp(sum(nll) / len(nll)),
            "recall": right / len(prompts), "prompts": len(prompts), "agreement": same / total, "answers": answers}


def make_llm(kv_cache_dtype: str) -> LLM:
    """The built-in model in float32, every request computed as a whole."""
    return LLM(kv_cache_dtype=kv_cache_dtype, dtype="float32", max_num_seqs=8, max_num_batched_tokens=512,
               enable_prefix_caching=False)


def ask(prompts: int, windows: int) -> Questions:
    """Unseen recall tasks, and the first windows of 2,047 tokens of the held-out files."""
    tokenizer = Tokenizer.from_file(str(ROOT / "checkpoints" / "default" / "tokenizer.json"))
    texts = [text for _, text in stdlib_texts(held_out=True) if len(text) > 6 * MIN_DISTANCE]
    tasks = [unseen_task(tokenizer, texts, seed, "recall", chat=False) for seed in range(prompts)]
    stream = token_stream(tokenizer, held_out=True)
    return Questions([(t.prompt(), t.queries[0].answer + t.queries[0].close) for t in tasks],
                     [[int(t) for t in stream[i * 2047 : (i + 1) * 2047]] for i in range(windows)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--windows", type=int, default=16, help="of 2,047 held-out tokens")
    add_json(parser)
    args = parser.parse_args()

    questions = ask(args.prompts, args.windows)
    rows: list[dict[str, Any]] = []
    for dtype in ("auto", "bfloat16", "int8", "fp8_e4m3"):
        llm = make_llm(dtype)
        metrics = llm.engine.metrics
        rows.append({"kv_cache_dtype": metrics.info["kv_cache_dtype"],
                     "bytes_per_token": metrics.device.bytes_total // metrics.device.tokens_total,
                     **card(llm, questions, rows[0]["answers"] if rows else None)})
    for row in rows:
        del row["answers"]
        row["loss_more"] = row["loss"] - rows[0]["loss"]
    print(f"{'KV dtype':14} {'bytes/token':>11} {'perplexity':>11} {'loss':>9} {'recall':>8} {'agreement':>10}")
    for row in rows:
        print(f"{row['kv_cache_dtype']:14} {row['bytes_per_token']:11,} {row['perplexity']:11.4f} {row['loss_more']:+9.5f} "
              f"{row['recall']:8.1%} {row['agreement']:10.2%}")
    write(args.json, {"rows": rows})


if __name__ == "__main__":
    main()
