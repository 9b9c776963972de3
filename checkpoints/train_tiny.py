"""Trains the default model: flax + optax on a grain pipeline, Orbax checkpoints, resumable.

Usage: python checkpoints/train_tiny.py --out DIR [--steps N]; run it again and it goes on from the latest checkpoint.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from data import KINDS, Curriculum, RowBuilder, Stage
from text_data import token_stream
from tiny_model import TinyConfig, TinyLlama
from tokenizers import Tokenizer
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
RECIPE = [  # about 8k tokens a batch; short rows first, because recall emerges soonest where questions are dense
    Stage(400, 16, 512, 0.36, (2, 16), (0, 96)),
    Stage(200, 32, 256, 0.5, (2, 5), (0, 12), mix=(45, 10, 45)),  # copies in plenty: induction heads form here
    Stage(200, 32, 256, 0.45, (2, 8), (0, 12)),
    Stage(100, 16, 512, 0.3, (4, 16), (0, 128)),
    Stage(400, 8, 1024, 0.3, (8, 40), (64, 500)),
    Stage(300, 4, 2304, 0.45, (32, 48), (1024, 1400)),
    Stage(100, 2, 4096, 0.45, (32, 48), (1024, 3000)),
    Stage(140, 4, 2304, 0.45, (32, 48), (1024, 1400)),
    Stage(30, 2, 4096, 0.45, (32, 48), (1024, 3000)),
]
MUON_LR, ADAM_LR, WARMUP, DECAY_SHARE = 0.02, 0.004, 60, 0.5


def schedule(peak: float, total: int) -> optax.Schedule:
    """Warm-up, constant, then linear to zero over the last DECAY_SHARE of the run."""
    decay = int(total * DECAY_SHARE)
    return optax.join_schedules(
        [optax.linear_schedule(peak / 20, peak, WARMUP), optax.constant_schedule(peak),
         optax.linear_schedule(peak, peak * 0.01, decay)],
        [WARMUP, max(total - decay, WARMUP + 1)],
    )  # fmt: skip


def make_optimizer(total: int) -> optax.GradientTransformation:
    """Muon for the layers' matrices, AdamW for the embedding and the norms."""

    def dimensions(params: Any) -> Any:
        spec = optax.contrib.MuonDimensionNumbers()
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: spec if leaf.ndim == 2 and "kernel" in jax.tree_util.keystr(path) else None, params
        )

    muon = optax.contrib.muon(
        schedule(MUON_LR, total), weight_decay=0.01, adam_b2=0.95, adam_learning_rate=schedule(ADAM_LR, total),
        muon_weight_dimension_numbers=dimensions,
    )  # fmt: skip
    return optax.chain(optax.clip_by_global_norm(1.0), muon)


def weighted_loss(model: TinyLlama, params: Any, batch: dict[str, jax.Array]) -> tuple[jax.Array, tuple]:
    """Weighted next-token loss, and (loss, hit) of every token for the log."""
    ids = batch["ids"]
    logits = model.apply(params, ids[:, :-1])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:])
    hits = logits.argmax(-1) == ids[:, 1:]
    weights = batch["weights"][:, 1:]
    return (losses * weights).mean(), (losses, hits)


def train_step(model: TinyLlama, optimizer: optax.GradientTransformation, state: dict, batch: dict) -> tuple:
    """One update; the state is {"params", "opt"}."""
    (_, aux), grads = jax.value_and_grad(partial(weighted_loss, model), has_aux=True)(state["params"], batch)
    updates, opt = optimizer.update(grads, state["opt"], state["params"])
    return {"params": optax.apply_updates(state["params"], updates), "opt": opt}, aux


def span_exact(hits: np.ndarray, marks: np.ndarray) -> list[bool]:
    """For every run of marked tokens that does not touch the row's end: were all of them right?"""
    out = []
    for hit, mark in zip(hits, marks, strict=True):
        edges = np.flatnonzero(np.diff(np.concatenate([[0], mark.astype(np.int8), [0]])))
        out += [bool(hit[a:b].all()) for a, b in zip(edges[::2], edges[1::2], strict=True) if b < len(mark)]
    return out


