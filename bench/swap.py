"""Seconds to move the KV of a prompt out of HBM and back, against seconds to compute it: what `bench.motivation swap` shows.

Moves are the engine's own (``Tiers``: gather, codec, device_put, scatter, in batches over all layers), on pools of random KV.
Computing is the engine too: one prompt on an empty cache, then decode. Where a whole model is too slow for the machine, a model
of fewer layers is measured and its seconds multiplied; ``Compute.factor`` says by how much.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Sequence
from typing import NamedTuple

import jax

import pallas_kernels as pk
from jaxkv import SamplingParams
from jaxkv.device.spec import KVSpec
from jaxkv.device.state import Pools, pool_formats, zero_pools
from jaxkv.runtime.engine import Engine
from jaxkv.runtime.page_ops import PageForm
from jaxkv.runtime.startup import make_mesh
from jaxkv.runtime.tiers import Tiers
from jaxkv.types import KVGroup, PageMove, StepPlan, Tier
from pallas_kernels.layout import as_storage

PAGE = 16


class Swapper:
    """A pool of random KV for ``tokens`` tokens, a host tier that holds them all, and the moves between them."""

    def __init__(self, group: KVGroup, tokens: int, codec: str) -> None:
        mesh = make_mesh(1)
        layout = pk.resolve_layout("auto", group.head_dim, jax.default_backend())
        self.kv = KVSpec((group,), (-(-tokens // PAGE),), PAGE, layout)
        form = PageForm(self.kv, mesh, codec)
        self.page_bytes = form.bytes[0]
        self._tiers = Tiers(self.kv, mesh, 2 * self.kv.num_pages[0] * self.page_bytes, form)
        self._pools = jax.device_put(_random_pools(self.kv), pool_formats(self.kv, mesh))

    def trip(self, tokens: int) -> tuple[float, float]:
        """Seconds until the pages of ``tokens`` are in host memory, and until they are back in the pool."""
        pages = range(-(-tokens // PAGE))
        out = self._run([PageMove(0, (Tier.HBM, i), (Tier.HOST, i)) for i in pages])
        back = self._run([PageMove(0, (Tier.HOST, i), (Tier.HBM, i), last=True) for i in pages])
        assert not self._tiers.bytes_held(), "pages were left on the host"
        return out, back

    def _run(self, moves: list[PageMove]) -> float:
        start = time.perf_counter()
        self._pools = self._tiers.apply(self._pools, StepPlan(0, moves=tuple(moves)))
        jax.block_until_ready((self._pools, list(self._tiers.host.values())))
        return time.perf_counter() - start


def _random_pools(kv: KVSpec) -> Pools:
    platform = jax.default_backend()
    pools = zero_pools(kv, platform)

    def fill(number: int, pool: jax.Array) -> jax.Array:
        return as_storage(jax.random.normal(jax.random.key(number), pool.shape, "bfloat16"), pool.dtype)

    return (tuple(jax.jit(fill, static_argnums=0, donate_argnums=1)(i, pool) for i, pool in enumerate(pools[0])),)


def swap_seconds(group: KVGroup, lengths: Sequence[int], codec: str, repeat: int) -> list[dict[str, float]]:
    """Medians for each length: tokens, bytes moved one way, out_s, in_s."""
    swapper = Swapper(group, max(lengths), codec)
    rows: list[dict[str, float]] = []
    for tokens in lengths:
        swapper.trip(tokens)
        trips = [swapper.trip(tokens) for _ in range(repeat)]
        out, back = (statistics.median(column) for column in zip(*trips))
        rows.append({"tokens": tokens, "bytes": -(-tokens // PAGE) * swapper.page_bytes, "out_s": out, "in_s": back})
    return rows


class Compute(NamedTuple):
    """Seconds to compute, as measured. ``factor``: layers of the model over layers that ran, still to be multiplied with."""

    prefill: dict[int, float]  # by tokens
    decode: float  # of one step of one sequence after the longest prompt
    factor: float


def prefill_once(engine: Engine, tokens: int, seed: int, answer: int) -> tuple[dict[int, float], float]:
    """Seconds from the arrival of one new prompt to the end of each of its steps, by tokens computed, and seconds per step of
    an ``answer`` (tokens, the first comes with the prompt). For an engine without overlap and without a prefix cache."""
    rng = random.Random(seed)
    prompt = [rng.randrange(2, engine.vocab_size) for _ in range(tokens)]
    before, done = engine.metrics.computed_tokens, {0: 0.0}
    start = time.perf_counter()
    engine.add_request(f"{tokens} {seed}", prompt, SamplingParams(temperature=0.0, max_tokens=answer, ignore_eos=True))
    while max(done) < tokens:
        engine.step()
        done[engine.metrics.computed_tokens - before] = time.perf_counter() - start
    start = time.perf_counter()
    while engine.has_work:
        engine.step()
    return done, (time.perf_counter() - start) / max(1, answer - 1)


def compute_seconds(engine: Engine, lengths: Sequence[int], answer: int, repeat: int, factor: float) -> Compute:
    """Medians over ``repeat`` prompts of each length. With a ``factor`` the longest prompt runs once, and shorter ones are the
    beginnings of it, which end with a step."""
    if factor > 1.0:
        done, decode = prefill_once(engine, max(lengths), 0, answer)
        return Compute({n: done[n] for n in lengths}, decode, factor)
    times, decodes = {}, []
    for tokens in lengths:
        prefill_once(engine, tokens, -1, 1)
        runs = [prefill_once(engine, tokens, seed, answer if tokens == max(lengths) else 1) for seed in range(repeat)]
        times[tokens] = statistics.median(done[tokens] for done, _ in runs)
        decodes = [decode for _, decode in runs]
    return Compute(times, statistics.median(decodes), factor)


def break_even(lengths: Sequence[int], swap: Sequence[float], compute: Sequence[float]) -> float | None:
    """Tokens from which on moving is quicker than computing, linear between the lengths measured: 0 if it always is, None if
    it is not at the longest. Lengths ascend; seconds."""
    gain = [c - s for s, c in zip(swap, compute, strict=True)]
    last = max((i for i, g in enumerate(gain) if g < 0), default=-1)
    if last < 0:
        return 0.0
    if last + 1 == len(gain):
        return None
    (a, b), (x, y) = lengths[last : last + 2], gain[last : last + 2]
    return a + (b - a) * -x / (y - x)
