"""The device's memory runs out, truly: XLA is asked for more than there can be. The step's requests end, all others answer
what the dense oracle says, no page is lost, and it may happen again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkv import LLM
from jaxkv.config import ConfigError
from jaxkv.runtime.executor import JaxExecutor
from jaxkv.types import Tier
from tests.engine_harness import disk_store, engine, executor, greedy, run_all
from tests.test_oracle import assert_greedy, follow_ups, requests

PROMPT = [5, 9, 2, 33, 14, 60, 7, 21, 40, 3, 18, 25, 50, 11]
TOO_MUCH = 2**45  # floats


@jax.jit
def busy(x):
    return jax.lax.fori_loop(0, 30, lambda i, y: y @ y * 1e-3, jnp.ones((600, 600)) * x)[0, 0] * 0


def ask_for_too_much(tree, after):
    return jax.lax.optimization_barrier(tree), jnp.zeros((TOO_MUCH,), jnp.float32) + after


def exhaust():
    return jax.block_until_ready(jnp.zeros((TOO_MUCH,), jnp.float32))


wreck = jax.jit(ask_for_too_much, donate_argnums=0)


def at_dispatch(tree):
    """A donating call whose arguments are ready: on one device it raises, and they are gone all the same."""
    jax.block_until_ready(tree)
    try:
        return wreck(tree, jnp.float32(0))[0]
    finally:
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(tree))


def at_dispatch_again(tree):
    """The same, on one device, of a function that has run before: JAX then calls it another way, which raises another error."""
    copy = jax.block_until_ready(jax.tree.map(jnp.copy, tree))
    with pytest.raises(jax.errors.JaxRuntimeError):
        jax.block_until_ready(at_read(copy))
    with pytest.raises(ValueError, match="RESOURCE_EXHAUSTED") as raised:
        at_dispatch(tree)
    raise raised.value


def at_read(tree):
    """One that must wait for an argument: it returns, its results are an error, and so is all that is made of them."""
    return wreck(tree, busy(jnp.float32(1)))[0]


class Faults:
    """Calls of one of the executor's functions, numbered as they come, of which those in ``at`` find no memory."""

    def __init__(self, run, monkeypatch, what, how, at):
        self.count, self.hits, self.guilty = 0, 0, set()
        self._how, self._at = how, at
        if what == "step":
            calls = {shape: self._failing(step, 1) for shape, step in run.executor.steps.items()}
            monkeypatch.setattr(run.executor, "steps", calls)
        else:
            calls = {key: self._failing(op, 0, keeps=what == "gather") if key[1] == what else op
                     for key, op in run.executor.tiers.ops.items()}
            monkeypatch.setattr(run.executor.tiers, "ops", calls)
        commit = run.scheduler.commit

        def watched(plan, result, now):
            if result.failed:
                self.guilty |= {chunk.request_id.partition("#")[0] for chunk in plan.chunks}
            return commit(plan, result, now)

        monkeypatch.setattr(run.scheduler, "commit", watched)

    def _failing(self, function, donated, keeps=False):
        def call(*args):
            self.count += 1
            if self.count in self._at:
                self.hits += 1
                given = jax.tree.map(jnp.copy, args[donated]) if keeps else args[donated]
                args = (*args[:donated], self._how(given), *args[donated + 1:])
            return function(*args)
        return call


def check_run(run, faults, windows):
    """Two rounds of requests, with faults; then the first again, without."""
    results = dict(run_all(run, requests(1)))
    results |= run_all(run, follow_ups(results, 2))
    failed = {name.partition("/")[0] for name, r in results.items() if r.deltas[-1].finish_reason == "error"}
    assert faults.hits == len(faults._at)
    assert failed <= faults.guilty and len(failed) < len(results)
    assert all("memory ran out" in r.deltas[-1].error for r in results.values() if r.deltas[-1].finish_reason == "error")
    after = run_all(run, {f"again {name}": request for name, request in requests(1).items()})
    assert all(r.deltas[-1].finish_reason == "length" for r in after.values())
    mismatches = [0, 0]
    assert_greedy(windows, results | after, mismatches)
    assert mismatches[1] > 150 and mismatches[0] <= 0.001 * mismatches[1]
    assert run.metrics.finished["error"] == sum(r.deltas[-1].finish_reason == "error" for r in results.values())
    assert run.metrics.device.pages_active == 0