def batch_metrics(batch: dict[str, np.ndarray], losses: np.ndarray, hits: np.ndarray) -> dict[str, float]:
    """Mean text loss; per kind of question the share of answers that are right as a whole (teacher-forced)."""
    kinds = batch["kinds"][:, 1:]
    out: dict[str, float] = {"text_loss": float(losses[kinds == 0].mean())}
    for name in ("recall_plain", "recall_chat", "join", "copy"):
        marks = kinds == KINDS[name]
        if spans := span_exact(hits, marks):
            out[name], out[name + "_n"] = float(np.mean(spans)), len(spans)
            out[name + "_loss"] = float(losses[marks].mean())
    return out


def new_state(model: TinyLlama, optimizer: optax.GradientTransformation, seed: int) -> dict:
    params = jax.jit(model.init)(jax.random.key(seed), jnp.zeros((1, 8), jnp.int32))
    return {"params": params, "opt": optimizer.init(params)}


def train(out: Path, stages: list[Stage], config: TinyConfig, tokenizer: Tokenizer, stream: np.ndarray,
          stop: int | None = None, save_every: int = 100, seed: int = 0, progress: bool = True) -> dict:  # fmt: skip
    """Run (or go on with) a curriculum up to step `stop`; returns the state. Resuming is exact."""
    curriculum = Curriculum(stages, RowBuilder(stream, tokenizer, seed))
    total = curriculum.total_steps
    model, optimizer = TinyLlama(config), make_optimizer(total)
    manager = ocp.CheckpointManager((out / "checkpoints").absolute(), options=ocp.CheckpointManagerOptions(max_to_keep=3))
    state, batches, start = new_state(model, optimizer, seed), iter(curriculum.dataset()), 0
    if (latest := manager.latest_step()) is not None:
        restored = manager.restore(
            latest, args=ocp.args.Composite(state=ocp.args.StandardRestore(state), data=ocp.args.JsonRestore())
        )
        state, start = restored["state"], latest
        batches.set_state(restored["data"])
    stop = min(stop or total, total)
    step_fn = jax.jit(partial(train_step, model, optimizer), donate_argnums=0)
    with open(out / "log.jsonl", "a", encoding="utf-8") as log:
        bar = tqdm(range(start, stop), initial=start, total=stop, disable=not progress, mininterval=10, ncols=110)
        for step in bar:
            batch = next(batches)
            assert int(batch["step"]) == step
            began = time.perf_counter()
            state, (losses, hits) = step_fn(state, {"ids": batch["ids"], "weights": batch["weights"]})
            metrics = batch_metrics(batch, np.asarray(losses), np.asarray(hits))
            metrics |= {"step": step, "seconds": time.perf_counter() - began}
            metrics |= {"tokens": losses.size, "time": time.time()}
            log.write(json.dumps({key: round(value, 4) for key, value in metrics.items()}) + "\n")
            log.flush()
            bar.set_postfix(text=f"{metrics['text_loss']:.3f}", recall=f"{metrics.get('recall_plain', 0):.2f}")
            if (step + 1) % save_every == 0 or step + 1 == stop:
                manager.save(step + 1, args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(batches.get_state())))  # fmt: skip
    manager.wait_until_finished()
    manager.close()
    return state


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="work directory: checkpoints, log, token cache")
    parser.add_argument("--steps", type=int, help="stop at this step (default: the recipe's last)")
    parser.add_argument("--save-every", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer.from_file(str(HERE / "default" / "tokenizer.json"))
    stream = token_stream(tokenizer, held_out=False, cache=args.out / "stream.npy")
    (args.out / "recipe.json").write_text(json.dumps([dataclasses.asdict(stage) for stage in RECIPE], indent=1))
    train(args.out, RECIPE, TinyConfig(), tokenizer, stream, args.steps, args.save_every, args.seed)


if __name__ == "__main__":
    main()
