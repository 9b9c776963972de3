"""The dense oracle: one forward over the whole sequence, no cache, no pages, attention by a plain masked softmax.

It shares the layers' code with the engine (checked against transformers in tests/device/models) and nothing of its
attention, cache, scheduling or sampling.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxkv.device import models
from jaxkv.device.spec import ModelSpec


def dense_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, *, scale: float, window: int | None = None, soft_cap: float | None = None
) -> jax.Array:
    """Causal attention of one whole sequence in float32: q [T, Hq, D], k and v [T, Hkv, D] -> [T, Hq, D]."""
    length, heads, dim = q.shape
    kv_heads = k.shape[1]
    grouped = q.astype(jnp.float32).reshape(length, kv_heads, heads // kv_heads, dim)
    scores = jnp.einsum("qhgd,khd->hgqk", grouped, k.astype(jnp.float32), precision="highest") * scale
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    distance = np.arange(length)[:, None] - np.arange(length)[None, :]
    seen = (distance >= 0) & (distance < (length if window is None else window))
    weights = jax.nn.softmax(jnp.where(seen[None, None], scores, -jnp.inf), axis=-1)
    out = jnp.einsum("hgqk,khd->qhgd", weights, v.astype(jnp.float32), precision="highest")
    return out.reshape(length, heads, dim).astype(q.dtype)


@partial(jax.jit, static_argnums=0)
def _dense_logits(spec: ModelSpec, params: models.Params, tokens: jax.Array) -> jax.Array:
    def attend(layer: int, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return dense_attention(q, k, v, scale=spec.scale, window=spec.windows[layer], soft_cap=spec.soft_cap)

    with jax.default_matmul_precision("highest"):
        positions = jnp.arange(tokens.shape[0], dtype=jnp.int32)
        hidden = models.finish(spec, params, *models.forward(spec, params, tokens, positions, attend))
        return models.logits(spec, params, hidden)


def dense_logits(spec: ModelSpec, params: models.Params, tokens: np.ndarray | list[int]) -> jax.Array:
    """Logits float32 [T, V] at every position of one sequence; one compile per length."""
    return _dense_logits(spec, params, jnp.asarray(tokens, jnp.int32))


class DenseOracle:
    """Greedy truth for given sequences; lengths are padded to a multiple of ``bucket`` to bound the compiles."""

    def __init__(self, spec: ModelSpec, params: models.Params, bucket: int = 64) -> None:
        self.spec, self.params, self.bucket = spec, params, bucket

    def logits(self, tokens: list[int]) -> np.ndarray:
        """float32 [len(tokens), V]; causality makes the padding behind invisible."""
        padded = [*tokens, *[0] * (-len(tokens) % self.bucket)]
        return np.asarray(dense_logits(self.spec, self.params, padded))[: len(tokens)]

    def teacher_forced(self, prompt: list[int], generated: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """For each generated position, given all tokens before it: the greedy token and the top-2 logit gap.

        One forward; both arrays have length len(generated). Equal tokens, or a small gap, at every position is what an
        engine's greedy output must satisfy.
        """
        rows = self.logits([*prompt, *generated[:-1]])[len(prompt) - 1 :]
        top = np.partition(rows, -2, axis=-1)[:, -2:]
        return rows.argmax(-1), top[:, 1] - top[:, 0]

    def greedy(self, prompt: list[int], count: int) -> tuple[list[int], list[float]]:
        """``count`` greedy tokens after the prompt and their top-2 gaps; one forward per token (small models only)."""
        tokens, gaps = list(prompt), []
        for _ in range(count):
            row = self.logits(tokens)[-1]
            second, first = np.partition(row, -2)[-2:]
            tokens.append(int(row.argmax()))
            gaps.append(float(first - second))
        return tokens[len(prompt) :], gaps
