"""Every op over a mesh: the one place where `shard_map` meets a kernel.

Heads are split over the mesh axis "tp"; page tables, lengths and slots are replicated, so no op communicates. A caller
with more devices than KV heads stores each KV head more than once (stored Hkv = tp) and replicates before it writes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from .kv_codec.api import decode_pages, encode_pages
from .kv_codec.spec import CodecSpec
from .kv_write.api import kv_write
from .layout import Pool, kv_head_axis
from .page_copy.api import copy_pages, gather_pages, scatter_pages
from .ragged_paged_attention.api import ragged_paged_attention

AXIS = "tp"


@dataclass(frozen=True)
class MeshOps:
    """The public ops bound to a mesh and a pool layout; same arguments otherwise. Call them inside jit.

    Global arrays in, global arrays out: pools sharded at `kv_head_axis`, q/k/v and sinks at their head axis. A mesh whose
    "tp" axis is 1 calls the op directly. ValueError: heads that "tp" does not divide.
    """

    mesh: Mesh
    layout: str

    @property
    def pool_spec(self) -> P:
        """PartitionSpec of a pool, and of the parts of a quantised one."""
        return P(*[None] * kv_head_axis(self.layout), AXIS)

    @property
    def page_spec(self) -> P:
        """PartitionSpec of canonical pages [n, L, 2, ps, Hkv, C]."""
        return P(None, None, None, None, AXIS)

    @property
    def encoded_spec(self) -> P:
        """PartitionSpec of encoded pages [n, Hkv, B]."""
        return P(None, AXIS)

    def kv_write(
        self, pool: Pool, k: jax.Array, v: jax.Array, slots: jax.Array, *, impl: str = "auto"
    ) -> Pool:
        """See `pallas_kernels.kv_write`."""
        op = lambda *a: kv_write(*a, layout=self.layout, impl=impl)  # noqa: E731
        rows = P(None, AXIS)
        return self._over(op, (self.pool_spec, rows, rows, P()), self.pool_spec)(pool, k, v, slots)

    def ragged_paged_attention(
        self,
        q: jax.Array,
        pool: Pool,
        page_table: jax.Array,
        kv_lens: jax.Array,
        cu_q_lens: jax.Array,
        *,
        sinks: jax.Array | None = None,
        plan: jax.Array | None = None,
        return_lse: bool = False,
        return_mass: str | None = None,
        **static: Any,
    ) -> jax.Array | tuple[jax.Array, ...]:
        """See `pallas_kernels.ragged_paged_attention`."""

        def op(q, pool, page_table, kv_lens, cu_q_lens, sinks, plan):
            return ragged_paged_attention(q, pool, page_table, kv_lens, cu_q_lens, sinks=sinks, plan=plan,
                                          layout=self.layout, return_lse=return_lse, return_mass=return_mass, **static)

        rows = P(None, AXIS)
        specs = (rows, self.pool_spec, P(), P(), P(), P(AXIS), P())
        out_specs = (rows,) + (rows,) * return_lse + (rows,) * (return_mass is not None)
        return self._over(op, specs, out_specs if len(out_specs) > 1 else rows)(
            q, pool, page_table, kv_lens, cu_q_lens, sinks, plan)

    def gather_pages(self, pools: Sequence[Pool], pages: jax.Array, *, impl: str = "auto") -> jax.Array:
        """See `pallas_kernels.gather_pages`."""
        op = lambda *a: gather_pages(*a, layout=self.layout, impl=impl)  # noqa: E731
        return self._over(op, (self.pool_spec, P()), self.page_spec)(tuple(pools), pages)

    def scatter_pages(
        self, pools: Sequence[Pool], pages: jax.Array, data: jax.Array, *, impl: str = "auto"
    ) -> tuple[Pool, ...]:
        """See `pallas_kernels.scatter_pages`."""
        op = lambda *a: scatter_pages(*a, layout=self.layout, impl=impl)  # noqa: E731
        return self._over(op, (self.pool_spec, P(), self.page_spec), self.pool_spec)(tuple(pools), pages, data)

    def copy_pages(
        self,
        pools: Sequence[Pool],
        src: jax.Array,
        dst: jax.Array,
        *,
        position_delta: jax.Array | None = None,
        rotate: jax.Array | None = None,
        impl: str = "auto",
    ) -> tuple[Pool, ...]:
        """See `pallas_kernels.copy_pages`."""

        def op(pools, src, dst, position_delta, rotate):
            return copy_pages(pools, src, dst, layout=self.layout, position_delta=position_delta, rotate=rotate, impl=impl)

        return self._over(op, (self.pool_spec, P(), P(), P(), P()), self.pool_spec)(
            tuple(pools), src, dst, position_delta, rotate)

    def encode_pages(self, spec: CodecSpec, pages: jax.Array, *, impl: str = "auto") -> jax.Array:
        """See `pallas_kernels.encode_pages`. Each device encodes its own heads."""
        op = lambda pages: encode_pages(spec, pages, impl=impl)  # noqa: E731
        return self._over(op, (self.page_spec,), self.encoded_spec)(pages)

    def decode_pages(
        self, spec: CodecSpec, encoded: jax.Array, page_shape: Sequence[int], dtype: DTypeLike, *, impl: str = "auto"
    ) -> jax.Array:
        """See `pallas_kernels.decode_pages`; `page_shape` counts the heads of all devices."""
        heads = page_shape[3] // self.mesh.shape[AXIS]
        local = (*page_shape[:3], heads, *page_shape[4:])
        op = lambda encoded: decode_pages(spec, encoded, local, dtype, impl=impl)  # noqa: E731
        return self._over(op, (self.encoded_spec,), self.page_spec)(encoded)

    def _over(self, op: Callable[..., Any], in_specs: tuple[P, ...], out_specs: Any) -> Callable[..., Any]:
        if self.mesh.shape[AXIS] == 1:
            return op
        return jax.shard_map(op, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
