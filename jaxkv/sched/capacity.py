"""Whether sequences fit: the arithmetic behind admission that cannot deadlock. Holds no state and takes no page."""

from __future__ import annotations

from jaxkv.cache.controller import CacheController
from jaxkv.config import ConfigError, SchedConfig
from jaxkv.sequence import Sequence
from jaxkv.types import KVGroup


def pages_needed(group: KVGroup, page_size: int, num_tokens: int, max_chunk: int) -> int:
    """Most pages of ``group`` that ``num_tokens`` tokens hold at once, run in chunks of at most ``max_chunk``."""
    pages = -(-num_tokens // page_size)
    if group.window is None:
        return pages
    span = group.window - 1 + min(max_chunk, num_tokens)  # from the first key of the first query to the last query
    return min(pages, -(-(span - 1) // page_size) + 1)


def check_capacity(config: SchedConfig, cache: CacheController, max_model_len: int) -> None:
    """Raise ConfigError unless one sequence of ``max_model_len`` tokens can always run to its end."""
    budget = config.max_num_batched_tokens
    if not config.enable_chunked_prefill and budget < max_model_len:
        raise ConfigError(f"max_num_batched_tokens must be at least max_model_len ({max_model_len}) when chunked "
                          f"prefill is off, got {budget}")
    for index, (group, pages) in enumerate(zip(cache.groups, cache.num_pages, strict=True)):
        need = pages_needed(group, cache.page_size, max_model_len, budget)
        if pages < need:
            raise ConfigError(f"KV group {index} has {pages} pages, one sequence of max_model_len ({max_model_len}) "
                              f"tokens needs {need}")


def fits_beside(cache: CacheController, seq: Sequence, others: int, max_chunk: int) -> bool:
    """Whether all known tokens of an acquired sequence fit, with one page to spare for each of ``others`` running.

    Less would do for its first chunk, but would soon have it preempted again.
    """
    num_tokens = len(seq.tokens)
    total = -(-num_tokens // cache.page_size)
    return all(min(total - len(pages), pages_needed(group, cache.page_size, num_tokens, max_chunk)) + others
               <= cache.available(index)
               for index, (group, pages) in enumerate(zip(cache.groups, seq.pages, strict=True)))
