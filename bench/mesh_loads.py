"""Pages from host memory to the pools of an N-way mesh: each device its own heads, or each its own pages and then a reshard.

    python -m bench.mesh_loads                    2 and 4 devices (virtual ones on CPU)

heads: what the engine does. A page is stored in N parts, each device loads its heads of every page over its own link, and
scatters them; nothing crosses the mesh. pages: a page is stored whole, device i loads every N-th page of the batch over its own
link, then the mesh goes from pages to heads (an all-to-all) and scatters. Both move the same bytes over every link; "heads"
in N times as many transfers, "pages" moves (N - 1) / N of the bytes once more between devices. Timed by turns: until all is in
device memory ("load"), and until it is in the pools ("total").
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

import pallas_kernels as pk
from bench.report import add_json, write
from jaxkv.device.spec import KVSpec
from jaxkv.device.state import Pools, pool_formats, zero_pools
from jaxkv.runtime.page_ops import BATCHES, PageForm, compile_page_ops
from jaxkv.runtime.startup import make_mesh
from jaxkv.types import KVGroup
from pallas_kernels.arg_specs import MODELS

PAGES = (16, 64)  # of a batch, of a fetch
PAGE, BATCH = 16, BATCHES[-1]
Arrays = list[jax.Array]


class Case:
    """Random pages of one model on both kinds of host memory layout, and a pool for them on ``devices``."""

    def __init__(self, model: str, dtype: str, devices: int) -> None:
        heads = MODELS[model]
        self.mesh = make_mesh(devices)
        group = KVGroup(tuple(range(heads.layers)), heads.kv_heads, heads.head_dim, dtype)
        self.kv = KVSpec((group,), (max(PAGES),), PAGE,
                         pk.resolve_layout("auto", group.head_dim, jax.default_backend()))
        form = PageForm(self.kv, self.mesh)
        self.page_bytes = form.bytes[0]
        rng = np.random.default_rng(0)
        pages = [rng.standard_normal(form.shapes[0][0], np.float32).astype(form.shapes[0][1]) for _ in range(max(PAGES))]
        self._mine = list(self.mesh.devices.flat)
        self._by_head = form.sharding()
        self._whole = [SingleDeviceSharding(self._mine[i % devices]) for i in range(max(PAGES))]
        self._on_host = {"heads": jax.device_put(pages, form.sharding("pinned_host")),
                         "pages": [jax.device_put(page, sharding.with_memory_kind("pinned_host"))
                                   for page, sharding in zip(pages, self._whole)]}
        self._scatter = compile_page_ops(self.kv, self.mesh, form)[0, "scatter", BATCH]
        self._reshard = self._compile_reshard(form)
        self._stack = jax.jit(lambda *pages: jnp.stack(pages))

    def _compile_reshard(self, form: PageForm) -> Callable[..., Any]:
        """pools, page numbers [16], pages [16, L, 2, ps, Hkv, C] split over the batch -> pools."""
        mesh_ops = pk.MeshOps(self.mesh, self.kv.layout)
        return jax.jit(lambda pools, ids, data: mesh_ops.scatter_pages(pools, ids, data), donate_argnums=0,
                       out_shardings=pool_formats(self.kv, self.mesh)[0])

    def pools(self) -> Pools:
        return jax.device_put(zero_pools(self.kv, jax.default_backend()), pool_formats(self.kv, self.mesh))

    def load(self, way: str, count: int) -> Arrays:
        """The first ``count`` pages, on their way into device memory."""
        pages = self._on_host[way][:count]
        return jax.device_put(pages, self._by_head if way == "heads" else self._whole[:count])

    def place(self, way: str, pools: tuple, pages: Arrays) -> tuple:
        """Loaded pages into the pool's pages of the same numbers."""
        for at in range(0, len(pages), BATCH):
            ids, batch = np.arange(at, at + BATCH, dtype=np.int32), pages[at:at + BATCH]
            if way == "heads":
                pools = self._scatter(pools, ids, *batch)
                continue
            count = len(self._mine)
            parts = [self._stack(*batch[i::count]) for i in range(count)]
            ids = ids.reshape(-1, count).T.reshape(-1)  # in the order of the parts
            shape, split = (BATCH, *batch[0].shape), NamedSharding(self.mesh, PartitionSpec("tp"))
            pools = self._reshard(pools, ids, jax.make_array_from_single_device_arrays(shape, split, parts))
        return pools


def measure(case: Case, count: int, repeat: int) -> dict[str, Any]:
    """Median milliseconds of both ways by turns; AssertionError if they do not leave the same pools."""
    pools = {way: case.pools()[0] for way in ("heads", "pages")}
    times: dict[str, list[tuple[float, float]]] = {way: [] for way in pools}
    for _ in range(repeat + 1):
        for way in pools:
            start = time.perf_counter()
            pages = jax.block_until_ready(case.load(way, count))
            loaded = time.perf_counter()
            pools[way] = jax.block_until_ready(case.place(way, pools[way], pages))
            times[way].append((loaded - start, time.perf_counter() - start))
    assert all(bool((a == b).all()) for a, b in zip(pools["heads"], pools["pages"])), "the two ways differ"
    out: dict[str, Any] = {"pages": count, "bytes": count * case.page_bytes}
    for way, samples in times.items():
        out |= {f"{way}_{kind}_ms": 1e3 * statistics.median(column)
                for kind, column in zip(("load", "total"), zip(*samples[1:]))}
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", default="2,4")
    parser.add_argument("--models", default="peers-small,llama-3-8b", help="whose pages, with commas")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--repeat", type=int, default=9)
    add_json(parser)
    args = parser.parse_args()
    wanted = [int(n) for n in args.devices.split(",")]
    jax.config.update("jax_num_cpu_devices", max(wanted))
    rows = []
    print("| devices | pages of | MiB | heads: load ms | total ms | pages: load ms | total ms | pages / heads |")
    print("|--:|---|--:|--:|--:|--:|--:|--:|")
    for devices in (n for n in wanted if n <= len(jax.devices())):
        for model in args.models.split(","):
            case = Case(model, args.dtype, devices)
            for count in PAGES:
                r = {"devices": devices, "model": model, **measure(case, count, args.repeat)}
                rows.append(r)
                print(f"| {devices} | {model} x {count} | {r['bytes'] / 2**20:.1f} | {r['heads_load_ms']:.2f} | "
                      f"{r['heads_total_ms']:.2f} | {r['pages_load_ms']:.2f} | {r['pages_total_ms']:.2f} | "
                      f"{r['pages_total_ms'] / r['heads_total_ms']:.2f} |", flush=True)
    write(args.json, {"dtype": args.dtype, "rows": rows})


if __name__ == "__main__":
    main()
