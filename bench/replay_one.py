"""One request through the real controller without a device: a block is a page of one token."""

from __future__ import annotations

from jaxkv.cache.controller import CacheController
from jaxkv.params import SamplingParams
from jaxkv.sequence import Sequence
from jaxkv.types import KVGroup, Request

GROUP = KVGroup((0,), 1, 1, "bfloat16")
PARAMS = SamplingParams()
REST = -1  # last token of every prompt: what follows the full blocks always runs and is never stored


def serve(cache: CacheController, request: Request) -> int:
    """Acquire, compute and release a request that runs alone; blocks found. Blocks that do not fit stay out."""
    seq = Sequence(request, list(request.prompt))
    found = cache.acquire(seq, 0)
    length = min(len(seq.tokens) - 1, cache.num_pages[0])
    grown = cache.grow(seq, length)
    assert grown, "one request at a time finds room for all that fits"
    seq.num_scheduled = length
    cache.release(seq, ended=True)
    cache.take_transfers()
    return found
