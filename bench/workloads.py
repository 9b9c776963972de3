"""Request lists the benchmarks run: the four peer workloads' shapes, conversations with think time, questions on documents.

Token ids are random above the special tokens; lengths depend on the workload only, ids on the seed too, so that a
repeat is never answered from the cache of the one before.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

FIRST_ID = 300


@dataclass(frozen=True)
class Job:
    """One request: its full prompt is that of ``after``, plus its output, plus ``prompt``."""

    id: str
    prompt: list[int]
    max_new: int
    after: str | None = None
    think: float = 0.0  # seconds from the end of ``after`` to the arrival


def make(name: str, vocab: int, seed: int) -> list[Job]:
    """a: one stream, 128 in, 128 out. b: 32 at once, 32-512 in, 16-128 out. c: 24 at once on a 1,024-token prefix.
    d: 6 conversations of 4 turns."""
    shape, tokens = random.Random(f"shape {name}"), random.Random(f"tokens {name} {seed}")

    def ids(n: int) -> list[int]:
        return [tokens.randrange(min(FIRST_ID, vocab // 2), vocab) for _ in range(n)]

    if name == "a":
        return [Job("a0", ids(128), 128)]
    if name == "b":
        return [Job(f"b{i}", ids(shape.randint(32, 512)), shape.randint(16, 128)) for i in range(32)]
    if name == "c":
        prefix = ids(1024)
        return [Job(f"c{i}", prefix + ids(64), 32) for i in range(24)]
    if name == "d":
        jobs = []
        for c in range(6):
            for t in range(4):
                n, m = shape.randint(96, 160) if t == 0 else shape.randint(24, 72), shape.randint(32, 64)
                jobs.append(Job(f"d{c}.{t}", ids(n), m, f"d{c}.{t - 1}" if t else None))
        return jobs
    raise ValueError(f"workload must be one of a, b, c, d, got {name!r}")


def conversations(count: int, turns: int, first: int, turn: int, answer: int, think: float, vocab: int, seed: int) -> list[Job]:
    """``count`` conversations: a prompt of ``first`` tokens, then ``turns`` - 1 of ``turn`` tokens, each answered with
    ``answer`` tokens; between them exponential think times of ``think`` seconds in the mean."""
    rng = random.Random(f"conversations {seed}")
    ids = lambda n: [rng.randrange(min(FIRST_ID, vocab // 2), vocab) for _ in range(n)]  # noqa: E731
    return [Job(f"{c}.{t}", ids(turn if t else first), answer, f"{c}.{t - 1}" if t else None, rng.expovariate(1 / think))
            for c in range(count) for t in range(turns)]


def questions(count: int, documents: int, document: int, question: int, answer: int, vocab: int, seed: int) -> list[Job]:
    """``count`` questions of ``question`` tokens, each on one of ``documents`` prefixes of ``document`` tokens in random
    order, every document equally often, answered with ``answer`` tokens."""
    rng = random.Random(f"questions {seed}")
    ids = lambda n: [rng.randrange(min(FIRST_ID, vocab // 2), vocab) for _ in range(n)]  # noqa: E731
    texts = [ids(document) for _ in range(documents)]
    order = [i % documents for i in range(count)]
    rng.shuffle(order)
    return [Job(f"{n}.{i}", texts[i] + ids(question), answer) for n, i in enumerate(order)]
