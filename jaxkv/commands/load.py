"""The requests of a benchmark, how they are sent, and what is measured of each.

Token ids as prompts, so that lengths are exact for every model and the client's tokenizer costs nothing. Times are taken on
the client, from the moment a request is due (not from when it could be sent, which would hide a server that falls behind).
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxkv.commands.http import HttpError, Server

FIRST_ID, LAST_ID = 100, 999  # token ids of the prompts: every model has them, special tokens lie elsewhere as a rule


@dataclass(frozen=True)
class Load:
    """What is sent, and how fast. Lengths in tokens."""

    workload: str = "random"  # random: nothing in common; shared-prefix; multi-turn: each prompt holds the talk so far
    num_requests: int = 64
    input_len: int = 256  # new tokens of a prompt
    output_len: int = 64
    prefix_len: int = 512  # tokens that all prompts of shared-prefix begin with
    turns: int = 4  # of a conversation
    concurrency: int = 16  # conversations under way at once, at most
    request_rate: float | None = None  # conversations a second (Poisson arrivals); None: as soon as there is room
    seed: int = 0
    timeout: float = 600.0  # seconds for a request


@dataclass
class Record:
    """One request. Seconds on one clock."""

    due: float
    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    times: list[float] = field(default_factory=list)  # when text or tokens arrived
    end: float = 0.0
    error: str | None = None


def conversations(load: Load) -> Iterator[list[list[int]]]:
    """Of each conversation the new token ids of each turn; ``num_requests`` turns in all."""
    rng = random.Random(load.seed)
    ids = lambda n: [rng.randint(FIRST_ID, LAST_ID) for _ in range(n)]  # noqa: E731
    prefix = ids(load.prefix_len) if load.workload == "shared-prefix" else []
    turns = load.turns if load.workload == "multi-turn" else 1
    for start in range(0, load.num_requests, turns):
        yield [prefix + ids(load.input_len) for _ in range(min(turns, load.num_requests - start))]


async def run(server: Server, model: str, load: Load, advance: Any = lambda: None) -> list[Record]:
    """Sends everything and waits for the last answer; ``advance()`` after each."""
    rng, room = random.Random(load.seed + 1), asyncio.Semaphore(load.concurrency)
    records: list[Record] = []

    async def talk(turns: list[list[int]], due: float | None) -> None:
        history: list[int] = []
        async with room:
            for new in turns:
                record = Record(due or time.perf_counter())
                records.append(record)
                history += new
                history += await _ask(server, model, load, history, record)
                advance()
                if record.error:
                    return
                due = None

    start, at = time.perf_counter(), 0.0
    async with asyncio.TaskGroup() as group:
        for turns in conversations(load):
            if load.request_rate is not None:
                at += rng.expovariate(load.request_rate)
                await asyncio.sleep(start + at - time.perf_counter())
            group.create_task(talk(turns, start + at if load.request_rate is not None else None))
    return records


async def _ask(server: Server, model: str, load: Load, prompt: Sequence[int], record: Record) -> list[int]:
    """One request, booked in its record; the token ids of the answer."""
    request = {"model": model, "prompt": list(prompt), "max_tokens": load.output_len, "temperature": 0.0, "ignore_eos": True,
               "stream": True, "stream_options": {"include_usage": True}, "return_token_ids": load.workload == "multi-turn"}
    answer: list[int] = []
    try:
        async with asyncio.timeout(load.timeout):
            async for event in server.events("/v1/completions", request):
                if event.get("choices"):
                    record.times.append(time.perf_counter())
                    answer += event["choices"][0].get("token_ids") or ()
                if usage := event.get("usage"):
                    record.prompt_tokens, record.output_tokens = usage["prompt_tokens"], usage["completion_tokens"]
                    record.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    except HttpError as error:
        record.error = str(error)
    except TimeoutError:
        record.error = f"no end after {load.timeout:g} s"
    record.end = time.perf_counter()
    if not record.error and not record.output_tokens:
        record.error = "an answer without usage or without tokens"
    return answer
