"""How fast the controller replays with a million nodes in the tree: block touches per second, one core.

500 prompts of 48 blocks, below them documents of 2 blocks, until the tree holds that many nodes. Then requests for a
prompt and a document: half of the documents are known, half are new and push others out, as the tier is full.
"""

from __future__ import annotations

import random
import time

from bench.replay_one import GROUP, PARAMS, REST, serve
from jaxkv.cache.controller import CacheController
from jaxkv.types import Request

PROMPTS, PROMPT_BLOCKS, DOCUMENT_BLOCKS = 500, 48, 2


def _request(number: int, document: int) -> Request:
    first = document % PROMPTS * PROMPT_BLOCKS
    unique = PROMPTS * PROMPT_BLOCKS + DOCUMENT_BLOCKS * document
    tokens = (*range(first, first + PROMPT_BLOCKS), *range(unique, unique + DOCUMENT_BLOCKS), REST)
    return Request(str(number), tokens, PARAMS, 1)


def touches_per_second(policy: str, nodes: int = 10**6, requests: int = 20000) -> float:
    """Block touches per second of ``requests`` requests to a full tier whose tree holds ``nodes`` nodes."""
    documents = nodes - PROMPTS
    capacity = PROMPTS * PROMPT_BLOCKS + documents * DOCUMENT_BLOCKS
    cache = CacheController((GROUP,), 1, (capacity,), (0,), policy)
    for number in range(documents):
        serve(cache, _request(number, number))
    assert len(cache.store.nodes) == nodes
    rng = random.Random(0)
    order = [rng.randrange(documents) if i % 2 else documents + i for i in range(requests)]
    start = time.perf_counter()
    for i, document in enumerate(order):
        serve(cache, _request(documents + i, document))
    return requests * (PROMPT_BLOCKS + DOCUMENT_BLOCKS) / (time.perf_counter() - start)
