"""Writing KV rows: every implementation against plain indexing, and in place."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk

from .paged import CPU_IMPLS, to_pool

N, PS, HKV, D, T = 5, 3, 2, 4, 6
DTYPES = ("float32", "bfloat16", "float16")


@pytest.mark.parametrize("impl", CPU_IMPLS)
@pytest.mark.parametrize("layout", pk.LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_writes_rows_and_nothing_else(impl, layout, dtype):
    rng = np.random.default_rng(0)
    pages = rng.normal(size=(N, 2, PS, HKV, D)).astype(jnp.dtype(dtype))
    k, v = rng.normal(size=(2, T, HKV, D)).astype(np.float32)
    slots = np.array([4, 14, N * PS, -1, 0, 2**31 - 1], np.int32)  # three of them are padding
    got = pk.kv_write(jnp.asarray(to_pool(pages, layout)), k, v, jnp.asarray(slots), layout=layout, impl=impl)
    for i, slot in enumerate(slots):
        if 0 <= slot < N * PS:
            pages[slot // PS, 0, slot % PS], pages[slot // PS, 1, slot % PS] = k[i], v[i]
    np.testing.assert_array_equal(np.asarray(got), to_pool(pages, layout))


@pytest.mark.parametrize("layout", pk.LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_donated_pool_is_written_in_place(layout, dtype, as_shipped):
    pool = jax.ShapeDtypeStruct(pk.pool_shape(layout, 2000, 16, 2, 16), pk.storage_dtype(dtype, "cpu"))
    row = jax.ShapeDtypeStruct((64, 2, 16), jnp.float32)
    write = jax.jit(lambda p, k, v, s: pk.kv_write(p, k, v, s, layout=layout), donate_argnums=0)
    memory = write.lower(pool, row, row, jax.ShapeDtypeStruct((64,), jnp.int32)).compile().memory_analysis()
    size = np.prod(pool.shape) * pool.dtype.itemsize
    assert memory.temp_size_in_bytes < size / 16 and memory.alias_size_in_bytes == size


@pytest.mark.parametrize(
    "k, slots, message",
    [
        (jnp.zeros((T, HKV, D + 1)), jnp.zeros(T, jnp.int32), r"\(6, 2, 5\)"),
        (jnp.zeros((T, HKV, D)), jnp.zeros(T - 1, jnp.int32), r"int32 \[6\].*\(5,\)"),
        (jnp.zeros((T, HKV, D)), jnp.zeros(T), "slots must be int32"),
    ],
)
def test_bad_arguments(k, slots, message):
    with pytest.raises(ValueError, match=message):
        pk.kv_write(jnp.zeros(pk.pool_shape("head_major", N, PS, HKV, D)), k, k, slots, layout="head_major")
