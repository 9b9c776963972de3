"""Executes page moves: batches of pages between the HBM pools and host memory, and within the pools.

Owns the host tier's arrays and the exact count of the bytes it holds. Decides nothing: the CacheController says which
page goes where and in which order. A host page is one pinned_host array [L, 2, ps, Hkv, C] (canonical layout, sharded
like the pool), so that dropping a page frees exactly its bytes. Every transfer is enqueued in program order on the
engine thread; nothing here waits for the device unless host memory would exceed its size.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import pallas_kernels as ops
from jaxkv.device.spec import KVSpec
from jaxkv.device.state import Pools, page_sharding, pool_structs
from jaxkv.types import PageMove, Tier

BATCHES = (1, 4, 16)  # pages per transfer; each size compiles once per group and direction


class Tiers:
    """``apply`` runs a plan's moves on the pools and returns the new pools."""

    def __init__(self, kv: KVSpec, mesh: Mesh, host_bytes: int) -> None:
        self.host: dict[tuple[int, int], jax.Array] = {}  # (group, host page) -> canonical page
        self.host_bytes = host_bytes
        self._kv = kv
        self._on_device = page_sharding(mesh)
        self._on_host = page_sharding(mesh, "pinned_host") if host_bytes else None
        self._page_bytes = [g.page_bytes(kv.page_size) for g in kv.groups]
        self._held = 0
        self._copies: dict[tuple[int, int], jax.Array] = {}  # latest device copy of a host page that stayed
        self._leaving: deque[tuple[jax.Array, jax.Array, int]] = deque()  # (host page, what reads it, bytes) under way
        self.ops = _compile(kv, mesh)
        self.bytes_moved = {(a, b): 0 for a in Tier for b in Tier}

    def bytes_held(self) -> int:
        """Bytes of host memory in use, pages under way to the device included."""
        while self._leaving and self._leaving[0][1].is_ready():  # type: ignore[attr-defined]  # mypy: jax's stub lacks it
            self._held -= self._leaving.popleft()[2]
        return self._held

    def clear(self) -> None:
        """Forget every host page."""
        self.host.clear()
        self._copies.clear()
        self._leaving.clear()
        self._held = 0
        self.bytes_moved = dict.fromkeys(self.bytes_moved, 0)

    def apply(self, pools: Pools, moves: Iterable[PageMove]) -> Pools:
        """Runs ``moves`` in order, neighbours of one kind as one batch. A move to nowhere drops a host page."""
        groups = list(pools)
        for batch in _batches(moves):
            g, src, dst = _kind(batch[0])
            if dst is None:
                self._drop(g, batch)
                continue
            self.bytes_moved[src, dst] += len(batch) * self._page_bytes[g]
            if dst == Tier.HOST:
                self._demote(g, groups[g], batch)
            elif src == Tier.HOST:
                groups[g] = self._promote(g, groups[g], batch)
            else:
                sources = self._ids(g, batch, [m.src[1] for m in batch])
                groups[g] = self._op(g, "copy", batch)(groups[g], sources, self._targets(g, batch))
        return tuple(groups)

    def _demote(self, g: int, pools: tuple[ops.Pool, ...], moves: list[PageMove]) -> None:
        need = len(moves) * self._page_bytes[g]
        while self._leaving and self.bytes_held() + need > self.host_bytes:
            self._leaving[0][1].block_until_ready()
        assert self._held + need <= self.host_bytes, "host tier would exceed its size"
        pages = self._op(g, "gather", moves)(pools, self._ids(g, moves, [m.src[1] for m in moves]))
        for number, page in zip(_destinations(moves), jax.device_put(list(pages[: len(moves)]), self._on_host)):
            self.host[g, number] = page
        self._held += need

    def _promote(self, g: int, pools: tuple[ops.Pool, ...], moves: list[PageMove]) -> tuple[ops.Pool, ...]:
        pages = [self.host[g, m.src[1]] for m in moves]
        copies = jax.device_put(pages, self._on_device)
        for m, page, copy in zip(moves, pages, copies):
            if m.last:
                del self.host[g, m.src[1]]
                self._copies.pop((g, m.src[1]), None)
                self._leaving.append((page, copy, self._page_bytes[g]))
            else:
                self._copies[g, m.src[1]] = copy
        data = copies + copies[:1] * (_padded(len(moves)) - len(moves))
        return self._op(g, "scatter", moves)(pools, self._targets(g, moves), *data)

    def _drop(self, g: int, moves: list[PageMove]) -> None:
        for m in moves:  # a transfer from or into the page may still be under way
            page = self.host.pop((g, m.src[1]))
            self._leaving.append((page, self._copies.pop((g, m.src[1]), page), self._page_bytes[g]))

    def _op(self, g: int, name: str, moves: list[PageMove]) -> Callable:
        return self.ops[g, name, _padded(len(moves))]

    def _targets(self, g: int, moves: list[PageMove]) -> np.ndarray:
        return self._ids(g, moves, _destinations(moves))

    def _ids(self, g: int, moves: list[PageMove], pages: list[int]) -> np.ndarray:
        """Page numbers padded to the batch size with one that no pool has."""
        return np.array(pages + [self._kv.num_pages[g]] * (_padded(len(moves)) - len(moves)), np.int32)


