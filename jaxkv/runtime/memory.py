"""How many pages each KV group and each tier gets: from the sizes the user gave, else from the memory that is free.

Pure arithmetic but for ``free_device_memory`` and ``free_host_memory``.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import jax

from jaxkv.config import ConfigError, SchedConfig
from jaxkv.types import KVGroup

CPU_POOL_LIMIT = 4 * 2**30  # a development machine's memory is not ours to fill
HOST_TIER_LIMIT = 64 * 2**30  # what PJRT pins by default
STAGING_PAGES = 16  # pages of every group that may be on their way back to the device
FETCH_PAGES = 64  # pages of one fetch; two are under way at once, in device memory and, if they come from disk, on the host


@dataclass(frozen=True)
class Capacity:
    """Pages by group, and the bytes they stand for over the whole mesh."""

    num_pages: tuple[int, ...]
    pool_bytes: int
    num_host_pages: tuple[int, ...]
    host_bytes: int


def free_device_memory(devices: Sequence[jax.Device], taken: int = 0) -> tuple[int, int]:
    """Bytes over all devices: (free, what the pools take when no size is given). The latter is 90 % of what
    JAX may take (on GPUs 75 % of the memory, or XLA_PYTHON_CLIENT_MEM_FRACTION) less what is in use; on CPU a quarter of the
    free host memory, at most 4 GiB. ``taken``: bytes of every device that something else is about to take."""
    stats = devices[0].memory_stats() if devices[0].platform != "cpu" else None
    if stats:
        free = max(0, stats["bytes_limit"] - stats["bytes_in_use"] - taken)
        return len(devices) * free, len(devices) * _steady(max(0, free - stats["bytes_limit"] // 10))
    free = max(0, free_host_memory() - len(devices) * taken)
    return free, min(CPU_POOL_LIMIT, _steady(free // 4))


def check_memory(weights: int, max_num_seqs: int, slots: int, devices: Sequence[jax.Device]) -> None:
    """ConfigError where the weights, or with them what is kept of each of ``max_num_seqs`` sequences to sample from it
    (``slots``), are more than is free: bytes over all devices. Devices that do not say what they have have enough."""
    if devices[0].platform != "cpu" and not devices[0].memory_stats():
        return
    free = free_device_memory(devices)[0]
    if weights > free:
        raise ConfigError(f"the model's weights take {weights:,} bytes, but only {free:,} of the device memory are free")
    if slots > free - weights:
        raise ConfigError(f"max_num_seqs {max_num_seqs} takes {slots:,} bytes for the sampler's state, but only "
                          f"{free - weights:,} of the device memory are free besides the weights")


def _steady(size: int) -> int:
    """Rounded down to three significant bits: a pool's shape is part of the compile cache's key, so that the default
    may not follow every change of the free memory."""
    step = 1 << max(0, size.bit_length() - 3)
    return size // step * step


def free_host_memory() -> int:
    """Bytes of host memory that can be used without swapping."""
    try:
        with open("/proc/meminfo") as f:
            return next(int(line.split()[1]) * 1024 for line in f if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def plan_capacity(
    groups: Sequence[KVGroup], page_size: int, sched: SchedConfig, max_model_len: int, *,
    kv_cache_memory: int | None, host_kv_memory: int | None, free_device: tuple[int, int], free_host: int, shared: bool = False,
    page_bytes: Sequence[int] | None = None, host_page_bytes: Sequence[int] | None = None,
) -> Capacity:
    """Splits the memory over groups. All groups get pages for the same tokens, but a window group never more than
    twice what its windows can hold at once (half of it remembers windows of prefixes).

    ``shared``: the device's memory is the host's (CPU). ``page_bytes``: bytes of a page of each group on the devices, if
    padding adds to them; ``host_page_bytes``: below HBM, if they differ there (a KV codec).
    ConfigError: not even one sequence of max_model_len fits, or more memory is asked for than there is.
    """
    free, usual = free_device
    if kv_cache_memory is not None and kv_cache_memory > free:
        raise ConfigError(f"kv_cache_memory is {kv_cache_memory:,} bytes, but only {free:,} are free")
    plain = [g.page_bytes(page_size) for g in groups]
    above_bytes, below_bytes = page_bytes or plain, host_page_bytes or plain

    def split(pages: int) -> tuple[int, ...]:
        return tuple(min(pages, _window_cap(g, page_size, sched)) if g.window else pages for g in groups)

    def cost(pages: int) -> int:
        return sum(n * b for n, b in zip(split(pages), above_bytes))

    def host_cost(pages: int) -> int:
        return sum(n * b for n, b in zip(split(pages), below_bytes))

    need = -(-max_model_len // page_size) + 1
    useful = max(need, sched.max_num_seqs * (need - 1))
    budget = kv_cache_memory if kv_cache_memory is not None else min(usual, cost(useful))
    pages = _largest(cost, budget, budget // min(above_bytes))
    if pages < need:
        source = "" if kv_cache_memory is not None else f"; weights and max_num_seqs {sched.max_num_seqs} leave no more"
        raise ConfigError(f"kv_cache_memory of {budget:,} bytes holds {pages * page_size} tokens, less than one sequence "
                          f"of max_model_len {max_model_len} ({cost(need):,} bytes with one page to spare){source}")
    if shared:
        free_host -= cost(pages)
    if host_kv_memory is not None and host_kv_memory > free_host:
        raise ConfigError(f"host_kv_memory is {host_kv_memory:,} bytes, but only {free_host:,} are free"
                          + " besides the KV pools" * shared)
    host_budget = host_kv_memory
    if host_budget is None:
        host_budget = min(free_host // 8, HOST_TIER_LIMIT, 2 * cost(pages))
    host_pages = max(0, _largest(host_cost, host_budget, host_budget // min(below_bytes)) - STAGING_PAGES)
    if host_kv_memory and not host_pages:
        raise ConfigError(f"host_kv_memory of {host_kv_memory:,} bytes holds no page besides the staging of "
                          f"{STAGING_PAGES} ({host_cost(STAGING_PAGES + 1):,} bytes is the least; 0 turns the tier off)")
    return Capacity(split(pages), cost(pages), split(host_pages) if host_pages else (0,) * len(groups),
                    host_budget if host_pages else 0)


def _window_cap(group: KVGroup, page_size: int, sched: SchedConfig) -> int:
    assert group.window is not None
    in_windows = sched.max_num_seqs * (-(-group.window // page_size) + 2)
    return 2 * (in_windows + -(-sched.max_num_batched_tokens // page_size))


def _largest(cost, limit: int, most: int) -> int:
    """The largest n <= most with cost(n) <= limit; cost grows with n."""
    low, high = 0, most
    while low < high:
        mid = (low + high + 1) // 2
        low, high = (mid, high) if cost(mid) <= limit else (low, mid - 1)
    return low
