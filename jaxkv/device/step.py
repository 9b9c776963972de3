"""The one step: embed, run the layers (each writes its KV, then attends), sample, return the donated state.

There is no prefill and no decode mode: a step is a ragged set of chunks and decode is a chunk of length 1.
Everything that varies from step to step comes in one int32 buffer (see ``batch``), but for the token masks: their size
goes with the vocabulary, and a step without structured output takes an array that is already on the device.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import pallas_kernels as ops
from jaxkv.device import models, sampling
from jaxkv.device.batch import BatchLayout
from jaxkv.device.sampling import SamplingColumns
from jaxkv.device.spec import KVSpec, ModelSpec
from jaxkv.device.state import EngineState


class StepOutput(NamedTuple):
    """By logit row, and by token for prompt log-probabilities; zeros where nothing was asked for."""

    tokens: jax.Array  # i32 [R]
    logprobs: sampling.TokenLogprobs  # of the sampled tokens, [R] and [R, N]
    prompt_logprobs: sampling.TokenLogprobs  # of the next prompt token, [T] and [T, N]
    hidden: jax.Array  # [R, d_model], what the logits were made of; there anyway, read by the host for embeddings only


def build_step(
    spec: ModelSpec, kv: KVSpec, layout: BatchLayout, mesh: Mesh, attention_impl: str = "auto"
) -> Callable[[tuple, EngineState, jax.Array, jax.Array], tuple[EngineState, StepOutput]]:
    """The step function of one batch shape, to be jitted with the state donated.

    ``attention_impl`` forces the kernels of a family: attention, and the KV write where the family has its own (page
    moves follow it too, see ``page_ops``).
    """
    mesh_ops = ops.MeshOps(mesh, kv.layout)
    write_impl = attention_impl if attention_impl in ops.KV_WRITE_IMPLEMENTATIONS else "auto"
    where = {layer: (g, i) for g, group in enumerate(kv.groups) for i, layer in enumerate(group.layers)}
    whole, by_heads = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec(None, "tp"))
    max_q_len = 1 if layout.shape.decode else None
    # jitted: traced once per group, not once per layer
    attention = [jax.jit(partial(mesh_ops.ragged_paged_attention, scale=spec.scale, window=group.window,
                                 soft_cap=spec.soft_cap, max_q_len=max_q_len, impl=attention_impl)) for group in kv.groups]

    def step(params: tuple, state: EngineState, buffer: jax.Array, masks: jax.Array) -> tuple[EngineState, StepOutput]:
        """``buffer`` as packed by ``layout``; ``masks`` i32 [R, W], see ``sampling.masks``."""
        b = layout.unpack(buffer)
        slots = [_kv_slots(b["page_table"][g], b, kv.page_size, n) for g, n in enumerate(kv.num_pages)]
        pools = [list(group) for group in state.pools]

        def attend(layer: int, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            g, i = where[layer]
            pools[g][i] = mesh_ops.kv_write(pools[g][i], k, v, slots[g], impl=write_impl)
            return attention[g](q, pools[g][i], b["page_table"][g], b["kv_lens"][g], b["cu_q_lens"],
                                plan=b["attention_plan"][g])

        ids = b["token_ids"]
        ids = jnp.where(ids < 0, state.last_tokens[jnp.maximum(~ids, 0)], ids)
        last_layer = models.forward(spec, params, ids, b["positions"], attend)

        def finish(x: jax.Array, y: jax.Array) -> jax.Array:
            # Said, because the partitioner would else split the residual stream of all layers and gather it for each product.
            x, y = jax.lax.with_sharding_constraint((x, y), (whole, by_heads))
            return jax.lax.with_sharding_constraint(models.finish(spec, params, x, y), whole)

        rows = finish(*(x.at[b["row_token"]].get(mode="promise_in_bounds") for x in last_layer))
        columns = SamplingColumns(**{n: b["row_" + n if "row_" + n in b else n] for n in SamplingColumns._fields})
        tokens, sampler, logprobs = sampling.sample(models.logits(spec, params, rows), columns, state.sampler, masks)
        prompt = sampling.prompt_logprobs(last_layer, b["prompt_targets"],
                                          lambda x, y: models.logits(spec, params, finish(x, y)))
        last = state.last_tokens.at[b["row_slot"]].set(tokens, mode="drop")
        return EngineState(tuple(map(tuple, pools)), last, sampler), StepOutput(tokens, logprobs, prompt, rows)

    return step


def _kv_slots(page_table: jax.Array, b: dict[str, jax.Array], page_size: int, num_pages: int) -> jax.Array:
    """Where each token's KV goes, i32 [T]: page * page_size + offset, out of range for padding."""
    index = b["cache_index"]
    page = page_table[b["token_seq"], jnp.maximum(index, 0) // page_size]
    return jnp.where(index < 0, num_pages * page_size, page * page_size + index % page_size)
