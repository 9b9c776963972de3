"""kv_write, the page moves and the tier moves as candidates to time. Each program is one that the engine also dispatches alone.

Work is counted in bytes read plus bytes written, so that it compares with the measured copy bandwidth; a tier move crosses a
bus instead and counts its bytes once.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels as pk
from bench.kernel_cases import CACHE_BYTES, LAYOUT, reason
from bench.roofline import token_bytes
from bench.timing import Candidate
from pallas_kernels.arg_specs import HeadSpec
from pallas_kernels.kv_write.api import IMPLEMENTATIONS
from pallas_kernels.layout import from_storage, storage_dtype
from pallas_kernels.page_copy.api import GATHER, SCATTER

TURNS = 4  # index sets that take turns at least; those of pages as many as no cache holds


class Move(NamedTuple):
    """One thing to time. make: the candidate; RuntimeError with the reason if it is refused."""

    kind: str
    shape: str
    impl: str
    bytes: int
    make: Callable[[], Candidate]


class Sizes(NamedTuple):
    """What a device is asked to move. layers: of a page batch; tokens: rows of a kv_write; batches: pages at once."""

    heads: HeadSpec
    kv_dtype: str
    page_size: int
    layers: int
    pool_pages: int
    tokens: tuple[int, ...]
    batches: tuple[int, ...]
    turns: int = TURNS


def moves(sizes: Sizes, platform: str, names: list[str]) -> Iterator[Move]:
    """Everything, by implementation name; pools are made once and live as long as the iterator."""
    stored = storage_dtype(sizes.kv_dtype, platform)
    shape = pk.pool_shape(LAYOUT, sizes.pool_pages, sizes.page_size, sizes.heads.kv_heads, sizes.heads.head_dim)
    state = {"pools": tuple(jnp.zeros(shape, stored) for _ in range(sizes.layers))}
    row = token_bytes(sizes.heads, sizes.kv_dtype)
    for tokens, impl in itertools.product(sizes.tokens, names):
        yield Move("kv_write", f"{tokens} tokens", impl, 2 * tokens * row,
                   lambda t=tokens, i=impl: _checked(i, IMPLEMENTATIONS, lambda: _write(sizes, state, t, i)))
    for n, impl in itertools.product(sizes.batches, names):
        moved = 2 * n * sizes.layers * sizes.page_size * row
        yield Move("page_copy", f"gather {n} pages", impl, moved,
                   lambda n=n, i=impl: _checked(i, GATHER, lambda: _gather(state, page_sets(sizes, n, platform), i)))
        yield Move("page_copy", f"scatter {n} pages", impl, moved,
                   lambda n=n, i=impl: _checked(i, SCATTER, lambda: _scatter(state, page_sets(sizes, n, platform), i)))
    for n in sizes.batches:
        for way in ("to host", "to device"):
            yield Move("tier", f"{n} pages {way}", "device_put", n * sizes.layers * sizes.page_size * row,
                       lambda n=n, w=way: _checked("device_put", {"device_put"}, lambda: _tier(sizes, n, w)))


def _checked(impl: str, known: Any, make: Callable[[], Candidate]) -> Candidate:
    if impl not in known:
        raise RuntimeError(f"not registered: {impl} is none of {', '.join(known)}")
    try:
        candidate = make()
        candidate.wait(candidate.run())
        return candidate
    except Exception as error:  # whatever stops a kernel on this machine is a result
        raise RuntimeError(reason(error)) from error


def page_sets(sizes: Sizes, n: int, platform: str) -> list[jax.Array]:
    """Index sets [n] of pages, so many that together they exceed the cache, as far as the pool has other pages for them."""
    size = n * sizes.layers * sizes.page_size * token_bytes(sizes.heads, sizes.kv_dtype)
    enough = min(-(-CACHE_BYTES[platform] // size), sizes.pool_pages // n)
    return _indices(n, sizes.pool_pages, max(sizes.turns, enough))


def _indices(n: int, of: int, turns: int) -> list[jax.Array]:
    """Index sets [n] within [0, of), each without repeats, and all of them together if there are enough."""
    rng = np.random.default_rng(n)
    if turns * n <= of:
        return [jnp.asarray(part, jnp.int32) for part in np.split(rng.permutation(of)[:turns * n], turns)]
    return [jnp.asarray(rng.permutation(of)[:n], jnp.int32) for _ in range(turns)]


def _write(sizes: Sizes, state: dict[str, Any], tokens: int, impl: str) -> Candidate:
    """One layer's write of `tokens` rows into a donated pool, `turns` times."""
    rows = jax.random.normal(jax.random.key(0), (tokens, sizes.heads.kv_heads, sizes.heads.head_dim))
    rows = rows.astype(from_storage(state["pools"][0]).dtype)
    slots = jnp.stack(_indices(tokens, sizes.pool_pages * sizes.page_size, sizes.turns))

    def write(pool: jax.Array, rows: jax.Array, slots: jax.Array) -> jax.Array:
        step = lambda pool, at: (pk.kv_write(pool, rows, rows, at, layout=LAYOUT, impl=impl), None)  # noqa: E731
        return jax.lax.scan(step, pool, slots)[0]

    call = jax.jit(write, donate_argnums=0)
    mine = {"pool": jnp.copy(state["pools"][0])}

    def run() -> jax.Array:
        mine["pool"] = call(mine["pool"], rows, slots)
        return mine["pool"]

    wrote = from_storage(run())
    page, offset = np.divmod(np.asarray(slots[-1]), sizes.page_size)
    if not bool((wrote[page, 0, :, offset] == rows).all()):
        raise AssertionError("rows are not where they were written")
    return Candidate(run, jax.block_until_ready, sizes.turns)


