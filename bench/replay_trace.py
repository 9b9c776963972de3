"""Request traces to replay: what a line holds, how one is read, and synthetic ones of other kinds.

A trace names blocks of ``BLOCK`` tokens, one id for a block and everything before it. Only full blocks can be cached; the
tokens behind the last one are work that no cache saves.
"""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

BLOCK = 512  # tokens


@dataclass(frozen=True, slots=True)
class Line:
    """One request. ``blocks``: ids of its full blocks; ``tokens``: prompt length, at least BLOCK times as many."""

    time: float  # seconds from the first request
    session: str
    blocks: tuple[int, ...]
    tokens: int
    last: bool = False  # no later request has the same session: nobody knows this at the time


def load(path: str | Path) -> list[Line]:
    """Lines of a JSONL file, gzipped if it is called so, in order of arrival.

    Fields: ``timestamp`` (ms), ``input_length`` (tokens), ``hash_ids``, and ``session`` if there are any. Raises
    ValueError that names the line.
    """
    opener = gzip.open if str(path).endswith(".gz") else open
    lines = []
    with opener(path, "rt") as file:
        for number, text in enumerate(file, 1):
            try:
                data = json.loads(text)
                tokens = int(data["input_length"])
                blocks = tuple(map(int, data["hash_ids"][:tokens // BLOCK]))
                lines.append(Line(data["timestamp"] / 1000, str(data.get("session", "")), blocks, tokens))
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{path}:{number}: not a request of a trace: {error!r}") from None
    return mark_last(lines)


def mark_last(lines: Iterable[Line]) -> list[Line]:
    """The same lines with ``last`` set on the last one of every session that has a name."""
    lines, seen = list(lines), {""}
    for i in range(len(lines) - 1, -1, -1):
        line = lines[i]
        if line.session not in seen:
            seen.add(line.session)
            lines[i] = Line(line.time, line.session, line.blocks, line.tokens, True)
    return lines


def distinct_blocks(lines: Iterable[Line]) -> int:
    return len({block for line in lines for block in line.blocks})


# ---- synthetic traces


class _Ids:
    """Ids of paths: the same names below the same block give the same ids."""

    def __init__(self) -> None:
        self._ids: dict[tuple[int, object], int] = {}

    def path(self, names: Iterable[object]) -> tuple[int, ...]:
        at, path = -1, []
        for name in names:
            at = self._ids.setdefault((at, name), len(self._ids))
            path.append(at)
        return tuple(path)


def _zipf(rng: random.Random, count: int, skew: float) -> Iterator[int]:
    weights = [1 / (i + 1) ** skew for i in range(count)]
    while True:
        yield from rng.choices(range(count), weights, k=256)


def _documents(rng: random.Random, count: int) -> Iterator[tuple[str, list[object]]]:
    """Questions about documents of Zipf popularity, behind one system prompt; popularity shifts halfway."""
    sizes = [rng.randint(4, 40) for _ in range(3000)]
    for i, rank in zip(range(count), _zipf(rng, 3000, 0.9)):
        doc = (rank + (1000 if i > count // 2 else 0)) % 3000
        yield "", ["sys", *((doc, b) for b in range(sizes[doc])), ("q", i)]


def _scans(rng: random.Random, count: int) -> Iterator[tuple[str, list[object]]]:
    """Half as ``documents``, half one-off scans, and a batch job that walks the same 60 long files in a loop."""
    popular = _zipf(rng, 800, 1.0)
    for i in range(count):
        kind = rng.random()
        if kind < 0.5:
            yield "", [("doc", next(popular), b) for b in range(12)]
        elif kind < 0.8:
            yield "", [("once", i, b) for b in range(rng.randint(5, 60))]
        else:
            yield "", [("loop", i % 60, b) for b in range(50)]


def _tenants(rng: random.Random, count: int) -> Iterator[tuple[str, list[object]]]:
    """80 tenants with long prompts of their own and short chats behind them; who is busy changes."""
    sizes, turns = [rng.randint(5, 60) for _ in range(80)], {}
    for i in range(count):
        tenant = (int(rng.expovariate(0.1)) + i // (count // 6 + 1) * 13) % 80
        chat = (tenant, rng.randint(0, 5) + i // 400)
        turns[chat] = turns.get(chat, 0) + 1
        yield str(chat), [*((tenant, b) for b in range(sizes[tenant])), *((chat, b) for b in range(2 * turns[chat]))]


def _chats(rng: random.Random, count: int) -> Iterator[tuple[str, list[object]]]:
    """Conversations of geometric length with heavy-tailed pauses, counted in requests."""
    waiting: list[tuple[int, int, int]] = []  # due at request, conversation, blocks
    for i in range(count):
        due = min(waiting, default=None)
        if due and due[0] <= i:
            waiting.remove(due)
            _, chat, blocks = due
        else:
            chat, blocks = i, 0
        blocks += rng.randint(1, 8)
        yield str(chat), ["sys", *((chat, b) for b in range(blocks))]
        if rng.random() < 0.75:
            waiting.append((i + int(rng.paretovariate(0.9) * 8), chat, blocks))


def _agents(rng: random.Random, count: int) -> Iterator[tuple[str, list[object]]]:
    """40 agents at a time on 5 long static prompts; a session ends, or compacts its tail, now and then."""
    live = [[n, n % 5, 0, 0] for n in range(40)]  # session, prompt, epoch of the tail, blocks of the tail
    for i in range(count):
        agent = live[min(int(rng.expovariate(0.15)), 39)]
        agent[3] += rng.randint(1, 5)
        if agent[3] > 120:
            agent[2:] = [i, 10]
        session, prompt, epoch, blocks = agent
        yield str(session), [*(("p", prompt, b) for b in range(40)), *((session, epoch, b) for b in range(blocks))]
        if rng.random() < 0.02:
            agent[:] = [40 + i, rng.randrange(5), 0, 0]


SYNTHETIC = {"documents": _documents, "scans": _scans, "tenants": _tenants, "chats": _chats, "agents": _agents}


def synthetic(name: str, count: int = 4000, seed: int = 0) -> list[Line]:
    """A trace by name from ``SYNTHETIC``; one request a second, every prompt half a block longer than its full blocks."""
    ids = _Ids()
    paths = ((session, ids.path(names)) for session, names in SYNTHETIC[name](random.Random(seed), count))
    return mark_last(Line(float(i), session, path, BLOCK * len(path) + BLOCK // 2)
                     for i, (session, path) in enumerate(paths))
