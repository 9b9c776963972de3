"""Choice of implementation, and the layout file's facts."""

import logging

import jax.numpy as jnp
import pytest

import pallas_kernels as pk
from jaxkv.config import ATTENTION_IMPLS, KV_CODECS, KV_LAYOUTS
from pallas_kernels.dispatch import dispatch
from pallas_kernels.ragged_paged_attention.api import IMPLEMENTATIONS


def refuse(x):
    raise NotImplementedError(f"not for {x}")


def test_first_that_accepts_runs_and_is_logged_once(caplog):
    caplog.set_level(logging.INFO)
    implementations = {"fast": refuse, "plain": lambda x: ("plain", x), "slow": lambda x: ("slow", x)}
    for _ in range(3):
        assert dispatch("op-under-test", implementations, "auto", 7) == ("plain", 7)
    assert [r.getMessage() for r in caplog.records] == ["op-under-test runs as plain"]


def test_forced_implementation():
    implementations = {"plain": lambda x: ("plain", x), "slow": lambda x: ("slow", x)}
    assert dispatch("op", implementations, "slow", 7) == ("slow", 7)
    with pytest.raises(ValueError, match=r"impl must be one of \('auto', 'plain', 'slow'\), got 'fast'"):
        dispatch("op", implementations, "fast", 7)


def test_nobody_left():
    with pytest.raises(ExceptionGroup, match="op: no implementation") as caught:
        dispatch("op", {"a": refuse, "b": refuse}, "auto", 7)
    assert [e.__notes__ for e in caught.value.exceptions] == [["implementation 'a' of op"], ["implementation 'b' of op"]]
    with pytest.raises(ExceptionGroup):
        dispatch("op", {"a": refuse, "b": lambda x: x}, "a", 7)


def test_the_options_name_every_implementation_of_attention_every_layout_and_every_codec():
    assert set(ATTENTION_IMPLS) == {"auto", *IMPLEMENTATIONS}
    assert KV_LAYOUTS == ("auto", *pk.LAYOUTS) and KV_CODECS == pk.CODECS


def test_pool_shapes():
    assert pk.pool_shape("token_major", 9, 16, 2, 64) == (9, 16, 2, 2, 64)
    assert pk.pool_shape("head_major", 9, 16, 4, 64) == (9, 2, 4, 16, 64)
    assert pk.pool_shape("paired", 9, 16, 4, 64) == (9, 1, 4, 16, 128)
    assert [pk.kv_head_axis(layout) for layout in pk.LAYOUTS] == [3, 2, 2]
    with pytest.raises(ValueError, match="page_size=0"):
        pk.pool_shape("token_major", 9, 0, 2, 64)
    with pytest.raises(ValueError, match="paired pool .* with 1 "):
        pk.layout.pool_dims(jnp.zeros((9, 2, 4, 16, 64)), "paired")


def test_layout_of_a_platform():
    assert [pk.resolve_layout("auto", d, "tpu") for d in (32, 64, 80, 128)] == ["paired", "paired", "head_major", "head_major"]
    assert pk.resolve_layout("auto", 64, "cpu") == pk.resolve_layout("auto", 64, "gpu") == "head_major"
    assert pk.resolve_layout("token_major", 64, "tpu") == "token_major"
    with pytest.raises(ValueError, match="nonsense"):
        pk.resolve_layout("nonsense", 64, "tpu")


@pytest.mark.parametrize("name", ["bfloat16", jnp.bfloat16, jnp.dtype("bfloat16")])
def test_storage_dtype(name):
    assert pk.storage_dtype(name, "cpu") == jnp.uint16 and pk.storage_dtype(name, "gpu") == jnp.bfloat16
    assert pk.storage_dtype("float16", "cpu") == jnp.float16
    with pytest.raises(ValueError, match="int16"):
        pk.storage_dtype("int16", "cpu")
