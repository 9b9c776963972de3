"""Executes what a plan does to pages: between the HBM pools and host memory, within the pools, to and from the disk.

Owns the host tier's arrays and the exact count of the bytes it holds. Decides nothing: the CacheController says which
page goes where and in which order. A host page is one pinned_host array (``page_ops.PageForm``), so that dropping a page
frees exactly its bytes. Every transfer is enqueued in program order on the engine thread; nothing here waits for the
device unless host memory would exceed its size.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator

import jax
import numpy as np
from jax.sharding import Mesh

import pallas_kernels as ops
from jaxkv.device.spec import KVSpec
from jaxkv.device.state import Pools
from jaxkv.runtime.disk import DiskStore
from jaxkv.runtime.fetches import Fetches, key_bytes
from jaxkv.runtime.page_ops import BATCHES, PageForm, compile_page_ops, padded
from jaxkv.types import PageKey, PageMove, StepPlan, Tier

log = logging.getLogger("jaxkv")


class Tiers:
    """``apply`` runs the transfers of a plan on the pools and returns the new pools. ``check``: ValueError for a page outside
    its pool, instead of what the kernels make of it."""

    def __init__(self, kv: KVSpec, mesh: Mesh, host_bytes: int, form: PageForm, disk: DiskStore | None = None,
                 impl: str = "auto", check: bool = False) -> None:
        self.host: dict[tuple[int, int], jax.Array] = {}  # (group, host page) -> page
        self.host_bytes = host_bytes
        self.host_lost = False  # memory ran out: pages demoted since then do not exist
        self.disk = disk
        self._kv, self._check = kv, check
        self._on_device = form.sharding()
        self._on_host = form.sharding("pinned_host") if host_bytes or disk else None
        self._page_bytes = form.bytes
        self._held = 0
        self._copies: dict[tuple[int, int], jax.Array] = {}  # latest device copy of a host page that stayed
        self._leaving: deque[tuple[jax.Array, jax.Array, int]] = deque()  # (host page, what reads it, bytes) under way
        self._saving: dict[int, list[jax.Array]] = {}  # index into the plan's saves -> its pages by group so far
        self.fetches = Fetches(form.bytes, self._on_device, disk)
        self.ops = compile_page_ops(kv, mesh, form, impl)
        self.bytes_moved = {(a, b): 0 for a in Tier for b in Tier}

    def bytes_held(self) -> int:
        """Bytes of host memory that the tier uses, pages under way to the device included."""
        while self._leaving and self._leaving[0][1].is_ready():  # type: ignore[attr-defined]  # mypy: jax's stub lacks it
            self._held -= self._leaving.popleft()[2]
        return self._held

    def disk_staging_bytes(self) -> int:
        """Bytes of host memory with pages on their way to or from the disk: at most two fetches and the writer's queue."""
        return self.fetches.host_bytes_held() + (self.disk.queued_bytes if self.disk else 0)

    def keep(self, pages: Collection[tuple[int, int]]) -> None:
        """Forget every transfer under way and all host pages but these."""
        self.host = {at: page for at, page in self.host.items() if at in pages}
        self._held = sum(self._page_bytes[g] for g, _ in self.host)
        self._copies.clear()
        self._leaving.clear()
        self._saving.clear()
        self.fetches.clear()
        try:
            jax.block_until_ready(list(self.host.values()))
        except jax.errors.JaxRuntimeError as error:  # the move that made one failed
            log.error("a page of the host KV tier never came (%s): going on without the tier", str(error).partition("\n")[0])
            self.host_lost = True

    def clear(self) -> None:
        """Forget everything."""
        self.keep(())
        self.host_lost = False
        self.bytes_moved = dict.fromkeys(self.bytes_moved, 0)

    def apply(self, pools: Pools, plan: StepPlan) -> Pools:
        """Runs the plan's landings, then its moves in order, neighbours of one kind as one batch, then starts its fetches."""
        groups = list(pools)
        for fetch_id, wanted in plan.landings:
            for moves, pages in self.fetches.land(fetch_id, wanted):
                for at in range(0, len(moves), BATCHES[-1]):
                    self._land(groups, moves[at:at + BATCHES[-1]], pages[at:at + BATCHES[-1]])
        for batch in _batches(self._wanted(plan)):
            self._move(groups, batch)
        self._save(plan.saves)
        for fetch in plan.fetches:
            self.fetches.start(fetch, self.host)
        return tuple(groups)

    def _move(self, groups: list, batch: list[PageMove]) -> None:
        g, src, dst = _kind(batch[0])
        if dst is None:
            self._drop(g, batch)
            return
        self.bytes_moved[src, dst] += len(batch) * self._page_bytes[g]
        if dst == Tier.HOST:
            self._demote(g, groups[g], batch)
        elif dst == Tier.DISK:
            self._collect(g, groups[g], src, batch)
        elif src == Tier.HOST:
            groups[g] = self._promote(g, groups[g], batch)
        else:
            sources = self._ids(g, batch, [m.src[1] for m in batch])
            groups[g] = self._op(g, "copy", batch)(groups[g], sources, self._targets(g, batch))

    def _land(self, groups: list, moves: list[PageMove], pages: list[jax.Array]) -> None:
        g, src, _ = _kind(moves[0])
        self.bytes_moved[src, Tier.HBM] += len(moves) * self._page_bytes[g]
        for m, page in zip(moves, pages):
            if m.last:
                self._leaving.append((self.host.pop((g, m.src[1])), page, self._page_bytes[g]))
                self._copies.pop((g, m.src[1]), None)
        groups[g] = self._scatter(g, groups[g], moves, pages)

    def _scatter(self, g: int, pools: tuple[ops.Pool, ...], moves: list[PageMove], pages: list[jax.Array]) -> tuple:
        data = pages + pages[:1] * (padded(len(moves)) - len(moves))
        return self._op(g, "scatter", moves)(pools, self._targets(g, moves), *data)

    # ---- to the disk

    def _wanted(self, plan: StepPlan) -> Iterator[PageMove]:
        """The moves without those to a disk that has the page."""
        disk = self.disk
        known = {i for i, key in enumerate(plan.saves) if disk is not None and disk.match([bytes.fromhex(key.digest)])}
        return (m for m in plan.moves if not (m.dst and m.dst[0] == Tier.DISK and m.dst[1] in known))

    def _collect(self, g: int, pools: tuple[ops.Pool, ...], src: Tier, moves: list[PageMove]) -> None:
        if src == Tier.HOST:
            pages = [self.host[g, m.src[1]] for m in moves]
        else:
            gathered = self._op(g, "gather", moves)(pools, self._ids(g, moves, [m.src[1] for m in moves]))
            pages = self._to_host(gathered, len(moves))
        for number, page in zip(_destinations(moves), pages):
            self._saving.setdefault(number, []).append(page)

    def _save(self, saves: tuple[PageKey, ...]) -> None:
        """Hand complete pages to the disk tier's writer, which waits for their transfers and may refuse them."""
        for number, pages in self._saving.items():
            assert self.disk is not None
            self.disk.put(*key_bytes(saves[number]), tuple(pages))
        self._saving.clear()

    # ---- to and from the host

    def _demote(self, g: int, pools: tuple[ops.Pool, ...], moves: list[PageMove]) -> None:
        need = len(moves) * self._page_bytes[g]
        while self._leaving and self.bytes_held() + need > self.host_bytes:
            self._leaving[0][1].block_until_ready()
        assert self._held + need <= self.host_bytes, "host tier would exceed its size"
        gathered = self._op(g, "gather", moves)(pools, self._ids(g, moves, [m.src[1] for m in moves]))
        try:
            pages = self._to_host(gathered, len(moves))
        except (jax.errors.JaxRuntimeError, MemoryError) as error:
            log.error("host memory ran out (%s): going on without the host KV tier", str(error).partition("\n")[0])
            self.host_lost = True
            return
        self.host.update(zip([(g, number) for number in _destinations(moves)], pages))
        self._held += need

    def _to_host(self, gathered: tuple[jax.Array, ...], count: int) -> list[jax.Array]:
        return jax.device_put(list(gathered[:count]), self._on_host)

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
        return self._scatter(g, pools, moves, copies)

    def _drop(self, g: int, moves: list[PageMove]) -> None:
        for m in moves:  # a transfer from or into the page may still be under way
            page = self.host.pop((g, m.src[1]), None)
            if page is None:  # it never came: see host_lost
                continue
            self._leaving.append((page, self._copies.pop((g, m.src[1]), page), self._page_bytes[g]))

    def _op(self, g: int, name: str, moves: list[PageMove]) -> Callable:
        return self.ops[g, name, padded(len(moves))]

    def _targets(self, g: int, moves: list[PageMove]) -> np.ndarray:
        return self._ids(g, moves, _destinations(moves))

    def _ids(self, g: int, moves: list[PageMove], pages: list[int]) -> np.ndarray:
        """Page numbers of a pool, padded to the batch size with one that no pool has."""
        most = self._kv.num_pages[g]
        if self._check and (bad := [page for page in pages if not 0 <= page < most]):
            raise ValueError(f"a page to move must be in [0, {most}) in group {g}, got {bad[0]}")
        return np.array(pages + [most] * (padded(len(moves)) - len(moves)), np.int32)


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