@pytest.mark.parametrize("overlap", [False, True], ids=["sync", "overlap"])
@pytest.mark.parametrize("model, host_pages, how", [
    ((False,), 0, at_dispatch), ((False,), 0, at_read), ((False,), 40, at_dispatch), ((False,), 40, at_dispatch_again),
    ((False,), 40, at_read), ((True,), 40, at_dispatch), ((True,), 40, at_dispatch_again), ((True,), 40, at_read),
    ((False, 2), 40, at_dispatch), ((False, 2), 40, at_read)])
def test_a_step_without_memory(model, host_pages, how, overlap, highest_precision, monkeypatch, caplog):
    run = engine(executor(*model), pages=20, host_pages=host_pages, overlap=overlap)
    faults = Faults(run, monkeypatch, "step", how, {9, 40})
    check_run(run, faults, model[0])
    assert run.metrics.lost_steps == 2 and caplog.text.count("memory ran out") == 2


@pytest.mark.parametrize("how", [at_dispatch, at_read])
@pytest.mark.parametrize("what", ["gather", "scatter", "copy"])
def test_moves_without_memory(what, how, highest_precision, monkeypatch):
    run = engine(executor(True), pages=20, host_pages=40)
    faults = Faults(run, monkeypatch, what, how, {2, 6})
    check_run(run, faults, True)
    if (what, how) != ("gather", at_read):  # then it is a host page that perhaps nobody asks for
        assert 1 <= run.metrics.lost_steps <= 2, "both may hit one step, or the second one that is void"


@pytest.mark.parametrize("how", [at_dispatch, at_read])
def test_host_and_disk_give_back_what_they_have(how, highest_precision, monkeypatch, tmp_path):
    """A page of a prefix that only HBM had is computed again, and what host and disk hold behind it comes from there."""
    pytest.importorskip("xxhash", reason="the disk tier needs xxhash")
    run = engine(executor(False), pages=20, host_pages=40, disk=disk_store(tmp_path, executor(False), refresh_s=0.01))
    faults = Faults(run, monkeypatch, "step", how, {9, 40})
    check_run(run, faults, False)
    cache = run.scheduler.cache
    kept = len(cache.host_pages())
    assert kept and cache.usage()[Tier.HOST] == (kept,)
    assert cache.stats.host_hit_tokens + cache.stats.disk_hit_tokens > 0
    run.close()


def test_no_memory_for_new_pools_is_the_end(monkeypatch):
    run = engine(executor(False))
    zero_state = run.executor._zero_state
    Faults(run, monkeypatch, "step", at_read, {1})
    monkeypatch.setattr(run.executor, "_zero_state", lambda: zero_state() and exhaust())
    run.add_request("r", PROMPT, greedy(3))
    try:
        with pytest.raises(jax.errors.JaxRuntimeError, match="memory"):
            while run.has_work:
                run.step()
    finally:
        run.executor.state = zero_state()


def test_another_error_of_a_step_is_the_end(monkeypatch):
    run = engine(executor(False))

    def crash(*args):
        raise jax.errors.JaxRuntimeError("INTERNAL: the device fell off the bus")

    monkeypatch.setattr(run.executor, "steps", dict.fromkeys(run.executor.steps, crash))
    run.add_request("r", PROMPT, greedy(3))
    with pytest.raises(jax.errors.JaxRuntimeError, match="bus"):
        run.step()


@pytest.mark.parametrize("when, expected", [("_run_empty_steps", ConfigError), ("_pack", jax.errors.JaxRuntimeError)])
def test_no_memory_at_the_start_is_one_line(when, expected, monkeypatch):
    """For the pools, or for the first run of a step; what else the device says stays as it is."""
    def fail(*args):
        return exhaust() if expected is ConfigError else crash()

    def crash():
        raise jax.errors.JaxRuntimeError("INTERNAL: the device fell off the bus")

    monkeypatch.setattr(JaxExecutor, when, fail)
    with pytest.raises(expected, match="lower kv_cache_memory, max_num_seqs or max_num_batched_tokens|bus"):
        LLM(max_model_len=64, max_num_seqs=1, max_num_batched_tokens=16, kv_cache_memory=2**20, host_kv_memory=0)


def test_an_empty_step_changes_nothing(highest_precision):
    """Every executable runs once before the first request; the state is then as good as new."""
    run = executor(False)
    run.state = run._zero_state()
    first, before = jax.tree.map(np.asarray, run.state), dict(run.steps)
    ran = []

    def counted(shape):
        def step(*args):
            ran.append(shape)
            return before[shape](*args)
        return step

    run.steps = {shape: counted(shape) for shape in before}
    try:
        run._run_empty_steps()
    finally:
        run.steps = before
    assert ran == list(run.shapes)
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, run.state), first)
