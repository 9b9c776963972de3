"""Owns the generated recall tasks (recall, two-part join, copy): pure Python, a seed and a filler in, a task out.

A task is a list of segments. A segment is (text, weight): weight 0 is noise nobody can predict (a key or a value
at its first occurrence), 1 is ordinary text, ANSWER is a token of an answer. Segments are cut where a byte-level
BPE never merges, so that encoding segments one by one equals encoding the joined text.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

ANSWER = -1.0  # marker weight: the trainer decides how heavy an answer token is
END = "<|im_end|>"
SYSTEM = "You keep a table of values and answer questions about it."
RULES = "Remember these values."
PHRASES = (  # every fixed phrase below, for the tokenizer's training
    # (written before the pairs became "set key value" lines; the shipped tokenizer was trained on exactly this)
    f'system\n{SYSTEM}\nuser\n{RULES}\nlet it = "it"\nget it = "it"\njoin it and it = "it/it"\ncopy = "it"\n'
    'echo = "it"\nassistant\nWhat is it?\nJoin it and it.\nRepeat this: it.\nRead this.\n'
)
_POOLS = json.loads((Path(__file__).resolve().parent / "recall_words.json").read_text(encoding="utf-8"))
KEYS, WORDS = (tuple(_POOLS[name].split()) for name in ("keys", "words"))

Segments = list[tuple[str, float]]


@dataclass(frozen=True)
class Query:
    """One question: its kind, the text up to the answer, the answer, and the text that closes the answer."""

    kind: str  # recall | join | copy
    question: str
    answer: str
    close: str


@dataclass(frozen=True)
class Task:
    """A whole document: the opening (pairs), the filler, the questions."""

    opening: Segments
    filler: str
    queries: tuple[Query, ...]

    def segments(self, filler_weight: float = 1.0) -> Segments:
        """Everything in order, weighted for training."""
        out = [*self.opening, (self.filler, filler_weight)]
        for query in self.queries:
            out += [(query.question, 0.0), (query.answer, ANSWER), (query.close, ANSWER)]
        return out

    def prompt(self) -> str:
        """The text before the first answer."""
        return "".join(text for text, _ in self.opening) + self.filler + self.queries[0].question

    def messages(self) -> list[dict[str, str]]:
        """The prompt of a chat task as messages; the chat template renders them to exactly `prompt()`."""
        parts = self.prompt().split("<|im_start|>")[1:-1]
        turns = (part.removesuffix("\n").removesuffix(END).partition("\n") for part in parts)
        return [{"role": role, "content": content} for role, _, content in turns]


def make_pairs(rng: random.Random, count: int) -> dict[str, str]:
    """`count` distinct keys; values of two words, sometimes three (over 170,000 are possible), no word used twice."""
    sizes = [3 if rng.random() < 0.25 else 2 for _ in range(count)]
    words = rng.sample(WORDS, sum(sizes))
    pairs: dict[str, str] = {}
    for key, size in zip(rng.sample(KEYS, count), sizes, strict=True):
        pairs[key] = " ".join(words[:size])
        words = words[size:]
    return pairs


def make_query(rng: random.Random, kind: str, pairs: dict[str, str], chat: bool) -> Query:
    """A question of one kind, as a chat turn or as a plain line. An answer starts with the space before its word."""
    if kind == "recall":
        key = rng.choice(list(pairs))
        answer, asked, plain = pairs[key], f"What is {key}?", f"get {key}"
    elif kind == "join":
        one, two = rng.sample(list(pairs), 2)
        answer, asked, plain = f"{pairs[one]} and {pairs[two]}", f"Join {one} and {two}.", f"join {one} and {two}:"
    else:
        answer = " ".join(rng.choices(WORDS, k=rng.randint(7, 15)))
        asked, plain = f"Repeat this: {answer}.", f"copy {answer}\necho"
    question = f"{asked}{END}\n<|im_start|>assistant\n" if chat else plain
    return Query(kind, question, " " + answer, END if chat else "\n")


def make_task(
    rng: random.Random, pair_count: int, filler: str, chat: bool, kinds: list[str], pairs: dict[str, str] | None = None
) -> Task:
    """A document with one question per entry of `kinds`. `filler` must start with no white space and end with \\n."""
    pairs = pairs or make_pairs(rng, pair_count)
    opening: Segments = []
    if chat:
        opening.append((f"<|im_start|>system\n{SYSTEM}{END}\n<|im_start|>user\n{RULES}\n", 1.0))
    for key, value in pairs.items():
        opening.append((f"set {key} {value}\n", 0.0))
    queries = []
    for index, kind in enumerate(kinds):
        query = make_query(rng, kind, pairs, chat)
        if chat and index:
            query = Query(kind, "\n<|im_start|>user\n" + query.question, query.answer, query.close)
        queries.append(query)
    return Task(opening, filler, tuple(queries))
