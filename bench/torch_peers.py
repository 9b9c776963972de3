"""PyTorch's attention (scaled_dot_product_attention, FlexAttention) and FlashInfer's on our keys and values.

On CPU the tensors are copies in torch's memory and torch has as many threads as there are cores; on GPU they are JAX's own
buffers, handed over by DLPack. Calls are made from Python one by one, as a user of PyTorch makes them without a compiler.
"""

from __future__ import annotations

import os
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import jax
import numpy as np

from bench.kernel_cases import Case, dense
from bench.kernel_peers import Prepared, plain, turns_and_layers
from bench.timing import Candidate
from pallas_kernels.layout import QuantPool, from_storage


def tensor(x: jax.Array) -> Any:
    """A torch tensor: a copy on CPU, the same memory on GPU."""
    import torch

    x = from_storage(x)
    if x.devices().pop().platform == "cpu":
        return torch.from_numpy(np.asarray(x).astype(np.float32)).to(getattr(torch, x.dtype.name))
    return torch.from_dlpack(jax.block_until_ready(x))


def to_numpy(out: Any) -> np.ndarray:
    return out.float().cpu().numpy()


def timed(case: Case, calls: list[Any], assemble: Any, platform: str) -> Prepared:
    """calls: one function per turn and layer, giving what `assemble` turns into [T, Hq, D]."""
    import torch

    sync = (lambda _: None) if platform == "cpu" else (lambda _: torch.cuda.synchronize())

    def run() -> None:
        with torch.inference_mode():
            for call in calls:
                call()

    def first() -> np.ndarray:
        with torch.inference_mode():
            return to_numpy(assemble(calls[0]()))

    return Prepared(Candidate(run, sync, case.calls), first)


def sdpa(case: Case, how: str, platform: str) -> Prepared:
    """how: "gqa" (enable_gqa), "repeated" (keys and values copied once per query head beforehand) or "grouped" (decode only:
    the query heads of a KV head as rows of one call, so that keys are read once)."""
    import torch

    plain(case)
    torch.set_num_threads(os.cpu_count() or 1)
    if how == "grouped" and max(case.batch.q_lens) > 1:
        raise NotImplementedError("decode only")
    if how == "repeated" and platform != "cpu":
        raise NotImplementedError("only on CPU, where enable_gqa may be slower")
    group, q_heads = case.heads.q_heads // case.heads.kv_heads, case.heads.q_heads
    q = tensor(case.q)
    parts = [(0, len(case.batch.q_lens))] if case.uniform else [(s, s + 1) for s in range(len(case.batch.q_lens))]
    rows = [0, *accumulate(case.batch.q_lens)]

    def operands(turn: int, layer: int) -> list[tuple[Any, ...]]:
        k, v = (tensor(x) for x in dense(case, turn, layer))
        if how == "repeated":
            k, v = (x.repeat_interleave(group, 1) for x in (k, v))
        made = []
        for a, b in parts:
            q_len, kv_len = case.batch.q_lens[a], case.batch.kv_lens[a]
            mine = q[rows[a] : rows[b]].reshape(b - a, q_len, q_heads, -1).transpose(1, 2).contiguous()
            mine = mine.reshape(b - a, q_heads // group, group, -1) if how == "grouped" else mine
            mask = None
            if 1 < q_len < kv_len:
                mask = torch.ones(q_len, kv_len, dtype=torch.bool, device=q.device).tril(kv_len - q_len)
            made.append((mine, k[a:b, :, :kv_len].contiguous(), v[a:b, :, :kv_len].contiguous(), mask, q_len == kv_len > 1))
        return made

    def call(made: list[tuple[Any, ...]]) -> list[Any]:
        attend = torch.nn.functional.scaled_dot_product_attention
        return [attend(q, k, v, attn_mask=mask, is_causal=causal, scale=case.scale, enable_gqa=how == "gqa")
                for q, k, v, mask, causal in made]

    def assemble(outs: list[Any]) -> Any:
        if how == "grouped":
            outs = [x.reshape(x.shape[0], q_heads, 1, -1) for x in outs]
        return torch.cat([x.transpose(1, 2).reshape(-1, q_heads, x.shape[-1]) for x in outs])

    return timed(case, [partial(call, operands(*at)) for at in turns_and_layers(case)], assemble, platform)


def flex(case: Case) -> Prepared:
    """FlexAttention, compiled, with the causal mask as a block mask."""
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    plain(case)
    q_len, kv_len = case.batch.q_lens[0], case.batch.kv_lens[0]
    if not case.uniform:
        raise NotImplementedError("ragged lengths")
    torch._dynamo.reset()  # else the ninth shape is past its limit and runs uncompiled
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    q = tensor(case.q).reshape(-1, q_len, *case.q.shape[1:]).transpose(1, 2).contiguous()
    mask = None
    if q_len > 1:
        mask = create_block_mask(lambda b, h, i, j: i + (kv_len - q_len) >= j, None, None, q_len, kv_len, device="cuda")
    kv = [tuple(tensor(x) for x in dense(case, *at)) for at in turns_and_layers(case)]
    calls = [lambda k=k, v=v: compiled(q, k, v, block_mask=mask, scale=case.scale, enable_gqa=True) for k, v in kv]
    return timed(case, calls, lambda x: x.transpose(1, 2).reshape(case.q.shape), "gpu")


def flashinfer(case: Case) -> Prepared:
    """FlashInfer's paged kernels on our own head-major pools; its plan, made once per turn, is not part of the time."""
    import flashinfer
    import torch

    if isinstance(case.pools[0], QuantPool):
        raise NotImplementedError("quantised KV")
    heads, size = case.heads, case.page_size
    decode = max(case.batch.q_lens) == 1
    pages = [-(-kv // size) for kv in case.batch.kv_lens]
    i32 = lambda x: torch.tensor(x, dtype=torch.int32, device="cuda")  # noqa: E731
    indptr, last = i32([0, *accumulate(pages)]), i32([kv - (n - 1) * size for kv, n in zip(case.batch.kv_lens, pages)])
    q, pools = tensor(case.q), [tensor(pool) for pool in case.pools]
    cu = [0, *accumulate(case.batch.q_lens)]
    assert all(a < b for a, b in pairwise(cu))
    calls, workspace = [], torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    for table in np.asarray(case.tables):
        indices = i32(np.concatenate([row[:n] for row, n in zip(table, pages)]))
        shape = (heads.q_heads, heads.kv_heads, heads.head_dim, size)
        options = dict(q_data_type=q.dtype, kv_data_type=q.dtype, sm_scale=case.scale)
        if decode:
            wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=True)
            wrapper.plan(indptr, indices, last, *shape, **options)
        else:
            wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "HND")
            wrapper.plan(i32(cu), indptr, indices, last, *shape, causal=True, **options)
        calls += [lambda w=wrapper, pool=pool: w.run(q, pool) for pool in pools]
    return timed(case, calls, lambda x: x, "gpu")
