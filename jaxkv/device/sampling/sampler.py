"""The choice of one token per logit row, inside the step.

Order, as in vLLM: token mask, stop-id ban and bias, penalties, temperature, min_p, top_k, top_p, random choice: nothing
gives back what the mask took. Each part that costs something sits behind a ``lax.cond`` on "some row wants it", so that
one executable serves every request and a greedy batch pays for an argmax only. A row without a finite logit yields
token 0, a row of NaN yields NO_TOKEN.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxkv.device.sampling.logprobs import TokenLogprobs, empty_logprobs, token_logprobs
from jaxkv.device.sampling.masks import mask_logits
from jaxkv.device.sampling.noise import exponential, row_keys
from jaxkv.device.sampling.slots import SamplerState, adjust_logits, count_outputs
from jaxkv.params import SamplingParams
from pallas_kernels.sampling.api import truncated_argmax
from pallas_kernels.sampling.rows import any_of, argmax_rows

USES_SLOT_STATE = 1  # bits of SamplingColumns.flags
BAN_STOP_IDS = 2
WANTS_LOGPROBS = 4
MASKED = 8
NO_TOKEN = -1  # of a row of NaN
_GREEDY_BELOW = 1e-5  # temperatures below it are greedy, as in vLLM


class SamplingColumns(NamedTuple):
    """One entry per logit row, [R]."""

    temperature: jax.Array  # f32; 0: greedy, lowest id among equals
    top_k: jax.Array  # i32; 0: off
    top_p: jax.Array  # f32; 1: off
    min_p: jax.Array  # f32; 0: off
    repetition_penalty: jax.Array  # f32; 1: off
    presence_penalty: jax.Array  # f32; 0: off
    frequency_penalty: jax.Array  # f32; 0: off
    seed_lo: jax.Array  # i32, low half of the 64-bit seed
    seed_hi: jax.Array  # i32
    child: jax.Array  # i32
    position: jax.Array  # i32, of the token to be sampled
    slot: jax.Array  # i32; >= B: padding, nothing is wanted
    flags: jax.Array  # i32: 1 uses slot state, 2 stop ids are banned (with 1 only), 4 wants logprobs, 8 is masked


def columns_for(params: SamplingParams, seed: int, child: int) -> dict[str, int | float]:
    """What a request puts into its rows' columns; position, slot and the flags of a step (ban, mask) are not here."""
    low, high = np.array([seed & (1 << 64) - 1], np.uint64).view(np.int32).tolist()
    flags = USES_SLOT_STATE * params.needs_slot_state | WANTS_LOGPROBS * (params.logprobs is not None)
    return {
        "temperature": params.temperature, "top_k": min(params.top_k, 2**31 - 1), "top_p": params.top_p,
        "min_p": params.min_p, "repetition_penalty": params.repetition_penalty,
        "presence_penalty": params.presence_penalty, "frequency_penalty": params.frequency_penalty,
        "seed_lo": low, "seed_hi": high, "child": child, "flags": flags,
    }


def sample(
    logits: jax.Array, columns: SamplingColumns, state: SamplerState, masks: jax.Array
) -> tuple[jax.Array, SamplerState, TokenLogprobs]:
    """For logits f32 [R, V] and token masks i32 [R, W], read where the flag is set: tokens i32 [R], the state with them
    counted, log-probabilities (zeros if unwanted).

    NaN is looked for in the first column: a hidden state with NaN, or with an infinity, makes every logit of its row NaN.
    """
    slots = state.history.shape[0]
    active = columns.slot < slots
    stateful = active & (columns.flags & USES_SLOT_STATE != 0)
    random = active & (columns.temperature >= _GREEDY_BELOW)
    masked = active & (columns.flags & MASKED != 0)
    slot = jnp.where(stateful, columns.slot, slots)

    any_stateful, any_random, any_masked, wants = any_of(
        stateful, random, masked, active & (columns.flags & WANTS_LOGPROBS != 0))

    def choose() -> jax.Array:
        inverse = jnp.where(random, 1.0 / jnp.maximum(columns.temperature, _GREEDY_BELOW), 1.0)

        def adjusted(x: jax.Array) -> jax.Array:
            return _relative(adjust_logits(x, state, slot, columns.flags & BAN_STOP_IDS != 0, columns.repetition_penalty,
                                           columns.presence_penalty, columns.frequency_penalty), inverse)

        z = lax.cond(any_masked | any_stateful,  # no branch returns logits: that would copy them
                     lambda: adjusted(mask_logits(logits, masks, masked)), lambda: _relative(logits, inverse))
        return lax.cond(any_random, lambda: _choose_randomly(z, columns, random), lambda: argmax_rows(z))

    tokens = lax.cond(any_stateful | any_random | any_masked, choose, lambda: argmax_rows(logits))
    logprobs = lax.cond(wants, lambda: token_logprobs(logits, tokens), lambda: empty_logprobs(tokens.shape[0]))
    found = jnp.where(jnp.isnan(logits[:, 0]), NO_TOKEN, tokens)
    return found, count_outputs(state, slot, tokens), logprobs


def _relative(logits: jax.Array, inverse_temperature: jax.Array) -> jax.Array:
    """Log-probabilities up to a constant, f32 [R, V]: 0 for the likeliest token, else below."""
    limit = jnp.finfo(jnp.float32).max  # infinities become finite where they would make inf - inf
    best = jnp.clip(jnp.max(logits, axis=1, keepdims=True), -limit, limit)
    return (jnp.minimum(logits, limit) - best) * inverse_temperature[:, None]


def _choose_randomly(z: jax.Array, columns: SamplingColumns, random: jax.Array) -> jax.Array:
    """Random rows by an exponential race, argmax of p / noise (Gumbel with one logarithm less), others greedy."""
    keys = row_keys(columns.seed_lo, columns.seed_hi, columns.child, columns.position)
    race = jnp.where(random[:, None], jnp.exp(z) / exponential(keys, z.shape[1]), z)
    return truncated_argmax(race, z, jnp.where(random, columns.top_k, 0), jnp.where(random, columns.top_p, 1.0),
                            jnp.where(random, columns.min_p, 0.0))
