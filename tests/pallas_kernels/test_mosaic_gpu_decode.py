"""The decode and merge kernels for Hopper in the GPU interpreter, on batches where whatever must not be read is NaN or garbage.

The interpreter has no register layouts, so those are left to tests that compile for the chip.
"""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("absl", reason="Mosaic GPU needs absl-py")

from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import get_races, reset_gpu_interpret_mode_state
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

from pallas_kernels.ragged_paged_attention import ref
from pallas_kernels.ragged_paged_attention.mosaic_gpu import entry, plan
from pallas_kernels.ragged_paged_attention.params import AttentionParams
from pallas_kernels.ragged_paged_attention.tuning import Chip

from .paged import TOLERANCE, check, check_nan, make_case, quantised, with_nan

SMALL = Chip("h100", 3, 232_448, 233_472)  # so few multiprocessors that sequences are cut and workers have several items


@pytest.fixture(autouse=True)
def clean_interpreter():
    jax.effects_barrier()  # the interpreter of a kernel under way would lose its barriers
    reset_gpu_interpret_mode_state()
    yield
    jax.effects_barrier()  # the interpreter of a kernel under way would lose its barriers
    reset_gpu_interpret_mode_state()


def params_of(**options):
    return AttentionParams(**dict(layout="head_major", scale=0.3, window=None, soft_cap=None, max_q_len=1, mass=None) | options)


def host_plan(case, params):
    q_lens, dims = np.diff(case.cu_q_lens), case.pool.shape
    spec = plan.plan_spec(case.q.shape[0], len(q_lens), q_heads=case.q.shape[1], kv_heads=dims[2], head_dim=dims[4],
                          page_size=dims[3], kv_dtype=case.q.dtype.name, max_q_len=params.max_q_len, chip=SMALL)
    return plan.make_plan(spec, q_lens, case.kv_lens, page_table=case.page_table, page_size=dims[3], window=params.window)


def attend(case, sinks=None, plan_of=host_plan, races=False, **options):
    params = params_of(**options)
    made = None if plan_of is None else jnp.asarray(plan_of(case, params))
    sinks = None if sinks is None else jnp.asarray(sinks)
    return entry.ragged_paged_attention(*case.args, sinks, made, params=params, chip=SMALL,
                                        interpret=InterpretGPUParams(detect_races=races))


@pytest.mark.parametrize(
    "shape, options",
    [
        (dict(q_lens=[1, 1, 0, 1], kv_lens=[33, 200, 0, 7], heads=(8, 2), head_dim=64, dtype="bfloat16"), dict()),
        (dict(q_lens=[1, 1], kv_lens=[33, 150], heads=(4, 1), head_dim=128, dtype="float16"), dict(window=50, soft_cap=2.0)),
        (dict(q_lens=[3, 1, 5], kv_lens=[40, 90, 5], heads=(6, 2), head_dim=64, dtype="float16"),
         dict(max_q_len=5, sinks=True)),
        (dict(q_lens=[2, 4], kv_lens=[20, 80], heads=(2, 2), head_dim=64, dtype="bfloat16"), dict(max_q_len=4, window=6)),
        (dict(q_lens=[1, 1], kv_lens=[70, 300], heads=(16, 1), head_dim=64, page_size=256, dtype="bfloat16"), dict(sinks=True)),
        (dict(q_lens=[1, 2], kv_lens=[70, 30], heads=(2, 2), head_dim=80, page_size=8, dtype="float16"), dict(max_q_len=2)),
        (dict(q_lens=[1, 1], kv_lens=[70, 30], heads=(2, 1), head_dim=256, page_size=64, dtype="bfloat16"), dict()),
    ],
    ids=lambda d: "-".join(f"{k}={d[k]}" for k in ("heads", "head_dim", "window", "max_q_len") if k in d) or "plain",
)
def test_decodes_and_drafts(shape, options):
    if options.get("sinks"):
        options = options | dict(sinks=np.random.default_rng(1).normal(size=shape["heads"][0]).astype(np.float32))
    case = make_case(**shape, window=options.get("window"))
    out, lse, mass = attend(case, races=True, **options)
    assert mass is None and not get_races().races_found
    check(case, (out, lse), scale=0.3, **{k: v for k, v in options.items() if k != "max_q_len"})


