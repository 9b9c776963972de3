"""The TPU attention kernel, interpreted: against the definition, with NaN wherever it must not look, and without races."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.layout import QuantPool
from pallas_kernels.ragged_paged_attention import ref
from pallas_kernels.ragged_paged_attention.mosaic_tpu import ragged_paged_attention
from pallas_kernels.ragged_paged_attention.params import AttentionParams

from .paged import TOLERANCE, check, check_nan, make_case, quantised, with_nan

MIXED = ([1, 20, 0, 1, 40, 3], [5, 300, 9, 1, 40, 77])
SCALE = 0.3


def tpu_args(case, quant=None, layout="head_major"):
    """The head_major case as the TPU stores it: bfloat16 as such; quantised, with NaN or a number where nothing was written."""
    q, pool, *rest = case.args
    pool = pool if pool.dtype == q.dtype else jax.lax.bitcast_convert_type(pool, q.dtype)
    pool = quantised(pool, quant) if quant else pool
    if layout == "paired":
        values, *scales = jax.tree.leaves(pool)
        values = jnp.concatenate([values[:, :1], values[:, 1:]], axis=-1)
        pool = QuantPool(values, *scales) if quant else values
    return q, pool, *rest


def params(window=None, soft_cap=None, max_q_len=None, mass=None, layout="head_major", scale=SCALE):
    return AttentionParams(layout, scale, window, soft_cap, max_q_len, mass)


def definition(args, sinks, static):
    return jax.jit(lambda *a: ref.ragged_paged_attention(*a, None, params=static))(*args, sinks)


def run(args, sinks, static):
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)):
        call = jax.jit(lambda *a: ragged_paged_attention(*a, None, params=static))
        result = jax.block_until_ready(call(*args, sinks))
    assert not interpret_pallas_call.races.races_found
    return result


def sinks_of(heads):
    return jnp.linspace(-1.0, 1.5, heads, dtype=jnp.float32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("page_size,heads,head_dim,layout", [
    (16, (4, 2), 80, "head_major"), (64, (7, 1), 64, "head_major"), (256, (3, 3), 128, "head_major"),
    (32, (2, 2), 96, "head_major"), (48, (32, 2), 16, "paired"), (16, (4, 2), 64, "paired")])
def test_mixed_batch_against_the_oracle(dtype, page_size, heads, head_dim, layout):
    case = make_case(*MIXED, page_size=page_size, heads=heads, head_dim=head_dim, dtype=dtype)
    out, lse, mass = run(tpu_args(case, layout=layout), None, params(scale=head_dim**-0.5, layout=layout))
    check(case, (out, lse), scale=head_dim**-0.5)
    assert mass is None


@pytest.mark.parametrize("options", [
    dict(window=1), dict(window=30, soft_cap=4.0, sinks=True), dict(soft_cap=0.5), dict(sinks=True)], ids=str)
def test_options_against_the_oracle(options):
    sinks = sinks_of(6) if options.pop("sinks", False) else None
    case = make_case(*MIXED, heads=(6, 2), window=options.get("window"))
    out, lse, _ = run(tpu_args(case), sinks, params(**options))
    check(case, (out, lse), scale=SCALE, sinks=None if sinks is None else np.asarray(sinks), **options)


def test_a_chunk_of_several_tiles_over_several_blocks():
    case = make_case([150, 1, 70], [700, 600, 70], heads=(4, 1))
    check(case, run(tpu_args(case), None, params())[:2], scale=SCALE)


def test_decodes_alone_take_one_kernel():
    case = make_case([1] * 5, [1, 16, 17, 200, 600])
    static = params(max_q_len=1)
    check(case, run(tpu_args(case), None, static)[:2], scale=SCALE)
    text = str(jax.make_jaxpr(lambda *a: ragged_paged_attention(*a, None, None, params=static))(*tpu_args(case)))
    assert text.count("pallas_call") == 1


def test_an_empty_batch_is_padding():
    case = make_case([0, 0], [0, 40], tokens=3)
    out, lse, mass = run(tpu_args(case), sinks_of(4), params(mass="token"))
    assert not np.asarray(out).any() and (np.asarray(lse) == -np.inf).all() and not np.asarray(mass).any()


@pytest.mark.parametrize("quant,page_size,head_dim,layout", [
    ("int8", 16, 96, "head_major"), ("int8", 128, 8, "head_major"), ("float8_e4m3fn", 32, 80, "head_major"),
    ("int8", 16, 64, "paired"), ("float8_e4m3fn", 64, 32, "paired")])
def test_quantised_pools_against_the_definition(quant, page_size, head_dim, layout):
    case = make_case(*MIXED, page_size=page_size, heads=(6, 2), head_dim=head_dim, window=25)
    args, sinks = tpu_args(case, quant, layout), sinks_of(6)
    static = params(window=25, mass="token", layout=layout, scale=head_dim**-0.5)
    same(run(args, sinks, static), definition(args, sinks, static), case)


@pytest.mark.parametrize("part", [0, 1], ids=["key", "value"])
@pytest.mark.parametrize("quant,layout", [(None, "head_major"), ("int8", "head_major"), ("float8_e4m3fn", "paired")])
def test_a_visible_nan_comes_out(quant, layout, part):
    case = with_nan(make_case([1, 3, 20], [33, 40, 50], heads=(2, 1), head_dim=16), 1, part)
    check_nan(case, run(tpu_args(case, quant, layout), None, params(layout=layout))[:2], seq=1, part=part)


@pytest.mark.parametrize("mass,layout", [("page", "head_major"), ("token", "head_major"), ("token", "paired")])
@pytest.mark.parametrize("options", [dict(), dict(window=30, soft_cap=4.0)], ids=["plain", "window"])
def test_mass_against_the_definition(mass, layout, options):
    case = make_case(*MIXED, heads=(6, 2), window=options.get("window"))
    args, sinks, static = tpu_args(case, layout=layout), sinks_of(6), params(mass=mass, layout=layout, **options)
    same(run(args, sinks, static), definition(args, sinks, static), case)


@pytest.mark.parametrize("page_size", [48, 96])
def test_mass_of_pages_that_do_not_divide_128_keys(page_size):
    case = make_case([1, 20, 150], [5, 500, 400], page_size=page_size, heads=(2, 1))
    args, static = tpu_args(case), params(mass="token")
    same(run(args, None, static), definition(args, None, static), case)


def test_mass_without_sinks_counts_the_queries():
    case = make_case(*MIXED, heads=(6, 2))
    mass = run(tpu_args(case), None, params(mass="page"))[2]
    queries = np.asarray(case.cu_q_lens[1:] - case.cu_q_lens[:-1])
    np.testing.assert_allclose(mass.sum(axis=2), np.repeat(queries[:, None] * 3.0, 2, axis=1), rtol=1e-5)


@settings(max_examples=4)
@given(st.lists(st.tuples(st.integers(0, 37), st.integers(0, 90)), min_size=1, max_size=5), st.sampled_from([None, 1, 33]),
       st.integers(0, 99))
def test_random_batches(lengths, window, seed):
    q_lens, kv_lens = [q for q, _ in lengths], [q + more for q, more in lengths]
    case = make_case(q_lens, kv_lens, window=window, seed=seed)
    args, static = tpu_args(case), params(window=window, mass="token")
    same(run(args, None, static), definition(args, None, static), case)


def test_twice_the_same_bits():
    args = tpu_args(make_case(*MIXED, dtype="bfloat16"))
    a, b = (run(args, None, params(mass="page")) for _ in range(2))
    for x, y in zip(a, b):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("reason,change", [
    ("head_major", dict(layout="token_major")), ("float16", dict(dtype="float16")), ("page size", dict(page_size=8)),
    ("uint16", dict(bits=True))])
def test_what_the_kernel_cannot_do_it_refuses(reason, change):
    bits, layout = change.pop("bits", False), change.get("layout", "head_major")
    case = make_case([3], [9], **change | dict(dtype="bfloat16" if bits else change.get("dtype", "float32")))
    args = case.args if bits else tpu_args(case)
    with pytest.raises(NotImplementedError, match=reason):
        ragged_paged_attention(*args, None, None, params=params(layout=layout))


def test_mass_refuses_blocks_that_vmem_does_not_hold():
    case = make_case([3], [9], page_size=1008, heads=(2, 2), head_dim=128)
    with pytest.raises(NotImplementedError, match="8064 of page size 1008 take 8257536 bytes"):
        jax.eval_shape(lambda *a: ragged_paged_attention(*a, None, None, params=params(mass="page")), *tpu_args(case))


def same(got, want, case):
    tolerance = TOLERANCE[case.q.dtype.name]
    np.testing.assert_allclose(*(np.asarray(x[0], np.float32) for x in (got, want)), atol=tolerance, rtol=tolerance)
    np.testing.assert_allclose(got[1], want[1], atol=2e-5, rtol=2e-6)
    np.testing.assert_allclose(got[2], want[2], atol=3e-5, rtol=1e-5)
