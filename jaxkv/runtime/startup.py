"""From settings to a running engine: load, size the pools, compile, say what was built. Everything that happens once."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

import pallas_kernels as ops
from jaxkv.cache.controller import CacheController
from jaxkv.config import ATTENTION_IMPLS, CacheConfig, ConfigError, EngineConfig
from jaxkv.device.batch import batch_shapes, step_sizes
from jaxkv.device.sampling import sampler_bytes
from jaxkv.device.spec import KVSpec, ModelSpec, cached_dtype, kv_groups
from jaxkv.device.state import page_bytes
from jaxkv.runtime.disk import DiskError, DiskFormat, DiskStore
from jaxkv.runtime.engine import Engine
from jaxkv.runtime.executor import JaxExecutor, ran_out_of_memory
from jaxkv.runtime.generation_config import default_sampling, eos_token_ids
from jaxkv.runtime.memory import (
    FETCH_PAGES,
    Capacity,
    check_memory,
    free_device_memory,
    free_host_memory,
    plan_capacity,
)
from jaxkv.runtime.page_ops import PageForm
from jaxkv.runtime.structured.compiler import GrammarCompiler
from jaxkv.runtime.tokenizer import load_tokenizer
from jaxkv.runtime.weights import LoadedModel, load_model, placed_bytes
from jaxkv.sched.scheduler import Scheduler

log = logging.getLogger("jaxkv")
DISK_BYTES = 8 * 2**30
LOG_S = 5.0  # at least, from one line about progress to the next


def build_engine(config: EngineConfig, *, show_progress: bool = False) -> Engine:
    """An engine ready to serve. ``show_progress``: bars on stderr; without, the log says how far compiling is. ConfigError, one
    line, for whatever cannot work."""
    start = time.perf_counter()
    use_compile_cache()
    mesh = make_mesh(config.mesh.tensor_parallel_size)
    impl, platform = config.model.attention_impl, mesh.devices.flat[0].platform
    if impl.startswith("mosaic_") and impl != f"mosaic_{platform}":
        raise ConfigError(f"attention_impl {impl} needs a {impl[-3:].upper()}, but the devices are {platform}")
    with _memory_for("the model's weights"):
        model = load_model(config.model.model, mesh, dtype=config.model.dtype, load_format=config.model.load_format,
                           seed=config.seed, show_progress=show_progress, check=lambda spec: _check(config, spec, mesh))
    tokenizer = None if config.model.skip_tokenizer_init else load_tokenizer(model.directory)
    defaults = default_sampling(model.directory) if config.model.generation_config == "auto" else {}
    vocab = model.spec.vocab_size
    eos_ids = eos_token_ids(model.directory, tokenizer, vocab)
    max_model_len = resolve_max_model_len(config, model.spec)
    cache, sched = config.cache, config.sched
    kv_dtype = cached_dtype(cache.kv_cache_dtype, model.spec.dtype)
    groups = kv_groups(model.spec, mesh.size, kv_dtype)
    layout = ops.resolve_layout(cache.kv_layout, model.spec.head_dim, platform)
    kv = KVSpec(groups, (0,) * len(groups), cache.page_size, layout)  # without pages, until their memory is shared out
    form = PageForm(kv, mesh, cache.kv_codec)
    disk = open_disk(cache, form, model.fingerprint, groups[0].kv_heads // model.spec.num_kv_heads)
    capacity = plan_capacity(
        groups, cache.page_size, sched, max_model_len, kv_cache_memory=cache.kv_cache_memory,
        host_kv_memory=cache.host_kv_memory,
        free_device=free_device_memory(list(mesh.devices.flat), sampler_bytes(sched.max_num_seqs, vocab)),
        free_host=free_host_memory(), shared=platform == "cpu", page_bytes=page_bytes(kv, mesh),
        host_page_bytes=form.bytes)
    kv = replace(kv, num_pages=capacity.num_pages)
    controller = CacheController(
        groups, cache.page_size, capacity.num_pages, capacity.num_host_pages, cache.eviction_policy,
        root_salt=f"{model.fingerprint}/{cache.page_size}/{kv_dtype}/{cache.kv_codec}",
        enable_prefix_caching=cache.enable_prefix_caching, disk=disk, save_on_reuse=cache.disk_kv_write == "reuse",
        fetch_pages=FETCH_PAGES, answer_worth=cache.answer_worth)
    shapes = batch_shapes(sched.max_num_seqs, sched.max_num_batched_tokens)
    scheduler = Scheduler(sched, controller, max_model_len, step_sizes=step_sizes(shapes))
    loaded = time.perf_counter()
    with tqdm(desc="compiling steps", total=len(shapes), unit="", disable=not show_progress, leave=False) as bar, \
            logging_redirect_tqdm(), _refusals(impl), ops.implementations_used() as used, \
            _memory_for("the KV pools and a step: lower kv_cache_memory, max_num_seqs or max_num_batched_tokens"):
        executor = JaxExecutor(
            model.spec, model.params, kv, mesh, max_num_seqs=sched.max_num_seqs,
            max_num_batched_tokens=sched.max_num_batched_tokens, max_model_len=max_model_len,
            host_bytes=capacity.host_bytes, attention_impl=impl, form=form, disk=disk,
            check_batches=sched.check_batches, progress=partial(_advance, bar) if show_progress else _logged())
    compiled = time.perf_counter()
    kernels = ", ".join(f"{op} {name}" for op, name in used)
    description = describe(config, model, mesh, kv, capacity, executor, kernels, loaded - start, compiled - loaded)
    return Engine(config, scheduler, executor, model_name=model.name, max_model_len=max_model_len,
                  vocab_size=vocab, tokenizer=tokenizer, weight_bytes=model.nbytes, capacity=capacity,
                  eos_ids=eos_ids, default_sampling=defaults,
                  grammars=GrammarCompiler(tokenizer, vocab, eos_ids) if tokenizer else None, description=description,
                  info={"model": model.name, "dtype": model.spec.dtype, "platform": platform,
                        "kv_layout": layout, "kv_cache_dtype": kv_dtype, "eviction_policy": cache.eviction_policy,
                        "kernels": kernels})


def _check(config: EngineConfig, spec: ModelSpec, mesh: Mesh) -> None:
    """What can be known to fail before a weight is read."""
    try:
        ops.codec_spec(config.cache.kv_codec, spec.num_layers)
    except ValueError as error:
        raise ConfigError(f"kv_codec: {error}") from None
    window, unit, size = resolve_max_model_len(config, spec), CacheConfig.page_size, config.cache.page_size
    if size > (most := -(-window // unit) * unit):  # one such page holds any sequence
        raise ConfigError(f"page_size must be at most {most} (max_model_len is {window}), got {size}")
    slots = config.sched.max_num_seqs
    check_memory(placed_bytes(spec, mesh), slots, mesh.size * sampler_bytes(slots, spec.vocab_size), list(mesh.devices.flat))


def open_disk(cache: CacheConfig, form: PageForm, fingerprint: str, copies: int) -> DiskStore | None:
    """The disk tier, if there is to be one; ``copies`` of every KV head stand in a page in memory. What stops it is one line
    in the log, or a ConfigError if it is required."""
    if cache.disk_kv_path is None or not cache.enable_prefix_caching:
        return None
    try:
        return DiskStore(cache.disk_kv_path, cache.disk_kv_memory or DISK_BYTES,
                         DiskFormat(f"{fingerprint}/{cache.kv_codec}", cache.page_size, form.on_disk(copies), copies))
    except DiskError as error:
        if cache.disk_kv_required:
            raise
        log.error("%s; going on without the disk tier", error)
        return None


def make_mesh(tensor_parallel_size: int) -> Mesh:
    """A mesh with the one axis "tp" over the first devices. ConfigError when there are fewer."""
    devices = jax.devices()
    if tensor_parallel_size > len(devices):
        raise ConfigError(f"tensor_parallel_size is {tensor_parallel_size}, but there are {len(devices)} devices")
    return Mesh(np.array(devices[:tensor_parallel_size]), ("tp",))


def resolve_max_model_len(config: EngineConfig, spec: ModelSpec) -> int:
    """The window in tokens. ConfigError when more is asked for than the model's positions allow, or these hold no answer."""
    wanted, window = config.model.max_model_len, spec.max_position
    if window < 2:
        raise ConfigError("the model's window is 1 token, which leaves no room for an answer; at least 2 are needed")
    if wanted is not None and wanted > window:
        raise ConfigError(f"max_model_len is {wanted}, but the model's window is {window} tokens")
    return wanted or window


