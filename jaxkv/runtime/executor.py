"""Runs plans on the devices: page moves, admissions, one packed buffer, one executable. Decides nothing.

Owns the device state and the host's mirror of the page tables and sampling settings by slot. All JAX work of the
engine is dispatched from here, on one thread, in plan order.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection
from itertools import accumulate

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import pallas_kernels as ops
from jaxkv.device import sampling
from jaxkv.device.batch import FIELDS, BatchLayout, BatchShape, batch_shapes, choose_shape
from jaxkv.device.sampling.sampler import BAN_STOP_IDS, MASKED
from jaxkv.device.spec import KVSpec, ModelSpec
from jaxkv.device.state import compile_zero_state
from jaxkv.device.step import StepOutput
from jaxkv.runtime.compile import ADMIT_TOKENS, compile_admit, compile_steps
from jaxkv.runtime.disk import DiskStore
from jaxkv.runtime.page_ops import PageForm
from jaxkv.runtime.structured.matchers import TokenMasks
from jaxkv.runtime.tiers import Tiers
from jaxkv.types import Admit, Arrival, Chunk, Logprobs, StepHandle, StepPlan, StepResult

log = logging.getLogger("jaxkv")

_BY_SLOT = [f for f in FIELDS if f.dims == ("R",) and not f.name.startswith("row_")]


class JaxExecutor:
    """``submit`` enqueues a plan and returns at once; the handle's ``read`` waits for its tokens."""

    def __init__(
        self, spec: ModelSpec, params: tuple, kv: KVSpec, mesh: Mesh, *, max_num_seqs: int, max_num_batched_tokens: int,
        max_model_len: int, host_bytes: int = 0, attention_impl: str = "auto", form: PageForm | None = None,
        disk: DiskStore | None = None, check_batches: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.kv, self.mesh, self.slots, self.params = kv, mesh, max_num_seqs, params
        self.shapes = batch_shapes(max_num_seqs, max_num_batched_tokens)
        # CPU seconds of this thread, but for "wait": wall seconds until a result was there
        self.stage_seconds = {"moves": 0.0, "pack": 0.0, "dispatch": 0.0, "wait": 0.0}
        self._pages_per_seq = -(-max_model_len // kv.page_size)
        self._tables = np.full((len(kv.groups), max_num_seqs, self._pages_per_seq), -1, np.int32)  # -1: no page
        self._by_slot = {f.name: np.zeros(max_num_seqs, np.dtype(f.dtype)) for f in _BY_SLOT}
        self._ban_until = np.zeros(max_num_seqs, np.int32)  # first position at which stop ids may be sampled
        self._check_batches = check_batches
        self._logprobs = [False] * max_num_seqs
        self._embed = [False] * max_num_seqs
        self.tiers = Tiers(kv, mesh, host_bytes, form or PageForm(kv, mesh), disk, attention_impl, check_batches)
        self._zero_state = compile_zero_state(kv, max_num_seqs, spec.vocab_size, mesh)
        self.state = self._zero_state()
        self._planners = {s: _planner(spec, kv, s, mesh.size, attention_impl) for s in self.shapes}
        self._layouts = {s: BatchLayout(s, len(kv.groups), self._pages_per_seq, p.size) for s, p in self._planners.items()}
        self.steps = compile_steps(spec, kv, mesh, params, self.state, self._layouts, attention_impl, progress)
        self._vocab = spec.vocab_size
        self._admit_op = compile_admit(self.state, mesh)
        whole = NamedSharding(mesh, PartitionSpec())  # masks of a step that has none: never read, never sent again
        self._no_masks = {r: jax.device_put(np.zeros((r, sampling.mask_words(spec.vocab_size)), np.int32), whole)
                          for r in {s.rows for s in self.shapes}}
        self._run_empty_steps()

    def submit(self, plan: StepPlan, masks: TokenMasks | None = None) -> StepHandle:
        """Enqueues the plan's transfers, admissions and step, in this order. ``masks``: what some rows may choose. Where the
        device has no memory for one of them, here or later, the result is ``failed``, whatever was submitted after it is void,
        and ``restore`` comes next. JaxRuntimeError or ValueError for anything else."""
        try:
            return self._submit(plan, masks)
        except (jax.errors.JaxRuntimeError, ValueError) as error:  # the latter of functions that have run before
            return LostStep(plan, error)

    def restore(self, host_pages: Collection[tuple[int, int]]) -> None:
        """After a step without memory: forget all transfers under way and all host pages but these, (group, page), and where
        the step took the state along make a new one, zeroed. JaxRuntimeError or ValueError if there is no memory for that."""
        self.tiers.keep(host_pages)
        try:
            jax.block_until_ready(self.state)
        except jax.errors.JaxRuntimeError:  # donated to what failed, or the output of it
            for leaf in jax.tree.leaves(self.state):
                leaf.delete()
            self.state = self._zero_state()

    def _run_empty_steps(self) -> None:
        """Runs every step executable once, on no sequence: what its first run costs beyond the others no request pays, but for
        attention's part, and a step that does not fit the device's memory fails here. JaxRuntimeError then."""
        for shape, step in self.steps.items():
            self.state, _ = step(self.params, self.state, self._pack((), shape, None), self._no_masks[shape.rows])
        jax.block_until_ready(self.state)

    def _submit(self, plan: StepPlan, masks: TokenMasks | None) -> StepHandle:
        t0 = time.thread_time()
        if plan.moves or plan.landings or plan.fetches:
            self.state = self.state._replace(pools=self.tiers.apply(self.state.pools, plan))
        for admit in plan.admits:
            self._admit(admit)
        t1 = time.thread_time()
        output = None
        if plan.chunks:
            rows = sum(c.num_logits for c in plan.chunks)
            shape = choose_shape(self.shapes, plan.num_tokens, len(plan.chunks), rows)
            buffer = self._pack(plan.chunks, shape, masks)
            words = self._no_masks[shape.rows] if masks is None else masks.padded(shape.rows)
            t2 = time.thread_time()
            self.state, output = self.steps[shape](self.params, self.state, buffer, words)
            self.stage_seconds["pack"] += t2 - t1
            self.stage_seconds["dispatch"] += time.thread_time() - t2
        self.stage_seconds["moves"] += t1 - t0
        return Handle(plan, output, [self._logprobs[c.slot] for c in plan.chunks],
                      [self._embed[c.slot] for c in plan.chunks], self.stage_seconds)

    def arrivals(self) -> list[Arrival]:
        """Fetches that ended since the last call."""
        return self.tiers.fetches.arrivals()

    def wait_for_fetch(self, seconds: float) -> None:
        """Sleep until a fetch may have ended."""
        self.tiers.fetches.wait(seconds)

    def host_bytes_held(self) -> int:
        """Bytes of host memory the host tier holds, pages under way included."""
        return self.tiers.bytes_held()

    def _admit(self, admit: Admit) -> None:
        self._tables[:, admit.slot] = -1
        values = sampling.columns_for(admit.params, admit.seed, admit.child)
        for name, column in self._by_slot.items():
            column[admit.slot] = values[name]
        bans = admit.params.min_tokens and admit.params.structured is None  # else the mask knows better
        self._ban_until[admit.slot] = min(admit.prompt_len + admit.params.min_tokens, 2**31 - 1) if bans else 0
        self._logprobs[admit.slot] = admit.params.logprobs is not None
        self._embed[admit.slot] = admit.params.embed
        if admit.params.needs_slot_state:
            for args in sampling.admit_pieces(admit, self._vocab, ADMIT_TOKENS):
                self.state = self.state._replace(sampler=self._admit_op(self.state.sampler, *args))

    def _pack(self, chunks: tuple[Chunk, ...], shape: BatchShape, masks: TokenMasks | None) -> np.ndarray:
        """The buffer of a step; what the table's padding means is said in ``batch.FIELDS``."""
        buffer, b = self._layouts[shape].new()
        n, tables = len(chunks), self._tables
        for c in chunks:
            for g, (first, pages) in enumerate(c.pages):
                if pages:
                    tables[g, c.slot, first : first + len(pages)] = pages
                    tables[g, c.slot, first + len(pages) :] = -1
        slots = np.array([c.slot for c in chunks], np.int32)
        starts = np.array([c.start for c in chunks], np.int32)
        lens = np.array([len(c.tokens) for c in chunks], np.int32)
        ends = starts + lens
        cu = b["cu_q_lens"]
        np.cumsum(lens, out=cu[1 : n + 1])
        cu[n + 1 :] = total = cu[n]

        b["token_ids"][:total] = [t if t >= 0 else ~c.slot for c in chunks for t in c.tokens]
        index = np.arange(total, dtype=np.int32) + np.repeat(starts - cu[:n], lens)
        b["positions"][:total] = b["cache_index"][:total] = index
        b["cache_index"][total:] = -1
        b["token_seq"][:total] = np.repeat(np.arange(n, dtype=np.int32), lens)
        b["kv_lens"][:, :n] = ends
        b["page_table"][:, :n] = tables[:, slots]
        if self._check_batches:
            for group, most, table, kv_lens in zip(self.kv.groups, self.kv.num_pages, b["page_table"], b["kv_lens"]):
                ops.check_batch(table, kv_lens, cu, num_pages=most, page_size=self.kv.page_size, window=group.window)
        if b["attention_plan"].size:
            for g, group in enumerate(self.kv.groups):
                b["attention_plan"][g] = self._planners[shape](lens, ends, b["page_table"][g, :n], group.window)
        b["prompt_targets"][:] = -1
        for i, c in enumerate(chunks):
            if targets := _prompt_targets(c):
                b["prompt_targets"][cu[i] : cu[i] + len(targets)] = targets

        # row r of a chunk with k logits is its token len - k + r
        counts = np.array([c.num_logits for c in chunks], np.int32)
        rows = int(counts.sum())
        row_slots, row_ends = np.repeat(slots, counts), np.repeat(cu[1 : n + 1], counts)
        back = np.repeat(np.cumsum(counts), counts) - np.arange(rows, dtype=np.int32)
        b["row_token"][:rows] = row_ends - back
        b["row_position"][:rows] = np.repeat(ends, counts) - back + 1
        b["row_slot"][:rows] = row_slots
        b["row_slot"][rows:] = self.slots
        for name, column in self._by_slot.items():
            b[name][:rows] = column[row_slots]
        for name in ("top_p", "repetition_penalty"):
            b[name][rows:] = 1.0
        b["flags"][:rows] |= np.where(b["row_position"][:rows] < self._ban_until[row_slots], BAN_STOP_IDS, 0)
        if masks is not None:
            b["flags"][masks.rows] |= MASKED
        return buffer


def _planner(spec: ModelSpec, kv: KVSpec, shape: BatchShape, tp: int, impl: str) -> ops.AttentionPlanner:
    group = kv.groups[0]  # groups differ in windows only
    return ops.attention_planner(
        impl, tokens=shape.tokens, seqs=shape.seqs, q_heads=spec.num_heads // tp, kv_heads=group.kv_heads // tp,
        head_dim=group.head_dim, page_size=kv.page_size, kv_dtype=group.dtype, max_q_len=1 if shape.decode else None)


class Handle:
    """A step under way. Its small outputs start for the host at once and are read one step later."""

    def __init__(
        self, plan: StepPlan, output: StepOutput | None, logprobs: list[bool], embed: list[bool],
        stage_seconds: dict[str, float],
    ) -> None:
        self._plan, self._output, self._stage_seconds = plan, output, stage_seconds
        self._logprobs, self._embed = logprobs, embed  # by chunk
        if output is not None:
            wanted = [output.tokens]
            wanted += output.logprobs if any(logprobs) else ()
            wanted += output.prompt_logprobs if any(c.prompt_logprobs for c in plan.chunks) else ()
            wanted += [output.hidden] if any(embed) else ()
            for array in wanted:
                array.copy_to_host_async()

    def read(self) -> StepResult:
        """Waits for the step and gives its tokens by chunk, log-probabilities where the request asked for them."""
        if self._output is None:
            return StepResult(())
        try:
            return self._read(self._output)
        except jax.errors.JaxRuntimeError as error:
            return LostStep(self._plan, error).read()

    def _read(self, output: StepOutput) -> StepResult:
        chunks = self._plan.chunks
        t0 = time.perf_counter()
        sampled = np.asarray(output.tokens).tolist()
        self._stage_seconds["wait"] += time.perf_counter() - t0
        ends = list(accumulate(c.num_logits for c in chunks))
        rows = [range(end - c.num_logits, end) for c, end in zip(chunks, ends)]
        tokens = tuple(tuple(sampled[r.start : r.stop]) for r in rows)
        chosen: tuple = ()
        prompt: tuple = ()
        hidden: tuple = ()
        if any(self._logprobs):
            arrays = [np.asarray(a) for a in output.logprobs]
            chosen = tuple(_logprobs(t, arrays, r) if want else () for t, r, want in zip(tokens, rows, self._logprobs))
        if any(c.prompt_logprobs for c in chunks):
            arrays = [np.asarray(a) for a in output.prompt_logprobs]
            starts = accumulate((len(c.tokens) for c in chunks), initial=0)
            prompt = tuple(_logprobs(t := _prompt_targets(c), arrays, range(at, at + len(t)))
                           for c, at in zip(chunks, starts))
        if any(self._embed):
            array = np.asarray(output.hidden).astype(np.float32)
            hidden = tuple(tuple(array[r[-1]].tolist()) if want and r else () for r, want in zip(rows, self._embed))
        return StepResult(tokens, chosen, prompt, hidden)


def ran_out_of_memory(error: Exception) -> bool:
    """Whether that is what an error of the device says."""
    return "RESOURCE_EXHAUSTED" in str(error) or "out of memory" in str(error).lower()


class LostStep:
    """A step that the device had no memory for, which goes to the log. Raises ``error`` if it was another one.

    Buffers that were donated to such a step are gone, whether it failed at dispatch or later, and so is the output of every
    step after it, whose error then says "Out of memory" without its code (seen with jax 0.10.2 on a CPU).
    """

    def __init__(self, plan: StepPlan, error: Exception) -> None:
        if not ran_out_of_memory(error):
            raise error
        log.error("the device's memory ran out in a step of %d tokens of %d sequences: %s", plan.num_tokens, len(plan.chunks),
                  str(error).partition("\n")[0])

    def read(self) -> StepResult:
        return StepResult((), failed=True)


def _prompt_targets(chunk: Chunk) -> tuple[int, ...]:
    """The prompt tokens whose log-probability the chunk's positions give."""
    if not chunk.prompt_logprobs:
        return ()
    return chunk.tokens[1:] + ((chunk.next_token,) if chunk.next_token >= 0 else ())


def _logprobs(tokens: tuple[int, ...], arrays: list[np.ndarray], rows: range) -> tuple[Logprobs, ...]:
    """From the columns of sampling.TokenLogprobs: logprob [n], rank [n], top ids [n, N], top logprobs [n, N]."""
    chosen, rank, ids, values = arrays
    return tuple(Logprobs(t, float(chosen[r]), int(rank[r]), tuple(zip(ids[r].tolist(), values[r].tolist())))
                 for t, r in zip(tokens, rows))
