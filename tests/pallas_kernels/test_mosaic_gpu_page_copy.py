"""The Hopper page moves interpreted on CPU against the definition, and what they refuse."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("absl")  # undeclared dependency of Pallas Mosaic GPU in jax 0.10
from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import get_races, reset_gpu_interpret_mode_state
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

import pallas_kernels as pk
from pallas_kernels.page_copy import mosaic_gpu

from .paged import to_pool

L, N, PS, HKV, D = 2, 5, 8, 2, 16
layouts = pytest.mark.parametrize("layout", ["token_major", "head_major"])
dtypes = pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])


@pytest.fixture(autouse=True)
def fresh_interpreter():
    yield
    jax.effects_barrier()  # the interpreter of a kernel under way would lose its barriers
    reset_gpu_interpret_mode_state()


@pytest.fixture
def small_machine(monkeypatch):
    """Two thread blocks per layer, so that each moves several pieces, and a ring shorter than that."""
    monkeypatch.setattr(mosaic_gpu, "SMS", L)
    monkeypatch.setattr(mosaic_gpu, "MAX_STAGES", 3)
    monkeypatch.setattr(mosaic_gpu, "PIECE_BYTES", 256)


def pages_of(dtype, seed=0):
    """[L, N, 2, ps, Hkv, D]"""
    return np.random.default_rng(seed).normal(size=(L, N, 2, PS, HKV, D)).astype(jnp.dtype(dtype))


def pools_of(pages, layout):
    return tuple(jnp.asarray(to_pool(p, layout)) for p in pages)


@layouts
@dtypes
def test_gather(small_machine, layout, dtype):
    pages = pages_of(dtype)
    run = jax.jit(functools.partial(mosaic_gpu.gather_pages, layout=layout, interpret=InterpretGPUParams(detect_races=True)))
    data = run(pools_of(pages, layout), jnp.array([4, 0, 4, 99], jnp.int32))
    assert data.shape == (4, L, 2, PS, HKV, D) and data.dtype == dtype
    np.testing.assert_array_equal(np.asarray(data[:3]), pages[:, [4, 0, 4]].swapaxes(0, 1))
    assert not get_races().races_found


@layouts
@dtypes
@pytest.mark.parametrize("to", [(2, N, 4, -1), (2, 0, 4, 1)], ids=["some outside", "all inside"])
def test_scatter_drops_pages_outside(small_machine, layout, dtype, to):
    pages, new = pages_of(dtype), pages_of(dtype, seed=1)
    inside = [i for i, page in enumerate(to) if 0 <= page < N]
    # The interpreter counts copies, where the hardware counts groups, empty ones of dropped pages too: a race to it alone.
    run = jax.jit(functools.partial(mosaic_gpu.scatter_pages, layout=layout,
                                    interpret=InterpretGPUParams(detect_races=len(inside) == len(to))))
    got = run(pools_of(pages, layout), jnp.array(to, jnp.int32), jnp.asarray(new[:, :4].swapaxes(0, 1)))
    pages[:, [to[i] for i in inside]] = new[:, inside]
    assert len(inside) < len(to) or not get_races().races_found
    for pool, want in zip(got, pages, strict=True):
        np.testing.assert_array_equal(np.asarray(pool), to_pool(want, layout))


@pytest.mark.parametrize(
    "shape, dtype, message",
    [
        ((4, 2, 1, 8, 12), "float16", "head_dim=12 of float16"),
        ((4, 2, 1, 8, 512), "float16", "head_dim=512"),
        ((4, 2, 1, 3, 8), "float16", "page_size=3"),
    ],
)
def test_refusals_name_the_reason(shape, dtype, message):
    with pytest.raises(NotImplementedError, match=message):
        mosaic_gpu.gather_pages((jnp.zeros(shape, dtype),), jnp.zeros(1, jnp.int32), layout="head_major")


def test_quantised_and_empty_are_refused():
    pool = pk.zero_pool("head_major", 4, 8, 1, 16, "int8", "cpu")
    with pytest.raises(NotImplementedError, match="quantised"):
        mosaic_gpu.gather_pages((pool,), jnp.zeros(1, jnp.int32), layout="head_major")
    with pytest.raises(NotImplementedError, match="paired"):
        mosaic_gpu.gather_pages((jnp.zeros((4, 1, 1, 8, 32)),), jnp.zeros(1, jnp.int32), layout="paired")
    with pytest.raises(NotImplementedError, match="no pages"):
        mosaic_gpu.gather_pages((jnp.zeros((4, 2, 1, 8, 16)),), jnp.zeros(0, jnp.int32), layout="head_major")
