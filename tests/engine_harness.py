"""Engines on small random models for tests: executors are compiled once per mesh and model, engines are made per cell."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from jaxkv.cache.controller import CacheController
from jaxkv.config import CacheConfig, EngineConfig, SchedConfig
from jaxkv.device import models
from jaxkv.device.batch import BatchShape, batch_shapes, step_sizes
from jaxkv.device.sharding import param_shardings
from jaxkv.device.spec import KVSpec, ModelSpec, kv_groups
from jaxkv.params import SamplingParams
from jaxkv.runtime.disk import DiskFormat, DiskStore
from jaxkv.runtime.engine import Engine
from jaxkv.runtime.executor import JaxExecutor
from jaxkv.runtime.memory import Capacity
from jaxkv.runtime.outputs import Delta
from jaxkv.runtime.page_ops import PageForm
from jaxkv.runtime.structured.compiler import GrammarCompiler
from jaxkv.runtime.tokenizer import Tokenizer
from jaxkv.sched.scheduler import Scheduler
from tests.shipped import as_shipped

PAGE, WINDOW, MAX_LEN, SEQS, BUDGET, POOL, HOST = 4, 8, 64, 4, 64, 160, 64
CONFIG = dict(
    architectures=["LlamaForCausalLM"], model_type="llama", hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, intermediate_size=48, vocab_size=67, max_position_embeddings=256,
    rms_norm_eps=1e-5, rope_theta=10000.0, hidden_act="silu", tie_word_embeddings=False, initializer_range=0.4)


@cache
def model(windows: bool, devices: int = 1, dtype: str = "float32") -> tuple[ModelSpec, models.Params, Mesh]:
    """A two-layer model, the second layer with a sliding window if ``windows``; the same weights on every mesh."""
    spec = models.spec_from_config(CONFIG, dtype, tp=devices, out_first=True)
    spec = replace(spec, windows=(None, WINDOW if windows else None))
    mesh = Mesh(np.array(jax.devices()[:devices]), ("tp",))
    params = tuple(map(jax.device_put, models.init_leaves(spec, jax.random.key(3)), param_shardings(spec, mesh)))
    return spec, params, mesh


def few_shapes(max_seqs: int, max_tokens: int) -> tuple[BatchShape, ...]:
    """Of those of ``batch_shapes`` a decode step, a small one and the largest, each for all sequences."""
    return tuple(s for s in batch_shapes(max_seqs, max_tokens) if s.seqs == max_seqs and s.tokens in (max_seqs, 16, max_tokens))


@lru_cache(maxsize=6)  # of some 2,600 memory mappings each on one device
def executor(
    windows: bool, devices: int = 1, dtype: str = "float32", layout: str = "head_major", kv_dtype: str | None = None,
) -> JaxExecutor:
    """With all batch shapes on one device and the pools that most tests have, else with few: compiling one takes seconds."""
    spec, params, mesh = model(windows, devices, dtype)
    groups = kv_groups(spec, devices, kv_dtype or dtype)
    kv = KVSpec(groups, (POOL,) * len(groups), PAGE, layout)
    with jax.default_matmul_precision("highest"), as_shipped(), pytest.MonkeyPatch.context() as patch:
        if (devices, dtype, layout, kv_dtype) != (1, "float32", "head_major", None):
            patch.setattr("jaxkv.runtime.executor.batch_shapes", few_shapes)
        return JaxExecutor(spec, params, kv, mesh, max_num_seqs=SEQS, max_num_batched_tokens=BUDGET, max_model_len=MAX_LEN,
                           host_bytes=2 * HOST * sum(g.page_bytes(PAGE) for g in groups), check_batches=True)


def engine(
    run: JaxExecutor, *, pages: int | tuple[int, ...] = POOL, host_pages: int = 0, policy: str = "lfu", budget: int = BUDGET,
    chunked: bool = True, overlap: bool = True, prefix_caching: bool = True, max_num_seqs: int = SEQS,
    disk: DiskStore | None = None, fetch_pages: int = 8, tokenizer: Tokenizer | None = None, eos_ids: tuple[int, ...] = (),
) -> Engine:
    """A fresh engine on a compiled executor; the controller may be told of fewer pages than the pool has."""
    groups = run.kv.groups
    run.tiers.clear()
    run.tiers.host_bytes = (host_pages + 2) * sum(g.page_bytes(PAGE) for g in groups)  # two pages of staging
    run.tiers.disk = run.tiers.fetches.disk = disk
    config = EngineConfig(sched=SchedConfig(max_num_seqs, budget, chunked, overlap), cache=CacheConfig(PAGE))
    num_pages, num_host = (pages,) * len(groups) if isinstance(pages, int) else pages, (host_pages,) * len(groups)
    controller = CacheController(groups, PAGE, num_pages, num_host, policy, "test", prefix_caching, disk,
                                 fetch_pages=fetch_pages)
    capacity = Capacity(num_pages, 1, num_host, 1)
    scheduler = Scheduler(config.sched, controller, MAX_LEN, step_sizes=step_sizes(run.shapes))
    return Engine(config, scheduler, run, model_name="test", max_model_len=MAX_LEN, vocab_size=CONFIG["vocab_size"],
                  capacity=capacity, tokenizer=tokenizer, eos_ids=eos_ids,
                  grammars=GrammarCompiler(tokenizer, CONFIG["vocab_size"], eos_ids) if tokenizer else None)


def disk_store(path: Path, run: JaxExecutor, **options: Any) -> DiskStore:
    """A disk tier for the pages of ``run``; batches are so small that pages are on disk soon."""
    form, copies = PageForm(run.kv, run.mesh), run.kv.groups[0].kv_heads // CONFIG["num_key_value_heads"]
    return DiskStore(path, 2**26, DiskFormat("test", PAGE, form.on_disk(copies), copies), **options)


@dataclass
class Result:
    prompt: list[int]
    tokens: list[int]
    deltas: list[Delta]


def run_all(engine: Engine, requests: dict[str, tuple[list[int], SamplingParams]], check: bool = True) -> dict[str, Result]:
    """Runs requests to their end, checking all ownership after every step; results by "id" or, with n > 1, "id/child"."""
    results: dict[str, Result] = {}
    for name, (prompt, params) in requests.items():
        engine.add_request(name, prompt, params)
        for i in range(params.n):
            results[f"{name}/{i}" if params.n > 1 else name] = Result(prompt, [], [])
    steps = 0
    while engine.has_work:
        for delta in engine.step():
            params = requests[delta.request_id][1]
            result = results[f"{delta.request_id}/{delta.index}" if params.n > 1 else delta.request_id]
            result.tokens += delta.token_ids
            result.deltas.append(delta)
        if check:
            engine.check()
            assert engine.executor.host_bytes_held() <= engine.executor.tiers.host_bytes
        steps += 1
        assert steps < 5000, "the engine does not finish"
    return results


def greedy(max_tokens: int, **more) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, **more)
