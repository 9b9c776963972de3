"""Owns the training batches: which row is text, which is a recall task, and how long; a grain pipeline of them."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import grain
import numpy as np
from recall_tasks import ANSWER, Segments, make_task

# Irrational steps: n * step mod 1 covers [0, 1) evenly, and different steps cover it independently.
GOLDEN, ROOT2, ROOT3 = (math.sqrt(5) - 1) / 2, math.sqrt(2) - 1, math.sqrt(3) - 1
KINDS = {"text": 0, "structure": 1, "recall_plain": 2, "recall_chat": 3, "join": 4, "copy": 5}


@dataclass(frozen=True)
class Stage:
    """One part of the curriculum: `steps` batches of rows x length tokens."""

    steps: int
    rows: int
    length: int
    recall_rows: float  # share of rows that hold a recall task (their filler is text)
    pairs: tuple[int, int]
    filler: tuple[int, int]  # tokens of text between pairs and questions
    mix: tuple[int, int, int] = (80, 12, 8)  # recall : join : copy questions


class RowBuilder:
    """Row number -> (ids, weights, kinds), each [length]; pure function of (seed, row number)."""

    def __init__(self, stream: np.ndarray, tokenizer, seed: int = 0, answer_weight: float = 4.0) -> None:
        self.stream, self.tokenizer, self.seed, self.answer_weight = stream, tokenizer, seed, answer_weight
        self.newline = tokenizer.token_to_id("Ċ")
        self.end = tokenizer.token_to_id("<|endoftext|>")
        self.cache: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        if text not in self.cache:
            if len(self.cache) > 50_000:
                self.cache.clear()
            self.cache[text] = self.tokenizer.encode(text).ids
        return self.cache[text]

    def text_ids(self, number: int, length: int, step: float) -> np.ndarray:
        """A slice of the stream; consecutive numbers cover it evenly (a low-discrepancy sequence)."""
        start = int(((number + 1 + 0.37 * self.seed) * step) % 1.0 * (len(self.stream) - length))
        return self.stream[start : start + length].astype(np.int32)

    def lines(self, number: int, length: int) -> list[int]:
        """About `length` tokens of text from the start of a line."""
        ids = self.text_ids(number, length + 64, ROOT2).tolist()
        starts = [i + 1 for i in range(63) if ids[i] == self.newline]
        return ids[starts[0] if starts else 0 :][:length]

    def text_row(self, number: int, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self.text_ids(number, length, GOLDEN), np.ones(length, np.float32), np.zeros(length, np.int8)

    def recall_row(self, number: int, stage: Stage, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Pairs, filler, questions until the row is full. kinds: see KINDS."""
        rng = random.Random(f"{self.seed}:{number}")
        chat = rng.random() < 0.55
        low, high = stage.pairs
        pair_count = round(math.exp(rng.uniform(math.log(low), math.log(high + 0.49))))
        filler_length = rng.randint(*stage.filler)
        room = (length - filler_length - 9 * pair_count) // (18 if chat else 10)
        kinds = rng.choices(["recall", "join", "copy"], weights=stage.mix, k=max(4, room + 2))
        task = make_task(rng, pair_count, "", chat, kinds)
        filler = self.lines(number, filler_length)
        body: Segments = task.segments()
        cut = len(task.opening)
        ids: list[int] = []
        weights: list[float] = []
        marks: list[int] = []
        for index, (text, weight) in enumerate(body):
            if index == cut:  # the (empty) filler segment: the text goes in as tokens
                piece = [*filler, self.newline]
                mark = 0
            else:
                piece = self.encode(text)
                mark = KINDS["structure"]
                if weight == ANSWER:
                    kind = task.queries[(index - cut - 1) // 3].kind
                    mark = KINDS[kind if kind != "recall" else "recall_chat" if chat else "recall_plain"]
            ids += piece
            weights += [self.answer_weight if weight == ANSWER else weight * (0.2 if mark else 1.0)] * len(piece)
            marks += [mark] * len(piece)
            if len(ids) >= length:
                break
        missing = length - len(ids)
        if missing > 0:
            ids += [self.end, *self.text_ids(number, missing, ROOT2).tolist()][:missing]
            weights += [1.0] * missing
            marks += [0] * missing
        return (
            np.asarray(ids[:length], np.int32),
            np.asarray(weights[:length], np.float32),
            np.asarray(marks[:length], np.int8),
        )

    def row(self, number: int, stage: Stage) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        length = stage.length + 1
        if (number * ROOT3) % 1.0 < stage.recall_rows:
            return self.recall_row(number, stage, length)
        return self.text_row(number, length)


class Curriculum:
    """Step number -> batch, through the stages in order."""

    def __init__(self, stages: list[Stage], builder: RowBuilder) -> None:
        self.stages, self.builder = stages, builder
        self.total_steps = sum(stage.steps for stage in stages)

    def batch(self, step: int) -> dict[str, np.ndarray]:
        first_row, rest = 0, step
        for stage in self.stages:
            if rest < stage.steps:
                break
            first_row, rest = first_row + stage.steps * stage.rows, rest - stage.steps
        rows = [self.builder.row(first_row + rest * stage.rows + r, stage) for r in range(stage.rows)]
        ids, weights, kinds = (np.stack(part) for part in zip(*rows, strict=True))
        return {"ids": ids, "weights": weights, "kinds": kinds, "step": np.int32(step)}

    def dataset(self) -> grain.IterDataset:
        """The grain pipeline: random access by step, read ahead by one thread; its iterator's state is a step."""
        steps = grain.MapDataset.range(self.total_steps).map(self.batch)
        return steps.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4))
