"""The KV codec: bits kept or a bounded error, one encoding for every implementation and mesh, losses that do not add up."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding

import pallas_kernels as pk
from pallas_kernels.kv_codec.quant import dequantize, quantize

from .paged import CPU_IMPLS

DTYPES = ("float32", "bfloat16", "float16")
LARGEST = {"int8": 255, "int4": 15}
SHAPES = [(4, 2, 16, 2, 64), (3, 2, 5, 1, 80), (2, 2, 1, 4, 7), (1, 2, 7, 3, 1)]  # [L, 2, ps, Hkv, D]
impls = pytest.mark.parametrize("impl", CPU_IMPLS)
dtypes = pytest.mark.parametrize("dtype", DTYPES)
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


def pages_of(shape, dtype, n=2, seed=0):
    """[n, L, 2, ps, Hkv, D] with some channels and some tokens far larger than the rest."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, *shape)) * rng.choice([0.01, 1, 30], shape[-1]) * rng.choice([1, 5], (shape[2], 1, 1))
    return jnp.asarray(x + 0.5, dtype)


@partial(jax.jit, static_argnums=(0, 2))
def there_and_back(spec, pages, impl="auto"):
    """Encoded, and decoded again."""
    encoded = pk.encode_pages(spec, pages, impl=impl)
    return encoded, pk.decode_pages(spec, encoded, pages.shape[1:], pages.dtype, impl=impl)


def bound(pages, levels):
    """Largest error of every element, in float64: half a step of its group, and the rounding of the dtype and of float32."""
    x = np.asarray(pages).astype(np.float64)
    keys, values = x[:, :, :1], x[:, :, 1:]  # keys share a channel of a page, values a token of a head
    spread = np.concatenate([np.broadcast_to(np.ptp(part, axis, keepdims=True), part.shape)
                             for part, axis in ((keys, 3), (values, 5))], axis=2)
    largest = np.array([LARGEST.get(level, np.inf) for level in levels])[:, None, None, None, None]
    lossy = np.isfinite(largest)
    eps = float(jnp.finfo(pages.dtype).eps)
    return lossy * (spread / largest / 2 * (1 + 2**-14) + np.abs(x).max() * (eps / 2 + 2**-22) + 2.0**-125)


@shapes
@dtypes
@pytest.mark.parametrize("name", ["mixed", "every"])
def test_error_size_and_implementations(shape, dtype, name):
    levels = ",".join(("int4", "exact", "int8", "int4")[: shape[0]]) if name == "every" else name
    spec, pages = pk.codec_spec(levels, shape[0]), pages_of(shape, dtype)
    encoded, back = there_and_back(spec, pages)
    assert encoded.dtype == "uint8" and encoded.shape == (2, *pk.encoded_shape(spec, shape, dtype))
    assert encoded.nbytes == 2 * pk.encoded_bytes(spec, shape, dtype)
    assert back.shape == pages.shape and back.dtype == dtype
    error = np.abs(np.asarray(back).astype(np.float64) - np.asarray(pages).astype(np.float64))
    assert (error <= bound(pages, spec.levels)).all()
    for again in (there_and_back(spec, pages), there_and_back(spec, pages, "ref")):
        np.testing.assert_array_equal(encoded, again[0])
        np.testing.assert_array_equal(back, again[1])
    np.testing.assert_array_equal(there_and_back(spec, back)[1], back)


@impls
@pytest.mark.parametrize("dtype", [*DTYPES, "int8"])
def test_exact_keeps_every_bit(impl, dtype):
    size = 4 * jnp.dtype(dtype).itemsize
    bits = np.random.default_rng(0).integers(0, 256, (2, 3, 2, 5, 2, size), np.uint8)  # subnormals and all
    pages = bits.view(jnp.dtype(dtype))
    if dtype != "int8":
        pages[~(np.abs(pages) < np.inf)] = np.nan  # some copies of a signalling NaN quiet it
        pages[0, 0, 0, 0] = np.inf
    spec = pk.codec_spec("exact", 3)
    encoded = pk.encode_pages(spec, jnp.asarray(pages), impl=impl)
    np.testing.assert_array_equal(encoded, bits.transpose(0, 4, 1, 2, 3, 5).reshape(2, 2, -1))
    width = pages.shape[-1]
    logical, shape = ("float8_e4m3fn", (3, 2, 5, 2, width)) if dtype == "int8" else (dtype, pages.shape[1:])
    back = pk.decode_pages(spec, encoded, shape, logical, impl=impl)
    np.testing.assert_array_equal(np.asarray(back).view(np.uint8), bits)


@settings(max_examples=40)
@given(seed=st.integers(0, 999), dtype=st.sampled_from(DTYPES), level=st.sampled_from(list(LARGEST)),
       size=st.sampled_from([0.0, 1e-6, 1e-3, 1.0, 1e3]), offset=st.sampled_from([0.0, 1.0, -300.0, 2.0**14]))
