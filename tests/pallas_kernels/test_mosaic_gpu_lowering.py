"""Attention and page moves in Mosaic GPU lower for CUDA, with shapes that are no round numbers and arguments with shardings over
a mesh of one, as the engine has them. Neither a GPU nor its plugin is needed; test_h100_*.py compile what comes of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

pytest.importorskip("absl", reason="Mosaic GPU needs absl-py")

import pallas_kernels as pk
from pallas_kernels.layout import QuantPool

KV_HEADS = 3


def lower(tokens, seqs, groups, head_dim, page_size, kv_dtype, max_q_len=None, sinks=False, **options) -> str:
    where = NamedSharding(Mesh(np.array(jax.devices()[:1]), ("tp",)), PartitionSpec())
    array = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype, sharding=where)  # noqa: E731
    heads, i32 = groups * KV_HEADS, jnp.int32
    planner = pk.attention_planner("mosaic_gpu", tokens=tokens, seqs=seqs, q_heads=heads, kv_heads=KV_HEADS, head_dim=head_dim,
                                   page_size=page_size, kv_dtype=kv_dtype, max_q_len=max_q_len)
    pool = array(kv_dtype, *pk.pool_shape("head_major", 99, page_size, KV_HEADS, head_dim))
    if kv_dtype != "bfloat16":
        pool = QuantPool(pool, array("float32", *pool.shape[:-1]))

    @jax.jit
    def attend(q, pool, table, kv_lens, cu, plan, sinks):
        return pk.ragged_paged_attention(q, pool, table, kv_lens, cu, plan=plan, sinks=sinks, layout="head_major", scale=0.1,
                                         max_q_len=max_q_len, impl="mosaic_gpu", **options)

    traced = attend.trace(array("bfloat16", tokens, heads, head_dim), pool, array(i32, seqs, 7), array(i32, seqs),
                          array(i32, seqs + 1), array(i32, planner.size), array("float32", heads) if sinks else None)
    assert "tanh" not in str(traced.jaxpr), "the hardware's errs by 5e-4"
    return traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    "tokens, seqs, groups, head_dim, page_size, kv_dtype, options",
    [
        (11, 9, 4, 128, 16, "bfloat16", dict(max_q_len=1, return_mass="token")),
        (1, 1, 7, 80, 8, "bfloat16", dict(return_mass="page", soft_cap=20.0)),
        (131, 3, 5, 64, 256, "int8", dict(window=100, return_mass="token")),
        (77, 5, 16, 96, 32, "float8_e4m3fn", dict(sinks=True, soft_cap=20.0)),
        (65, 2, 1, 256, 128, "bfloat16", dict(window=70, soft_cap=20.0)),
        (13, 3, 6, 128, 64, "bfloat16", dict(max_q_len=5, sinks=True)),
    ],
    ids=str,
)
def test_attention_lowers(tokens, seqs, groups, head_dim, page_size, kv_dtype, options):
    text = lower(tokens, seqs, groups, head_dim, page_size, kv_dtype, **options)
    kernels = 2 + ("return_mass" in options) + (tokens > 64)
    assert text.count("@mosaic_gpu_v2") == kernels, "decode, merge and, if asked for, mass and prefill"
