"""Attention of others on the same keys and values, in the same run. A peer that is not there says why.

All but FlashInfer and JAX's paged_attention read dense keys and values, contiguous per sequence: an advantage for them, as no
page table stands in between. Equal sequences are handed over as one batch (another), ragged ones one by one. What a peer can
prepare once (masks, repeated heads, plans, contiguous queries) it prepares before the clock starts.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bench.kernel_cases import Case, dense, dense_bytes
from bench.timing import Candidate
from pallas_kernels.layout import QuantPool

MOST_DENSE = 8 << 30  # bytes of keys and values copied for a peer


class Prepared(NamedTuple):
    """A peer ready to run a case; `first` gives the output [T, Hq, D] of the first layer and turn."""

    candidate: Candidate
    first: Callable[[], Any]


class Peer(NamedTuple):
    """prepare: NotImplementedError with the reason if it does not serve a case. absent: why it cannot run at all, or None."""

    name: str
    prepare: Callable[[Case], Prepared]
    absent: str | None


def peers(platform: str) -> list[Peer]:
    """All that are known, on the JAX platform "cpu", "gpu" or "tpu"."""
    from bench.torch_peers import flashinfer, flex, sdpa

    gpu = None if platform == "gpu" else f"runs on GPU only, this is {platform}"
    torch = _importable("torch")
    if torch is None and platform == "gpu" and not importlib.import_module("torch").cuda.is_available():
        torch = "torch was built without CUDA"
    found = [Peer(f"torch sdpa {how}", functools.partial(sdpa, how=how, platform=platform), torch)
             for how in ("gqa", "grouped", "repeated")]
    return found + [
        Peer("torch flex", flex, gpu or torch),
        Peer("flashinfer", flashinfer, gpu or torch or _importable("flashinfer")),
        Peer("jax paged_attention", jax_paged, gpu or _importable("jax.experimental.pallas.ops.gpu.paged_attention")),
        Peer("cudnn", cudnn, gpu),
    ]


def _importable(module: str) -> str | None:
    try:
        importlib.import_module(module)
    except Exception as error:  # a package that is there but broken is as absent as one that is not
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return None


def plain(case: Case) -> None:
    """NotImplementedError for what no dense peer serves."""
    if isinstance(case.pools[0], QuantPool):
        raise NotImplementedError("quantised KV")
    if dense_bytes(case) > MOST_DENSE:
        raise NotImplementedError(f"{dense_bytes(case) / 1e9:.0f} GB of dense keys and values")


def turns_and_layers(case: Case) -> list[tuple[int, int]]:
    return [(turn, layer) for turn in range(len(case.tables)) for layer in range(len(case.pools))]


def jax_paged(case: Case) -> Prepared:
    """JAX's own decode kernel (Pallas on Triton), which scales no scores: the queries are scaled beforehand."""
    from jax.experimental.pallas.ops.gpu.paged_attention import paged_attention

    plain(case)
    if max(case.batch.q_lens) > 1:
        raise NotImplementedError("decode only")
    pages = case.tables.shape[2]
    splits = next(n for n in (16, 8, 4, 2, 1) if pages % (8 * n) == 0 or n == 1)
    block = next(n for n in (8, 4, 2, 1) if pages // splits % n == 0)
    pools = [tuple(jnp.swapaxes(pool[:, kv], 0, 1) for kv in (0, 1)) for pool in case.pools]  # [Hkv, N, ps, D]

    @jax.jit
    def run(q, pools, tables, kv_lens):
        def turn(q, table):
            for k, v in pools:
                q = paged_attention(q * np.asarray(case.scale, q.dtype), k, v, table, kv_lens, k_splits=splits,
                                    pages_per_compute_block=block)
            return q, None

        return jax.lax.scan(turn, q, tables)[0]

    return Prepared(
        Candidate(lambda: run(case.q, pools, case.tables, case.kv_lens), jax.block_until_ready, case.calls),
        lambda: run(case.q, pools[:1], case.tables[:1], case.kv_lens))


def cudnn(case: Case) -> Prepared:
    """cuDNN's attention through jax.nn, on a dense batch of equal sequences."""
    plain(case)
    q_len, kv_len = case.batch.q_lens[0], case.batch.kv_lens[0]
    if not case.uniform or q_len not in (1, kv_len):
        raise NotImplementedError("ragged lengths, or a chunk behind a cache")
    q = case.q.reshape(-1, q_len, *case.q.shape[1:])
    kv = [tuple(jnp.swapaxes(x, 1, 2) for x in dense(case, *at)) for at in turns_and_layers(case)]  # [S, kv, Hkv, D]
    call = jax.jit(functools.partial(jax.nn.dot_product_attention, scale=case.scale, is_causal=q_len > 1,
                                     implementation="cudnn"))

    def run() -> list[jax.Array]:
        return [call(q, k, v) for k, v in kv]

    return Prepared(Candidate(run, jax.block_until_ready, case.calls), lambda: call(q, *kv[0]).reshape(case.q.shape))
