"""Paged batches as device arrays, and our attention over them as candidates to time.

Decode is only a test of memory if the keys come from memory: a case holds several `layers` (pools of their own, called one
after the other in one program, as a model does) and several `turns` (page tables over other pages of the same pools), so that
together they exceed the last-level cache. Within a program each call's output is the next one's queries: none can be dropped
or run beside another, and the device is not left waiting for the host.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels as pk
from bench.roofline import QUANTISED, attention_work, token_bytes
from bench.timing import Candidate
from pallas_kernels.arg_specs import BatchSpec, HeadSpec
from pallas_kernels.layout import Pool, QuantPool, as_storage, storage_dtype, take_heads
from pallas_kernels.quant import quantize_rows
from pallas_kernels.ragged_paged_attention.api import IMPLEMENTATIONS

LAYOUT = "head_major"  # what the fast kernels read
CACHE_BYTES = {"cpu": 0, "gpu": 256 << 20, "tpu": 256 << 20}  # that the turns of a decode exceed
MOST_TURNS = 32
OWN_DATA = 61  # pages of random numbers, repeated over the pool
TOLERANCE = {"float32": 1e-4, "bfloat16": 6e-2, "float16": 1e-2}  # of a row's root mean square


class Case(NamedTuple):
    """q: [T, Hq, D]; pools: one per layer; tables: [turns, S, P]; the rest as in `ragged_paged_attention`."""

    shape: str
    batch: BatchSpec
    heads: HeadSpec
    kv_dtype: str
    page_size: int
    q: jax.Array
    pools: tuple[Pool, ...]
    tables: jax.Array
    kv_lens: jax.Array
    cu_q_lens: jax.Array

    @property
    def calls(self) -> int:
        """Attention calls in one run: one per layer and turn."""
        return len(self.pools) * len(self.tables)

    @property
    def scale(self) -> float:
        return self.heads.head_dim**-0.5

    @property
    def uniform(self) -> bool:
        """Whether all sequences are alike, so that a peer may take them as one dense batch."""
        return len(set(zip(self.batch.q_lens, self.batch.kv_lens))) == 1


def make_case(
    shape: str, batch: BatchSpec, heads: HeadSpec, *, platform: str, dtype: str, kv_dtype: str, page_size: int = 16,
    layers: int = 1, seed: int = 0,
) -> Case:
    """Arrays for one shape; every table entry names a real page, in random order."""
    common = batch.shared // page_size
    own = [-(-kv // page_size) - common for kv in batch.kv_lens]
    need, width = common + sum(own), common + max(own)
    decode = max(batch.q_lens) == 1
    size = layers * attention_work(batch, heads, kv_dtype).bytes
    turns = min(MOST_TURNS, -(-CACHE_BYTES[platform] // size)) if decode and CACHE_BYTES[platform] else 1
    pages = np.random.default_rng(seed).permutation(turns * need).astype(np.int32).reshape(turns, need)
    tables = np.zeros((turns, len(own), width), np.int32)
    tables[:, :, :common] = pages[:, None, :common]
    starts = common + np.cumsum([0, *own])
    for s, (first, last) in enumerate(itertools.pairwise(starts)):
        tables[:, s, common : common + last - first] = pages[:, first:last]
    q = jax.random.normal(jax.random.key(seed), (sum(batch.q_lens), heads.q_heads, heads.head_dim), dtype)
    pools = tuple(_pool(turns * need, page_size, heads, kv_dtype, platform, seed + 1 + i) for i in range(layers))
    return Case(shape, batch, heads, kv_dtype, page_size, q, pools, jnp.asarray(tables), jnp.asarray(batch.kv_lens, jnp.int32),
                jnp.asarray([0, *itertools.accumulate(batch.q_lens)], jnp.int32))


def _pool(pages: int, page_size: int, heads: HeadSpec, kv_dtype: str, platform: str, seed: int) -> Pool:
    """Normal numbers, made without a temporary of the pool's size."""
    stored = storage_dtype(kv_dtype, platform)

    def fill() -> Pool:
        rows = jax.random.normal(jax.random.key(seed), pk.pool_shape(
            LAYOUT, min(pages, OWN_DATA), page_size, heads.kv_heads, heads.head_dim), jnp.float32)
        part: Pool = as_storage(rows, stored)
        if kv_dtype in QUANTISED:
            values, scales = quantize_rows(rows, kv_dtype)
            part = QuantPool(as_storage(values, stored), scales)
        return jax.tree.map(lambda x: x[jnp.arange(pages) % x.shape[0]], part)

    return jax.jit(fill)()


