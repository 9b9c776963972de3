"""Quantised KV: error of a row, rows written one by one, pages that move as they are stored, nothing copied."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import pallas_kernels as pk
from pallas_kernels.quant import LARGEST, quantize_rows

from .paged import CPU_IMPLS

N, PS, HKV, D, T = 5, 4, 2, 8, 6
layouts = pytest.mark.parametrize("layout", pk.LAYOUTS)
dtypes = pytest.mark.parametrize("dtype", list(LARGEST))


def empty(layout, dtype, pages=N):
    return pk.zero_pool(layout, pages, PS, HKV, D, dtype, "cpu")


def canonical(pool, layout):
    """Every page in canonical form, from the pool."""
    return np.asarray(pk.gather_pages([pool], jnp.arange(pool.values.shape[0], dtype=jnp.int32), layout=layout))[:, 0]


def numbers(pages, dtype):
    """Canonical bytes [..., D + 4] as the numbers they stand for, in numpy."""
    values = np.ascontiguousarray(pages[..., :-4]).view(jnp.dtype(dtype)).astype(np.float32)
    return values * np.ascontiguousarray(pages[..., -4:]).view(np.float32)


@dtypes
@given(seed=st.integers(0, 99), size=st.sampled_from([1e-30, 1e-3, 1.0, 1e4]))
def test_error_of_a_row_is_bounded_by_its_largest_element(dtype, seed, size):
    x = np.random.default_rng(seed).normal(size=(7, D)).astype(np.float32) * np.float32(size)
    x[3] = 0
    values, scales = (np.asarray(y, np.float32) for y in quantize_rows(jnp.asarray(x), dtype))
    largest = np.abs(x).max(-1, keepdims=True)
    step = largest / 127 if dtype == "int8" else np.maximum(np.abs(x) / 8, largest / 448 / 512)  # 3 bits of mantissa
    assert (np.abs(values * scales[:, None] - x) <= step / 2 * 1.001 + 1e-37).all()
    assert (values[3] == 0).all() and scales[3] == 0


@pytest.mark.parametrize("impl", CPU_IMPLS)
@layouts
@dtypes
def test_rows_are_quantised_into_their_slots(impl, layout, dtype):
    k, v = np.random.default_rng(0).normal(size=(2, T, HKV, D)).astype(np.float32)
    slots = np.array([4, 14, N * PS, -1, 0, 2**31 - 1], np.int32)  # three of them are padding
    got = pk.kv_write(empty(layout, dtype), jnp.asarray(k), jnp.asarray(v), jnp.asarray(slots), layout=layout, impl=impl)
    want = np.zeros((N, 2, PS, HKV, D), np.float32)
    for i, slot in enumerate(slots):
        if 0 <= slot < N * PS:
            for j, x in enumerate((k, v)):
                q, s = quantize_rows(jnp.asarray(x[i]), dtype)
                want[slot // PS, j, slot % PS] = np.asarray(q, np.float32) * np.asarray(s)[:, None]
    np.testing.assert_array_equal(numbers(canonical(got, layout), dtype), want)


@pytest.mark.parametrize("impl", CPU_IMPLS)
@layouts
@dtypes
def test_pages_move_as_they_are_stored(impl, layout, dtype):
    rng = np.random.default_rng(1)
    k, v = rng.normal(size=(2, N * PS, HKV, D)).astype(np.float32)
    pool = pk.kv_write(empty(layout, dtype), jnp.asarray(k), jnp.asarray(v), jnp.arange(N * PS, dtype=jnp.int32), layout=layout)
    before = canonical(pool, layout)
    assert before.shape == (N, 2, PS, HKV, D + 4) and before.dtype == np.int8
    src, dst = jnp.array([3, 1, 2], jnp.int32), jnp.array([0, 4, N], jnp.int32)
    pages = pk.gather_pages([pool], src, layout=layout, impl=impl)
    other = pk.scatter_pages([empty(layout, dtype)], dst, pages, layout=layout, impl=impl)[0]
    np.testing.assert_array_equal(canonical(other, layout)[[0, 4]], before[[3, 1]])
    assert not canonical(other, layout)[[1, 2, 3]].any()
    copied = pk.copy_pages([pool], src, dst, layout=layout, impl=impl)[0]
    np.testing.assert_array_equal(canonical(copied, layout)[[0, 4, 1, 2, 3]], before[[3, 1, 1, 2, 3]])


@layouts
@dtypes
def test_donated_pools_are_written_in_place(layout, dtype, as_shipped):
    pool = jax.eval_shape(lambda: pk.zero_pool(layout, 4000, 16, 2, 16, dtype, "cpu"))
    size = sum(np.prod(x.shape) * x.dtype.itemsize for x in pool)
    row, index = jax.ShapeDtypeStruct((64, 2, 16), jnp.float32), jax.ShapeDtypeStruct((64,), jnp.int32)
    data = jax.ShapeDtypeStruct((64, 1, 2, 16, 2, 20), jnp.int8)
    write = jax.jit(lambda p, k, s: pk.kv_write(p, k, k, s, layout=layout), donate_argnums=0)
    scatter = jax.jit(lambda p, i, x: pk.scatter_pages([p], i, x, layout=layout), donate_argnums=0)
    copy = jax.jit(lambda p, i: pk.copy_pages([p], i, i, layout=layout), donate_argnums=0)
    for compiled in (write.lower(pool, row, index).compile(), scatter.lower(pool, index, data).compile(),
                     copy.lower(pool, index).compile()):
        memory = compiled.memory_analysis()
        assert memory.temp_size_in_bytes < size / 8 and memory.alias_size_in_bytes == size


def test_bad_pools():
    pool = empty("head_major", "int8")
    k = jnp.zeros((1, HKV, D))
    with pytest.raises(ValueError, match=r"scales must be float32 \(5, 2, 2, 4\)"):
        pk.kv_write(pool._replace(scales=pool.scales[:3]), k, k, jnp.zeros(1, jnp.int32), layout="head_major")
    with pytest.raises(ValueError, match="int8.*got float32"):
        pk.kv_write(pool._replace(values=pool.values.astype(jnp.float32)), k, k, jnp.zeros(1, jnp.int32), layout="head_major")
    with pytest.raises(ValueError, match="not quantised"):
        one = jnp.zeros(1, jnp.int32)
        pk.copy_pages([pool], one, one, layout="head_major", position_delta=one, rotate=jnp.zeros(2))
