"""Page moves: canonical form in and out of every layout, copies within pools, re-rotation of keys."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk

from .paged import CPU_IMPLS, to_pool

L, N, PS, HKV, D = 2, 7, 3, 2, 8
impls = pytest.mark.parametrize("impl", CPU_IMPLS)
layouts = pytest.mark.parametrize("layout", pk.LAYOUTS)
dtypes = pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
i32 = lambda *x: jnp.array(x, jnp.int32)  # noqa: E731


def canonical(dtype="float32", seed=0):
    """[L, N, 2, ps, Hkv, D]"""
    return np.random.default_rng(seed).normal(size=(L, N, 2, PS, HKV, D)).astype(jnp.dtype(dtype))


def pools_of(pages, layout):
    return tuple(jnp.asarray(to_pool(p, layout)) for p in pages)


def same(pools, pages, layout):
    for pool, want in zip(pools, pages, strict=True):
        np.testing.assert_array_equal(np.asarray(pool), to_pool(want, layout))


@impls
@layouts
@dtypes
def test_gather_and_scatter(impl, layout, dtype):
    pages, other = canonical(dtype), canonical(dtype, seed=1)
    data = pk.gather_pages(pools_of(pages, layout), i32(4, 0, 4, 99), layout=layout, impl=impl)
    assert data.shape == (4, L, 2, PS, HKV, D) and data.dtype == dtype
    np.testing.assert_array_equal(np.asarray(data[:3]), pages[:, [4, 0, 4]].swapaxes(0, 1))
    got = pk.scatter_pages(pools_of(other, layout), i32(2, 6, N, -1), data, layout=layout, impl=impl)
    other[:, [2, 6]] = pages[:, [4, 0]]
    same(got, other, layout)


@impls
@layouts
@dtypes
def test_copy_reads_before_it_writes(impl, layout, dtype):
    pages = canonical(dtype)
    got = pk.copy_pages(pools_of(pages, layout), i32(1, 2, 3, 5), i32(2, 1, N, -3), layout=layout, impl=impl)
    pages[:, [2, 1]] = pages[:, [1, 2]]
    same(got, pages, layout)


def rotate(x, positions, inv_freq):
    """RoPE as in HF Llama, float64: x [ps, Hkv, D], positions [ps]."""
    half = len(inv_freq)
    angle = np.multiply.outer(positions, inv_freq)[:, None, :]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle), rest], axis=-1)


@impls
@layouts
@pytest.mark.parametrize("rotary_dim", [D, D // 2])
@pytest.mark.parametrize("dtype, tolerance", [("float32", 2e-5), ("bfloat16", 3e-2), ("float16", 4e-3)])
def test_copy_rotates_keys_by_a_position_delta(impl, layout, rotary_dim, dtype, tolerance):
    inv_freq = 10000.0 ** (-np.arange(rotary_dim // 2) / (rotary_dim // 2))
    pages = canonical("float64")
    start, delta, src, dst = [40, 11], [25, -11], [1, 3], [0, 6]
    stored = pages.copy()
    for page, first in zip(src, start, strict=True):
        for layer in range(L):
            stored[layer, page, 0] = rotate(pages[layer, page, 0], first + np.arange(PS), inv_freq)
    stored = stored.astype(jnp.dtype(dtype))
    got = pk.copy_pages(pools_of(stored, layout), i32(*src), i32(*dst), layout=layout, impl=impl,
                        position_delta=i32(*delta), rotate=jnp.asarray(inv_freq, jnp.float32))
    out = np.asarray(pk.gather_pages(got, i32(*dst), layout=layout)).astype(np.float64)
    for i, page in enumerate(src):
        for layer in range(L):
            want = rotate(pages[layer, page, 0], start[i] + delta[i] + np.arange(PS), inv_freq)
            np.testing.assert_allclose(out[i, layer, 0], want, atol=tolerance)
            np.testing.assert_array_equal(out[i, layer, 1], stored[layer, page, 1].astype(np.float64))


@layouts
@dtypes
def test_donated_pools_are_written_in_place(layout, dtype, as_shipped):
    pool = jax.ShapeDtypeStruct(pk.pool_shape(layout, 2000, 16, 2, 16), pk.storage_dtype(dtype, "cpu"))
    size = 2 * np.prod(pool.shape) * pool.dtype.itemsize
    index = jax.ShapeDtypeStruct((4,), jnp.int32)
    data = jax.ShapeDtypeStruct((4, 2, 2, 16, 2, 16), jnp.dtype(dtype))
    copy = jax.jit(lambda p, s, d: pk.copy_pages(p, s, d, layout=layout), donate_argnums=0)
    scatter = jax.jit(lambda p, i, x: pk.scatter_pages(p, i, x, layout=layout), donate_argnums=0)
    for compiled in (copy.lower((pool, pool), index, index).compile(),
                     scatter.lower((pool, pool), index, data).compile()):
        memory = compiled.memory_analysis()
        assert memory.temp_size_in_bytes < size / 32 and memory.alias_size_in_bytes == size


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda p: pk.gather_pages((), i32(1), layout="head_major"), "pools is empty"),
        (lambda p: pk.gather_pages((p[0], p[1][:3]), i32(1), layout="head_major"), r"alike.*\(3, 2, 2, 3, 8\)"),
        (lambda p: pk.gather_pages(p, jnp.zeros(2), layout="head_major"), "pages must be int32"),
        (lambda p: pk.scatter_pages(p, i32(1), jnp.zeros((1, 1)), layout="head_major"), r"\(1, 2, 2, 3, 2, 8\).*\(1, 1\)"),
        (lambda p: pk.copy_pages(p, i32(1), i32(1, 2), layout="head_major"), r"\(1,\) and \(2,\)"),
        (lambda p: pk.copy_pages(p, i32(1), i32(2), layout="head_major", position_delta=i32(1)), "go together"),
        (lambda p: pk.copy_pages(p, i32(1), i32(2), layout="head_major", position_delta=i32(1), rotate=jnp.zeros(5)),
         r"head_dim / 2 = 4.*\(5,\)"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call(pools_of(canonical(), "head_major"))
