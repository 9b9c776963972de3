"""The kernels on a real GPU, at real head counts, against the float64 oracle: what interpret mode cannot show.

    JAXKV_TEST_PLATFORM=gpu python -m pytest -m gpu tests/pallas_kernels      (bench.kernels runs this first)
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk
from pallas_kernels.layout import from_storage

from .paged import check, make_case, oracle, oracle_mass

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(jax.default_backend() != "gpu", reason="no GPU in this process")]

LENGTHS = {
    "decode": ([1] * 9, [1, 17, 64, 300, 1029, 4096, 33, 700, 128]),
    "mixed": ([1, 200, 0, 4, 64, 1], [900, 200, 0, 77, 1100, 5]),
    "chunks": ([257, 130], [257, 1500]),
}


@functools.partial(jax.jit, static_argnames=("window", "soft_cap", "impl", "max_q_len", "return_mass"))
def attend(q, pool, table, kv_lens, cu, plan=None, sinks=None, **static):
    return pk.ragged_paged_attention(q, pool, table, kv_lens, cu, plan=plan, sinks=sinks, layout="head_major", scale=0.1,
                                     return_lse=True, **static)


def run(case, impl, page_size, **options):
    q, pool, *rest = case.args
    pool = from_storage(pool)  # the CPU form of bfloat16 is its bits
    decode = 1 if max(np.diff(case.cu_q_lens)) == 1 else None
    planner = pk.attention_planner(
        impl, tokens=q.shape[0], seqs=len(case.kv_lens), q_heads=q.shape[1], kv_heads=pool.shape[2], head_dim=q.shape[2],
        page_size=page_size, kv_dtype=pool.dtype.name, max_q_len=decode)
    plan = planner(np.diff(case.cu_q_lens), case.kv_lens, case.page_table, options.get("window"))
    return attend(q, pool, *rest, plan=jnp.asarray(plan), impl=impl, max_q_len=decode, **options)


@pytest.mark.parametrize("impl", ["mosaic_gpu", "xla"])
@pytest.mark.parametrize("options", [{}, {"window": 200}, {"soft_cap": 20.0}], ids=str)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("head_dim, page_size", [(64, 16), (128, 16), (128, 64), (256, 16)])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_attention(lengths, head_dim, page_size, dtype, options, impl):
    case = make_case(*LENGTHS[lengths], heads=(32, 8), head_dim=head_dim, page_size=page_size, dtype=dtype,
                     window=options.get("window"))
    first, again = run(case, impl, page_size, **options), run(case, impl, page_size, **options)
    check(case, first, scale=0.1, **options)
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)


def test_decodes_that_share_a_prefix():
    case = make_case([1] * 24, [1040 + i for i in range(24)], heads=(32, 8), head_dim=128, dtype="bfloat16", shared=1024,
                     sharers=tuple(range(24)))
    check(case, run(case, "mosaic_gpu", 16), scale=0.1)


def test_mass():
    case = make_case(*LENGTHS["decode"], heads=(32, 8), head_dim=128, dtype="bfloat16")
    *result, mass = run(case, "mosaic_gpu", 16, return_mass="token")
    check(case, result, scale=0.1)
    want = oracle_mass(case, oracle(case, scale=0.1)[1], scale=0.1)
    np.testing.assert_allclose(mass, want, atol=2e-3)


def test_page_copies():
    case = make_case(*LENGTHS["decode"], heads=(32, 8), head_dim=128, dtype="bfloat16")
    pools = [from_storage(jnp.nan_to_num(jnp.asarray(case.pool)))] * 3
    pages = jnp.array([3, 0, 7, 5], jnp.int32)
    data = pk.gather_pages(pools, pages, layout="head_major", impl="mosaic_gpu")
    np.testing.assert_array_equal(np.asarray(data), np.asarray(pk.gather_pages(pools, pages, layout="head_major", impl="ref")))
    empty = [jnp.zeros_like(p) for p in pools]
    got = pk.scatter_pages(empty, pages[::-1], data, layout="head_major", impl="mosaic_gpu")
    want = pk.scatter_pages(empty, pages[::-1], data, layout="head_major", impl="ref")
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