def test_ends_are_exact_and_a_second_trip_changes_nothing(seed, dtype, level, size, offset):
    """Also where the spread is but a few units in the last place, and for constant groups."""
    x = np.random.default_rng(seed).normal(size=(6, 33)) * size + offset
    x = jnp.asarray(x, dtype)
    numbers, low, high = quantize(x, 1, LARGEST[level])
    once = dequantize(numbers, low, high, LARGEST[level])
    assert (once.min(1) == x.min(1)).all() and (once.max(1) == x.max(1)).all()
    assert int(numbers.max()) <= LARGEST[level]
    again, *ends = quantize(once, 1, LARGEST[level])
    np.testing.assert_array_equal(dequantize(again, *ends, LARGEST[level]), once)


@dtypes
@pytest.mark.parametrize("level", list(LARGEST))
def test_the_whole_range_of_a_dtype(dtype, level):
    """No difference of two numbers of the dtype overflows, and steps too small for float32 give an end."""
    top, tiny = float(jnp.finfo(dtype).max), float(jnp.finfo(dtype).tiny)
    rows = np.array([[top, -top, 0, top / 3], [top, top, top, top], [tiny, 0, tiny * 2, -tiny], [0, 0, 0, 0]])
    pages = jnp.asarray(rows[:, :, None] * np.ones(8), dtype).reshape(1, 2, 2, 2, 1, -1)  # [n, L, 2, ps, Hkv, D]
    spec = pk.codec_spec(level, 2)
    back = np.asarray(there_and_back(spec, pages)[1]).astype(np.float64)
    assert np.isfinite(back).all()
    assert (np.abs(back - np.asarray(pages).astype(np.float64)) <= bound(pages, spec.levels)).all()


@impls
def test_no_page_or_head_depends_on_another(impl):
    spec, pages = pk.codec_spec("mixed", 4), pages_of(SHAPES[0], "bfloat16", n=4)
    other = pages.at[1].set(7).at[:, :, :, :, 1].multiply(9)
    same, encoded = (np.asarray(there_and_back(spec, x, impl)[0])[[0, 2, 3], 0] for x in (pages, other))
    np.testing.assert_array_equal(same, encoded)


@pytest.mark.parametrize("n", [1, 2, 4])
@dtypes
def test_a_mesh_changes_no_bit(n, dtype):
    shape, spec = (4, 2, 5, 4, 16), pk.codec_spec("exact,int8,int4,int4", 4)
    pages = pages_of(shape, dtype)
    want, want_back = there_and_back(spec, pages)
    ops = pk.MeshOps(Mesh(np.array(jax.devices()[:n]), ("tp",)), "head_major")
    sharded = jax.device_put(pages, NamedSharding(ops.mesh, ops.page_spec))
    encoded = jax.jit(lambda x: ops.encode_pages(spec, x))(sharded)
    assert encoded.sharding.is_equivalent_to(NamedSharding(ops.mesh, ops.encoded_spec), 3)
    np.testing.assert_array_equal(encoded, want)
    back = jax.jit(lambda x: ops.decode_pages(spec, x, shape, dtype))(encoded)
    assert back.sharding.is_equivalent_to(sharded.sharding, 6)
    np.testing.assert_array_equal(back, want_back)


def test_names():
    assert pk.codec_spec("int8", 3).levels == ("int8",) * 3
    assert pk.codec_spec("mixed", 6).levels == ("int8", "int8", "int8", "int4", "int4", "int8")
    assert pk.codec_spec("mixed", 1).levels == ("int8",)
    assert pk.codec_spec("mixed", 4, layers=(0, 2)).levels == ("int8", "int4")  # of a KV group
    assert pk.codec_spec("int4,exact", 2).levels == ("int4", "exact")
    assert pk.codec_spec("exact,exact,int8", 3).runs() == [("exact", slice(0, 2)), ("int8", slice(2, 3))]


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: pk.codec_spec("int3", 2), "exact.*mixed.*'int3'"),
        (lambda: pk.codec_spec("int8,int8", 3), "3 of .*'int8,int8'"),
        (lambda: pk.CodecSpec(("mixed",)), r"\['mixed'\]"),
        (lambda: pk.CodecSpec(()), r"\(\)"),
        (lambda: pk.encode_pages(pk.codec_spec("int8", 2), jnp.zeros((1, 2, 2, 4, 1, 12), jnp.int8)), "quantised already"),
        (lambda: pk.encoded_bytes(pk.codec_spec("mixed", 2), (2, 2, 4, 1, 12), "float8_e4m3fn"), "quantised already"),
        (lambda: pk.encode_pages(pk.codec_spec("int8", 2), jnp.zeros((1, 3, 2, 4, 1, 8))), r"\[2, 2, ps.*\(3, 2, 4, 1, 8\)"),
        (lambda: pk.decode_pages(pk.codec_spec("int4", 2), jnp.zeros((1, 1, 9), jnp.uint8), (2, 2, 4, 1, 8), "float32"),
         r"\[n, 1, 256\].*\(1, 1, 9\)"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
