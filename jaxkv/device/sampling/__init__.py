"""Sampling inside the step: pure functions from logits to tokens and log-probabilities.

slots.py     what the device remembers of a sequence (token history, biases, stop ids) and the penalties made of it
sampler.py   the choice of a token: order of operations, greedy and random
masks.py     which tokens a grammar lets a row choose
noise.py     random numbers that depend on (seed, child, position, token) and nothing else
logprobs.py  log-probabilities of sampled and of prompt tokens

Top-k, top-p, min-p and the choice among what they keep are ``pallas_kernels.sampling``.
"""

from jaxkv.device.sampling.logprobs import TokenLogprobs, prompt_logprobs, token_logprobs
from jaxkv.device.sampling.masks import mask_words
from jaxkv.device.sampling.sampler import SamplingColumns, columns_for, sample
from jaxkv.device.sampling.slots import (
    SamplerState,
    admit,
    admit_arguments,
    admit_pieces,
    init_sampler_state,
    sampler_bytes,
)

__all__ = [
    "SamplerState",
    "SamplingColumns",
    "TokenLogprobs",
    "admit",
    "admit_arguments",
    "admit_pieces",
    "columns_for",
    "init_sampler_state",
    "mask_words",
    "prompt_logprobs",
    "sample",
    "sampler_bytes",
    "token_logprobs",
]