def dense(case: Case, turn: int, layer: int) -> tuple[jax.Array, jax.Array]:
    """Contiguous keys and values [S, Hkv, longest, D] of one turn and layer, in the pool's logical dtype."""
    longest = max(case.batch.kv_lens)
    return tuple(x[:, :, :longest] for x in take_heads(case.pools[layer], case.tables[turn], LAYOUT))


def dense_bytes(case: Case) -> int:
    """Of all of them together."""
    return case.calls * len(case.batch.kv_lens) * max(case.batch.kv_lens) * token_bytes(case.heads, case.kv_dtype)


def plan_for(impl: str, case: Case) -> jax.Array | None:
    """What the host works out before a step for implementation `impl`; not part of the time, as it is once per step."""
    heads = case.heads
    planner = pk.attention_planner(impl, tokens=case.q.shape[0], seqs=len(case.batch.kv_lens), q_heads=heads.q_heads,
                                   kv_heads=heads.kv_heads, head_dim=heads.head_dim, page_size=case.page_size,
                                   kv_dtype=case.kv_dtype, max_q_len=max(case.batch.q_lens))
    if not planner.size:
        return None
    return jnp.asarray(planner(np.asarray(case.batch.q_lens), np.asarray(case.batch.kv_lens), np.asarray(case.tables[0])))


def attention(case: Case, impl: str, mass: str | None = None, *, check: bool = True) -> tuple[Candidate, jax.Array | None]:
    """Our attention as a candidate, and the output [T, Hq, D] of its first call; without `check` perhaps None, which saves
    the compiling of that call where a run has several turns. RuntimeError: with the reason, if the implementation is not there
    or does not serve the call."""
    if impl not in IMPLEMENTATIONS:
        raise RuntimeError(f"not registered: {impl} is none of {', '.join(IMPLEMENTATIONS)}")
    try:
        plan = plan_for(impl, case)
        rest = (case.kv_lens, case.cu_q_lens, plan)
        call = jax.jit(lambda *a: _run(case, impl, mass, *a), compiler_options=pk.compiler_options(jax.default_backend()))
        run = Candidate(lambda: call(case.q, case.pools, case.tables, *rest), jax.block_until_ready, case.calls)
        first = run.wait(run.run())[2]
        if first is None and check:
            first = call(case.q, case.pools, case.tables[:1], *rest)[2].block_until_ready()
    except Exception as error:  # whatever stops a kernel on this machine is a result
        raise RuntimeError(reason(error)) from error
    return run, first


def _run(case: Case, impl: str, mass: str | None, q, pools, tables, kv_lens, cu_q_lens, plan) -> tuple[jax.Array, tuple, Any]:
    """The output of the last call, the masses of the last turn, and the output of the first call if there is one turn."""

    def turn(carry: tuple[jax.Array, tuple], table: jax.Array) -> tuple[tuple[jax.Array, tuple], jax.Array | None]:
        q, masses, outs = carry[0], [], []
        for pool in pools:
            q = pk.ragged_paged_attention(q, pool, table, kv_lens, cu_q_lens, layout=LAYOUT, scale=case.scale, plan=plan,
                                          max_q_len=max(case.batch.q_lens), impl=impl, return_mass=mass)
            if mass:
                q, weights = q
                masses.append(weights)
            outs.append(q)
        return (q, tuple(masses)), outs[0] if len(tables) == 1 else None

    if len(tables) == 1:
        (out, masses), first = turn((q, ()), tables[0])
        return out, masses, first
    empty = jnp.zeros((tables.shape[1], case.heads.kv_heads, tables.shape[2]), jnp.float32)
    return *jax.lax.scan(turn, (q, (empty,) * len(pools) if mass else ()), tables)[0], None


def difference(out: Any, want: Any) -> float:
    """The largest error of a row (token, head) of [T, Hq, D], in units of the root mean square of the wanted row."""
    out, want = (np.asarray(x).astype(np.float32) for x in (out, want))
    size = np.sqrt(np.mean(np.square(want), axis=-1, keepdims=True))
    error = np.max(np.abs(out - want) / np.maximum(size, 1e-30))
    return float(error) if np.isfinite(error) else float("inf")


def reason(error: BaseException) -> str:
    """Why something was refused or failed, in one line."""
    if isinstance(error, BaseExceptionGroup):
        return reason(error.exceptions[0])
    line = (str(error).strip().splitlines() or [""])[0][:160]
    return f"refused: {line}" if isinstance(error, NotImplementedError) else f"failed: {type(error).__name__}: {line}"