def _destinations(moves: list[PageMove]) -> list[int]:
    return [m.dst[1] for m in moves if m.dst]


def _kind(move: PageMove) -> tuple[int, Tier, Tier | None]:
    return move.group, move.src[0], move.dst[0] if move.dst else None


def _batches(moves: Iterable[PageMove]) -> Iterator[list[PageMove]]:
    """Runs of one kind, at most a full batch each; groups share no page, so one comes after the other. A page that the
    batch has written already (given back and taken again within a plan) starts a new one."""
    batch: list[PageMove] = []
    written: set[tuple[Tier, int] | None] = set()
    for move in sorted(moves, key=lambda m: m.group):
        full = len(batch) == BATCHES[-1] or move.dst in written or move.src in written
        if batch and (full or _kind(move) != _kind(batch[0])):
            yield batch
            batch, written = [], set()
        batch.append(move)
        if move.dst is not None:
            written.add(move.dst)
    if batch:
        yield batch


def _padded(n: int) -> int:
    return next(size for size in BATCHES if size >= n)


def _compile(kv: KVSpec, mesh: Mesh) -> dict[tuple[int, str, int], Callable]:
    """(group, operation, batch size) -> executable; pools are donated where they change."""
    structs = pool_structs(kv, mesh)
    whole, page_at = NamedSharding(mesh, PartitionSpec()), page_sharding(mesh)
    mesh_ops = ops.MeshOps(mesh, kv.layout)
    out: dict[tuple[int, str, int], Callable] = {}
    for g, (group, pools) in enumerate(zip(kv.groups, structs)):
        width, dtype = ops.canonical_row(group.dtype, group.head_dim)
        page = jax.ShapeDtypeStruct((len(group.layers), 2, kv.page_size, group.kv_heads, width), dtype, sharding=page_at)
        pools_at = jax.tree.map(lambda x: x.sharding, pools)

        def gather(pools, pages):
            return tuple(mesh_ops.gather_pages(pools, pages))

        def scatter(pools, pages, *data):
            return mesh_ops.scatter_pages(pools, pages, jnp.stack(data))

        def copy(pools, src, dst):
            return mesh_ops.copy_pages(pools, src, dst)

        for n in BATCHES:
            ids = jax.ShapeDtypeStruct((n,), jnp.int32, sharding=whole)
            jobs = {"gather": (jax.jit(gather, out_shardings=(page_at,) * n), (ids,)),
                    "scatter": (jax.jit(scatter, donate_argnums=0, out_shardings=pools_at), (ids, *[page] * n)),
                    "copy": (jax.jit(copy, donate_argnums=0, out_shardings=pools_at), (ids, ids))}
            for name, (fn, args) in jobs.items():
                out[g, name, n] = fn.lower(pools, *args).compile()
    return out
