"""The ops over meshes of 1, 2 and 4 devices give what one device gives, heads split and nothing copied."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding

import pallas_kernels as pk

from .paged import check, make_case

devices = pytest.mark.parametrize("n", [1, 2, 4])
layouts = pytest.mark.parametrize("layout", pk.LAYOUTS)


def ops_over(n, layout):
    return pk.MeshOps(Mesh(np.array(jax.devices()[:n]), ("tp",)), layout)


@devices
@layouts
def test_write_and_attend(n, layout):
    ops, case = ops_over(n, layout), make_case([1, 5, 3], [33, 5, 19], heads=(8, 4), layout=layout, dtype="bfloat16")
    q, pool, table, kv_lens, cu = case.args
    sinks = jnp.asarray(np.random.default_rng(0).normal(size=8), jnp.float32)
    slots = jnp.concatenate([table[s, p // 16][None] * 16 + p % 16 for s, p in ((0, 32), (2, 18))] + [jnp.array([10**6])])
    last = [jnp.asarray(np.stack([x[0][32], x[2][18], x[0][0]]), jnp.float32) for x in (case.keys, case.values)]
    pool = jax.device_put(pool, NamedSharding(ops.mesh, ops.pool_spec))

    @jax.jit
    def step(pool, q, k, v, sinks):
        pool = ops.kv_write(pool, k, v, slots.astype(jnp.int32))
        return pool, ops.ragged_paged_attention(q, pool, table, kv_lens, cu, sinks=sinks, scale=0.3, return_lse=True)

    new, result = step(pool, q, *last, sinks)
    assert new.sharding.is_equivalent_to(pool.sharding, 5)
    check(case, result, scale=0.3, sinks=np.asarray(sinks))


@devices
@layouts
def test_page_moves(n, layout):
    ops = ops_over(n, layout)
    data = jnp.asarray(np.random.default_rng(0).normal(size=(3, 2, 2, 3, 4, 8)), jnp.float32)
    sharding = NamedSharding(ops.mesh, ops.pool_spec)
    pools = tuple(jax.device_put(jnp.zeros(pk.pool_shape(layout, 6, 3, 4, 8)), sharding) for _ in range(2))
    index = lambda *x: jnp.array(x, jnp.int32)  # noqa: E731

    @jax.jit
    def moves(pools, data):
        pools = ops.scatter_pages(pools, index(5, 0, 2), data)
        plain = ops.copy_pages(pools, index(0), index(1))
        turned = ops.copy_pages(plain, index(5), index(3), position_delta=index(0), rotate=jnp.ones(4))
        return ops.gather_pages(turned, index(5, 1, 3, 2))

    np.testing.assert_allclose(moves(pools, data), data[np.array([0, 1, 0, 2])], atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_donated_shards_are_written_in_place(dtype, as_shipped):
    ops = ops_over(4, "head_major")
    shape = pk.pool_shape("head_major", 2000, 16, 4, 16)
    pool = jax.ShapeDtypeStruct(shape, pk.storage_dtype(dtype, "cpu"), sharding=NamedSharding(ops.mesh, ops.pool_spec))
    row = jax.ShapeDtypeStruct((64, 4, 16), jnp.float32)
    compiled = jax.jit(ops.kv_write, donate_argnums=0).lower(pool, row, row, jax.ShapeDtypeStruct((64,), jnp.int32)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < np.prod(shape) * pool.dtype.itemsize / 4 / 8


def test_heads_that_the_mesh_does_not_divide():
    ops = ops_over(4, "head_major")
    k = jnp.zeros((1, 2, 8))
    with pytest.raises(ValueError):
        ops.kv_write(jnp.zeros(pk.pool_shape("head_major", 6, 3, 2, 8)), k, k, jnp.zeros(1, jnp.int32))
