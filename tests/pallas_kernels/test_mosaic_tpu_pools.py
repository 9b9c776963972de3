"""The TPU kernels that write and move pages, interpreted: the same bits as the definitions, and no races."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import zero_pool
from pallas_kernels.kv_write import mosaic_tpu as kv_write
from pallas_kernels.kv_write import ref as kv_write_ref
from pallas_kernels.page_copy import mosaic_tpu as page_copy
from pallas_kernels.page_copy import ref as page_copy_ref

DTYPES = ["float32", "bfloat16", "int8", "float8_e4m3fn"]
SCATTERED = [3, 17, 5, -1, 95, 33, 96, 70, 71, -2**31, 2**31 - 1, 0]


def random_pool(dtype, layout="head_major", page_size=16, pages=6, seed=0, head_dim=8):
    rng = np.random.default_rng(seed)
    pool = zero_pool(layout, pages, page_size, 2, head_dim, dtype, "tpu")
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) * 3).astype(x.dtype), pool)


def interpreted(op, *args, **kwargs):
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)):
        result = jax.block_until_ready(jax.jit(lambda *a: op(*a, **kwargs))(*args))
    assert not interpret_pallas_call.races.races_found
    return result


def same_bits(got, want):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8))


def ints(*values):
    return jnp.asarray(values, jnp.int32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("slots,page_size", [
    (SCATTERED, 16), (list(range(10, 60)) + [-3], 16), (np.random.default_rng(1).permutation(96)[:40], 32), ([-1, 400], 16)],
    ids=["scattered", "chunk", "shuffled", "padding"])
def test_write(dtype, slots, page_size):
    check_write(dtype, slots, page_size)


@pytest.mark.parametrize("dtype,layout,head_dim", [
    ("bfloat16", "paired", 64), ("int8", "paired", 64), ("float32", "head_major", 80), ("float8_e4m3fn", "head_major", 96)])
def test_write_rows_that_are_no_whole_tiles(dtype, layout, head_dim):
    check_write(dtype, SCATTERED, 16, layout, head_dim)


def check_write(dtype, slots, page_size, layout="head_major", head_dim=8):
    rng = np.random.default_rng(2)
    pool = random_pool(dtype, layout, page_size, 96 // page_size, head_dim=head_dim)
    k, v = (jnp.asarray(rng.normal(size=(len(slots), 2, head_dim)), jnp.bfloat16) for _ in range(2))
    got = interpreted(kv_write.kv_write, pool, k, v, ints(*slots), layout=layout)
    want = jax.jit(lambda *a: kv_write_ref.kv_write(*a, layout=layout))(pool, k, v, ints(*slots))
    same_bits(got, want)


def test_write_leaves_nan_beside_what_it_writes():
    pool = jnp.full((3, 2, 2, 16, 8), jnp.nan, jnp.bfloat16)
    rows = jnp.ones((2, 2, 8), jnp.bfloat16)
    got = np.asarray(interpreted(kv_write.kv_write, pool, rows, rows, ints(17, 40), layout="head_major").astype(jnp.float32))
    written = np.isfinite(got)
    assert written.sum() == 2 * 2 * 2 * 8
    assert written[1, :, :, 1].all() and written[2, :, :, 8].all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout,head_dim", [("token_major", 96), ("head_major", 80), ("paired", 64)])
def test_gather_scatter_and_copy(dtype, layout, head_dim):
    pools = tuple(random_pool(dtype, layout, seed=i, head_dim=head_dim) for i in range(2))
    pages = ints(5, 0, 9, -1, 3)
    data = interpreted(page_copy.gather_pages, pools, pages, layout=layout)
    same_bits(data, page_copy_ref.gather_pages(pools, pages, layout=layout))
    to = ints(1, -1, 4, 77, 0)
    same_bits(interpreted(page_copy.scatter_pages, pools, to, data, layout=layout),
              page_copy_ref.scatter_pages(pools, to, data, layout=layout))
    src, dst = ints(0, 1, 2), ints(1, 5, -2)  # page 1 is read before it is written
    same_bits(interpreted(page_copy.copy_pages, pools, src, dst, layout=layout),
              page_copy_ref.copy_pages(pools, src, dst, layout=layout))


def test_copy_rotates_keys():
    pools = tuple(random_pool("float32", seed=i) for i in range(2))
    src, dst = ints(0, 1, 2), ints(1, 5, -2)
    options = dict(layout="head_major", position_delta=ints(4, 5, 0), rotate=jnp.asarray([0.5, 0.1, 0.01], jnp.float32))
    got = interpreted(page_copy.copy_pages, pools, src, dst, **options)
    want = page_copy_ref.copy_pages(pools, src, dst, **options)
    for a, b in zip(got, want):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("reason,change", [
    ("token_major", dict(layout="token_major")), ("float16", dict(dtype="float16")), ("page size", dict(page_size=8)),
    ("bytes", dict(dtype="float32", pages=1, head_dim=16384))])
def test_what_write_cannot_do_it_refuses(reason, change):
    pool = random_pool(**dict(dtype="bfloat16") | change)
    rows = jnp.ones((1, 2, pool.shape[-1]), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match=reason):
        kv_write.kv_write(pool, rows, rows, ints(0), layout=change.get("layout", "head_major"))


def test_page_moves_refuse_what_they_cannot_do():
    with pytest.raises(NotImplementedError, match="float16"):
        page_copy.gather_pages((random_pool("float16"),), ints(0), layout="head_major")
    with pytest.raises(NotImplementedError, match="at least one"):
        page_copy.gather_pages((random_pool("float32"),), jnp.zeros(0, jnp.int32), layout="head_major")