def test_a_shared_prefix_that_needs_two_tiles():
    case = make_case([1] * 20, [130 + i for i in range(20)], heads=(4, 1), head_dim=64, dtype="float16", shared=128,
                     sharers=tuple(range(1, 20)))
    params = params_of()
    made = host_plan(case, params)
    assert not np.array_equal(made, host_plan(case, params_of(window=1000))), "the plan must have found the prefix"
    check(case, attend(case)[:2], scale=0.3)


def test_without_a_plan_and_twice():
    case = make_case([1, 2, 1], [100, 40, 20], heads=(4, 2), head_dim=64, dtype="bfloat16")
    planned, again = (attend(case, max_q_len=2) for _ in range(2))
    unplanned = attend(case, plan_of=None, max_q_len=2)
    for a, b, c in zip(planned[:2], again[:2], unplanned[:2]):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(a, c)


def test_an_empty_batch():
    case = make_case([0, 0], [0, 0], heads=(4, 2), head_dim=64, dtype="bfloat16", pages=2, num_pages=4, tokens=4)
    check(case, attend(case)[:2], scale=0.3)


def test_longer_sequences_keep_what_the_prefill_kernel_gave(monkeypatch):
    asked = []

    def other(q, pool, page_table, kv_lens, cu_q_lens, tiles, *, params, interpret):
        asked.append(np.asarray(tiles))
        out, lse, _ = ref.ragged_paged_attention(q, pool, page_table, kv_lens, cu_q_lens, None, None, params=params)
        rows = np.concatenate([np.arange(t[1], t[1] + t[2]) for t in asked[-1]])
        mine = jnp.zeros(q.shape[0], bool).at[rows].set(True)[:, None]
        return jnp.where(mine[..., None], out, jnp.nan), jnp.where(mine, lse, jnp.nan)

    monkeypatch.setattr(entry, "prefill_attention", other)
    case = make_case([1, 20, 2], [33, 50, 70], heads=(4, 1), head_dim=64, dtype="float16")
    sinks = np.array([0.5, -1.0, 2.0, 0.0], np.float32)
    check(case, attend(case, sinks=sinks, max_q_len=None)[:2], scale=0.3, sinks=sinks)
    assert asked[0][0].tolist() == [1, 1, 20, 0] and not asked[0][1:, 2].any()


@pytest.mark.parametrize(
    "q_lens, kv_lens, options",
    [([1, 2, 0], [33, 300, 0], dict(mass="token", max_q_len=2)),
     ([3, 14], [33, 300], dict(mass="page", max_q_len=14, window=70, soft_cap=2.0))],
)
def test_mass(q_lens, kv_lens, options):
    case = make_case(q_lens, kv_lens, heads=(4, 1), head_dim=64, dtype="float16", window=options.get("window"))
    sinks = np.array([0.5, -1.0, 2.0, 0.0], np.float32)
    mass = np.asarray(attend(case, sinks=sinks, races=True, **options)[2])
    assert not get_races().races_found
    want = np.asarray(ref.ragged_paged_attention(*case.args, jnp.asarray(sinks), None, params=params_of(**options))[2])
    assert mass.shape == want.shape and mass.dtype == np.float32
    np.testing.assert_allclose(mass, want, atol=1e-5)
    assert (mass[want == 0] == 0).all() and (mass[0] > 0).any()


@pytest.mark.parametrize("part", [0, 1], ids=["key", "value"])
@pytest.mark.parametrize("quant", [None, "int8", "float8_e4m3fn"])
def test_a_visible_nan_comes_out(quant, part):
    case = with_nan(make_case([1, 2, 1], [33, 150, 40], heads=(4, 2), head_dim=64, dtype="float16"), 1, part)
    q, pool, *rest = case.args
    args = (q, quantised(pool, quant) if quant else pool, *rest, None, None)
    result = entry.ragged_paged_attention(*args, params=params_of(max_q_len=2), chip=SMALL, interpret=InterpretGPUParams())
    check_nan(case, result[:2], seq=1, part=part)