def use_compile_cache() -> None:
    """Keeps compiled steps between processes, under JAX_COMPILATION_CACHE_DIR or the user's cache directory."""
    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        root = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
        jax.config.update("jax_compilation_cache_dir", str(root / "jaxkv" / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def describe(
    config: EngineConfig, model: LoadedModel, mesh: Mesh, kv: KVSpec, capacity: Capacity, executor: JaxExecutor,
    kernels: str, load_seconds: float, compile_seconds: float,
) -> tuple[str, ...]:
    """What was built, a line per fact."""
    device = mesh.devices.flat[0]
    ps = kv.page_size
    tier = lambda pages, size: (f"{min(pages) * ps:,} tokens, {sum(pages):,} pages of {ps}, "  # noqa: E731
                                f"{size:,} bytes ({size / 2**20:.1f} MiB)")
    window = lambda g: "full attention" if g.window is None else f"window {g.window}"  # noqa: E731
    return (
        f"model: {model.name} ({model.spec.family}, {model.nbytes:,} bytes of weights, {model.spec.dtype}), "
        f"loaded in {load_seconds:.1f} s",
        f"devices: {mesh.size} x {device.device_kind} ({device.platform})",
        "KV groups: " + "; ".join(f"{len(g.layers)} layers {window(g)}, {n:,} pages"
                                  for g, n in zip(kv.groups, kv.num_pages)),
        f"KV pool (device): {tier(kv.num_pages, capacity.pool_bytes)}",
        f"KV tier (host): {tier(capacity.num_host_pages, capacity.host_bytes)}" if capacity.host_bytes
        else "KV tier (host): none",
        f"KV tier (disk): {executor.tiers.disk.describe()}" if executor.tiers.disk else "KV tier (disk): none",
        f"eviction: {config.cache.eviction_policy}; prefix cache {'on' if config.cache.enable_prefix_caching else 'off'}",
        f"pool layout: {kv.layout}, KV dtype: {kv.groups[0].dtype}, below the device: {config.cache.kv_codec}",
        f"kernels: {kernels}", *_why_not_ours(config.model.attention_impl, device.platform, kernels),
        f"{len(executor.shapes)} step executables, ready in {compile_seconds:.1f} s",
    )


def _why_not_ours(impl: str, platform: str, kernels: str) -> tuple[str, ...]:
    """A line where "auto" leaves the platform's own attention kernel aside."""
    own = f"mosaic_{platform}"
    if impl != "auto" or own not in ATTENTION_IMPLS or f"ragged_paged_attention {own}" in kernels:
        return ()
    return (f"attention_impl auto: XLA; {own} is there, but no result on this hardware is committed: --attention-impl {own} "
            "takes it",)


@contextlib.contextmanager
def _refusals(impl: str) -> Iterator[None]:
    """Kernels that refuse the model or the cache end the start in one line, which gives their reasons."""
    try:
        yield
    except (NotImplementedError, ExceptionGroup) as error:
        reasons = list(_leaves(error))
        if not all(isinstance(reason, NotImplementedError) for reason in reasons):
            raise
        text = "; ".join(dict.fromkeys(map(str, reasons)))
        raise ConfigError(f"attention_impl {impl} cannot serve this: {text}") from None


@contextlib.contextmanager
def _memory_for(what: str) -> Iterator[None]:
    """Too little memory for something, on the device or the host, ends the start in one line."""
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError, ValueError) as error:  # the latter of functions that have run before
        if not isinstance(error, MemoryError) and not ran_out_of_memory(error):
            raise
        reason = str(error).partition("\n")[0] or "MemoryError"
        raise ConfigError(f"the device's memory does not hold {what} ({reason})") from None


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from _leaves(inner)
    else:
        yield error


def _advance(bar: tqdm, done: int, total: int) -> None:
    bar.total = total
    bar.update(done - bar.n)


def _logged() -> Callable[[int, int], None]:
    """Progress as lines in the log, ``LOG_S`` apart."""
    last = time.monotonic()

    def advance(done: int, total: int) -> None:
        nonlocal last
        if (now := time.monotonic()) - last >= LOG_S:
            last = now
            log.info("compiling step executables: %d of %d", done, total)

    return advance
