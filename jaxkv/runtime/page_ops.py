"""The executables that move pages, and the form pages have below HBM.

Owns that form: canonical pages [L, 2, ps, Hkv, C] of a group, or [Hkv, B] bytes if a lossy KV codec is on, which the
device encodes before a page leaves it and decodes when it comes back, so that every link moves the small form. Both are
sharded like the pool, over KV heads: each device moves its own part of a page over its own link.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import pallas_kernels as ops
from jaxkv.device.spec import KVSpec
from jaxkv.device.state import page_sharding, pool_formats, pool_structs
from jaxkv.runtime.disk.format import HEADS

BATCHES = (1, 4, 16)  # pages per call; each size compiles once per group and operation


class PageForm:
    """Shape, dtype and sharding of one page of each KV group below HBM. ValueError for a codec that KV or model refuse."""

    def __init__(self, kv: KVSpec, mesh: Mesh, codec: str = "exact") -> None:
        layers = sum(len(group.layers) for group in kv.groups)
        self.codecs = [ops.codec_spec(codec, layers, group.layers) for group in kv.groups]
        self.lossy = any(level != "exact" for spec in self.codecs for level in spec.levels)
        self.canonical: list[tuple[int, ...]] = []
        self.shapes: list[tuple[tuple[int, ...], jnp.dtype]] = []
        for group, spec in zip(kv.groups, self.codecs):
            width, dtype = ops.canonical_row(group.dtype, group.head_dim)
            page = (len(group.layers), 2, kv.page_size, group.kv_heads, width)
            encoded = ops.encoded_shape(spec, page, group.dtype)
            self.canonical.append(page)
            self.shapes.append((encoded, jnp.dtype("uint8")) if self.lossy else (page, jnp.dtype(dtype)))
        self.bytes = [math.prod(shape) * dtype.itemsize for shape, dtype in self.shapes]
        self._mesh = mesh

    def on_disk(self, copies: int) -> tuple[tuple[tuple[int, ...], str], ...]:
        """Shape and dtype by KV group where every KV head, of which there are ``copies`` here, stands once."""
        return tuple(((*shape[:HEADS], shape[HEADS] // copies, *shape[HEADS + 1:]), dtype.name)
                     for shape, dtype in self.shapes)

    def sharding(self, memory_kind: str | None = None) -> NamedSharding:
        if self.lossy:
            return NamedSharding(self._mesh, PartitionSpec("tp"), memory_kind=memory_kind)
        return page_sharding(self._mesh, memory_kind)


def padded(n: int) -> int:
    """The batch size that ``n`` pages take."""
    return next(size for size in BATCHES if size >= n)


def compile_page_ops(kv: KVSpec, mesh: Mesh, form: PageForm, impl: str = "auto") -> dict[tuple[int, str, int], Callable]:
    """(group, operation, batch size) -> executable; pools are donated where they change. ``impl``: whose kernels move the
    pages that they can move (the log says what runs), "auto" moves the others.

    "gather": pools, page numbers [n] -> n pages of ``form``; "scatter": pools, numbers, n pages -> pools; "copy": pools,
    sources, destinations -> pools.
    """
    out: dict[tuple[int, str, int], Callable] = {}
    whole, page_at = NamedSharding(mesh, PartitionSpec()), form.sharding()
    for g, (pools, pools_at) in enumerate(zip(pool_structs(kv, mesh), pool_formats(kv, mesh))):
        families = [_page_functions(kv, mesh, form, g, name) for name in dict.fromkeys((impl, "auto"))]
        page = jax.ShapeDtypeStruct(*form.shapes[g], sharding=page_at)
        for n in BATCHES:
            ids = jax.ShapeDtypeStruct((n,), jnp.int32, sharding=whole)
            jobs = {"gather": ((page_at,) * n, (), (ids,)), "scatter": (pools_at, (0,), (ids, *[page] * n)),
                    "copy": (pools_at, (0,), (ids, ids))}
            for name, (out_at, donated, args) in jobs.items():
                fns = [jax.jit(f[name], donate_argnums=donated, out_shardings=out_at) for f in families if name in f]
                out[g, name, n] = _lower_first(fns, pools, *args).compile()
    return out


def _lower_first(fns: list[Any], *args: Any) -> Any:
    """The first function that serves these arguments, lowered; the last one has to."""
    for fn in fns[:-1]:
        try:
            return fn.lower(*args)
        except* NotImplementedError:
            pass
    return fns[-1].lower(*args)


def _page_functions(kv: KVSpec, mesh: Mesh, form: PageForm, g: int, impl: str) -> dict[str, Callable]:
    """By operation, of those that ``impl`` has."""
    mesh_ops, spec = ops.MeshOps(mesh, kv.layout), form.codecs[g]

    def gather(pools: Any, pages: jax.Array) -> tuple:
        data = mesh_ops.gather_pages(pools, pages, impl=impl)
        return tuple(mesh_ops.encode_pages(spec, data) if form.lossy else data)

    def scatter(pools: Any, pages: jax.Array, *data: jax.Array) -> Any:
        stack = jnp.stack(data)
        if form.lossy:
            stack = mesh_ops.decode_pages(spec, stack, form.canonical[g], kv.groups[g].dtype)
        return mesh_ops.scatter_pages(pools, pages, stack, impl=impl)

    def copy(pools: Any, src: jax.Array, dst: jax.Array) -> Any:
        return mesh_ops.copy_pages(pools, src, dst, impl=impl)

    moves: dict[str, Callable] = {"gather": gather, "scatter": scatter, "copy": copy}
    return {name: fn for name, fn in moves.items() if impl == "auto" or impl in ops.PAGE_MOVE_IMPLEMENTATIONS[name]}
