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
    f'system\n{SYSTEM}\nuser\n{RULES}\nlet it = "it"\nget it = "it"\njoin it and it = "it/it"\ncopy = "it"\n'
    'echo = "it"\nassistant\nWhat is it?\nJoin it and it.\nRepeat this: it.\nRead this.\n'
)
_POOLS = json.loads((Path(__file__).resolve().parent / "recall_words.json").read_text(encoding="utf-8"))
KEYS, HEADS, TAILS = (tuple(_POOLS[name].split()) for name in ("keys", "heads", "tails"))

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


def make_value(rng: random.Random) -> str:
    """Two words, sometimes three; the first is a token at the start of a word, the others follow a space."""
    return " ".join([rng.choice(HEADS), *rng.sample(TAILS, 2 if rng.random() < 0.25 else 1)])


def make_pairs(rng: random.Random, count: int) -> dict[str, str]:
    """`count` distinct keys with distinct values (over 200,000 values are possible)."""
    pairs: dict[str, str] = {}
    for key in rng.sample(KEYS, count):
        value = make_value(rng)
        while value in pairs.values():
            value = make_value(rng)
        pairs[key] = value
    return pairs


def make_query(rng: random.Random, kind: str, pairs: dict[str, str], chat: bool) -> Query:
    """A question of one kind, as chat turn (after the previous turn's end) or as a plain line."""
    if kind == "recall":
        key = rng.choice(list(pairs))
        answer, asked, plain = pairs[key], f"What is {key}?", f'get {key} = "'
    elif kind == "join":
        one, two = rng.sample(list(pairs), 2)
        answer, asked, plain = f"{pairs[one]}/{pairs[two]}", f"Join {one} and {two}.", f'join {one} and {two} = "'
    else:
        answer = " ".join([rng.choice(HEADS), *rng.choices(TAILS, k=rng.randint(6, 14))])
        asked, plain = f'Repeat this:\n"{answer}"', f'copy = "{answer}"\necho = "'
    if chat:
        return Query(kind, f"{asked}{END}\n<|im_start|>assistant\n", answer, END)
    return Query(kind, plain, answer, '"')


def make_task(
    rng: random.Random, pair_count: int, filler: str, chat: bool, kinds: list[str], pairs: dict[str, str] | None = None
) -> Task:
    """A document with one question per entry of `kinds`. `filler` must start with no white space and end with \\n."""
    pairs = pairs if pairs is not None else make_pairs(rng, pair_count)
    opening: Segments = []
    if chat:
        opening.append((f"<|im_start|>system\n{SYSTEM}{END}\n<|im_start|>user\n{RULES}\n", 1.0))
    for key, value in pairs.items():
        opening.append((f'let {key} = "{value}"\n', 0.0))
    queries = []
    for index, kind in enumerate(kinds):
        query = make_query(rng, kind, pairs, chat)
        if chat and index:
            query = Query(kind, "\n<|im_start|>user\n" + query.question, query.answer, query.close)
        elif index:
            query = Query(kind, "\n" + query.question, query.answer, query.close)
        queries.append(query)
    return Task(opening, filler, tuple(queries))