@pytest.mark.parametrize(
    "kv_dtype, q_dtype, head_dim, page_size, options",
    [("int8", "float16", 64, 16, dict(max_q_len=2, mass="page")),
     ("float8_e4m3fn", "bfloat16", 128, 64, dict(max_q_len=2, window=50, mass="token")),
     ("int8", "bfloat16", 96, 32, dict(max_q_len=2, soft_cap=2.0)), ("int8", "bfloat16", 256, 16, dict(max_q_len=2)),
     ("float8_e4m3fn", "float16", 80, 16, dict(max_q_len=2, mass="page"))],
)
def test_quantised_pools(kv_dtype, q_dtype, head_dim, page_size, options):
    """Against the definition on the same quantised pool; where nothing may be read, scales are NaN and so is float8."""
    case = make_case([1, 2], [33, 150], heads=(4, 2), head_dim=head_dim, page_size=page_size, window=options.get("window"))
    q, pool, *rest = case.args
    pool, q, params = quantised(pool, kv_dtype), q.astype(q_dtype), params_of(**options)
    out, lse, mass = entry.ragged_paged_attention(q, pool, *rest, None, None, params=params, chip=SMALL,
                                               interpret=InterpretGPUParams(detect_races=True))
    assert not get_races().races_found and out.dtype == q_dtype
    want = ref.ragged_paged_attention(q.astype(jnp.float32), pool, *rest, None, None, params=params)
    n = case.real_rows
    np.testing.assert_allclose(out[:n].astype(jnp.float32), want[0][:n], atol=TOLERANCE[q_dtype], rtol=TOLERANCE[q_dtype])
    np.testing.assert_allclose(lse[:n], want[1][:n], atol=2e-5, rtol=2e-6)
    if params.mass is not None:
        np.testing.assert_allclose(mass, want[2], atol=2e-5)
        assert (np.asarray(mass)[want[2] == 0] == 0).all() and (mass > 0).any()


@pytest.mark.parametrize("kv_dtype", ["int8", "float8_e4m3fn"])
def test_small_weights_of_small_quantised_values_do_not_underflow_in_float16(kv_dtype):
    """The first key takes nearly all, as it often does, but its value is 0; the others' weights are 1e-4, their scales too."""
    case = make_case([1], [60], heads=(1, 1), head_dim=64)
    q, pool, *rest = case.args
    first = case.page_table[0, 0]
    pool = pool.at[:, 0].multiply(0.0).at[first, 0, 0, 0].set(q[0, 0]).at[:, 1].set(0.01 * jnp.abs(pool[:, 1]))
    pool, q = quantised(pool.at[first, 1, 0, 0].set(0.0), kv_dtype), q.astype("float16")
    params = params_of(scale=9.0 / float(jnp.square(q[0].astype(jnp.float32)).sum()))
    out, *_ = entry.ragged_paged_attention(q, pool, *rest, None, None, params=params, chip=SMALL,
                                           interpret=InterpretGPUParams())
    want = ref.ragged_paged_attention(q.astype(jnp.float32), pool, *rest, None, None, params=params)[0]
    np.testing.assert_allclose(out[:1].astype(jnp.float32), want[:1], rtol=0.01)


@settings(max_examples=4)
@given(lengths=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 120)), min_size=4, max_size=4), seed=st.integers(0, 99),
       window=st.sampled_from([None, 20]))
def test_random_shapes(lengths, seed, window):
    q_lens = [q for q, _ in lengths]
    kv_lens = [q + past if q else 0 for q, past in lengths]
    case = make_case(q_lens, kv_lens, heads=(4, 2), head_dim=64, dtype="float16", tokens=14, pages=9, num_pages=40, seed=seed,
                     window=window)
    check(case, attend(case, max_q_len=3, window=window)[:2], scale=0.3, window=window)


@pytest.mark.parametrize(
    "change, options, message",
    [
        (dict(layout="token_major"), dict(layout="token_major"), "layout token_major"),
        (dict(dtype="float32"), dict(), "float32"),
        (dict(page_size=12), dict(), "page_size 12"),
        (dict(head_dim=48), dict(), "head_dim 48"),
        (dict(heads=(65, 1)), dict(), "got 65"),
    ],
)
def test_what_the_kernels_cannot_serve_is_refused(change, options, message):
    case = make_case([1], [20], **dict(heads=(2, 1), head_dim=64, dtype="bfloat16") | change)
    with pytest.raises(NotImplementedError, match=message):
        attend(case, plan_of=None, **options)


@pytest.mark.parametrize("kind, capability", [("NVIDIA A100-SXM4-80GB", "8.0"), ("NVIDIA B200", "10.0")])
def test_other_gpus_are_refused_by_name(monkeypatch, kind, capability):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [SimpleNamespace(device_kind=kind, compute_capability=capability)])
    args = make_case([1], [20], heads=(2, 1), head_dim=64, dtype="bfloat16").args
    with pytest.raises(NotImplementedError, match=f"{kind} has compute capability {capability}"):
        entry.ragged_paged_attention(*args, None, None, params=params_of())