def _gather(state: dict[str, Any], pages: list[jax.Array], impl: str) -> Candidate:
    call = jax.jit(lambda pools, at: pk.gather_pages(pools, at, layout=LAYOUT, impl=impl))
    return Candidate(lambda: [call(state["pools"], at) for at in pages], jax.block_until_ready, len(pages))


def _scatter(state: dict[str, Any], pages: list[jax.Array], impl: str) -> Candidate:
    """Every set has data of its own, which no cache holds either."""
    more = jax.jit(lambda pools, at: pk.gather_pages(pools, at, layout=LAYOUT, impl="xla") + 1)
    data = [more(state["pools"], at) for at in pages]
    call = jax.jit(lambda pools, at, data: pk.scatter_pages(pools, at, data, layout=LAYOUT, impl=impl), donate_argnums=0)
    back = jax.jit(lambda pools, at: pk.gather_pages(pools, at, layout=LAYOUT, impl="xla"))

    def run() -> Any:
        for at, part in zip(pages, data, strict=True):
            state["pools"] = call(state["pools"], at, part)
        return state["pools"]

    run()
    if not bool((back(state["pools"], pages[-1]) == data[-1]).all()):
        raise AssertionError("pages are not what was written")
    return Candidate(run, jax.block_until_ready, len(pages))


def _tier(sizes: Sizes, n: int, way: str) -> Candidate:
    """device_put of a gathered page batch to pinned host memory, or back."""
    device = jax.devices()[0]
    there = {kind: jax.sharding.SingleDeviceSharding(device, memory_kind=kind) for kind in ("pinned_host", "device")}
    shape = (n, sizes.layers, 2, sizes.page_size, sizes.heads.kv_heads, sizes.heads.head_dim)
    pages = jnp.zeros(shape, sizes.kv_dtype)
    source, target = pages, there["pinned_host"]
    if way == "to device":
        source, target = jax.device_put(pages, target), there["device"]
    return Candidate(lambda: jax.device_put(source, target), jax.block_until_ready, 1)
