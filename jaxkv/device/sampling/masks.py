"""Token masks: which tokens a row may choose, one bit each, token t in bit t % 32 of word t // 32 (as llguidance writes it)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax


def mask_words(vocab: int) -> int:
    """Words of one row's mask."""
    return -(-vocab // 32)


def mask_logits(logits: jax.Array, masks: jax.Array, masked: jax.Array) -> jax.Array:
    """Logits f32 [R, V]; -inf where a row is ``masked`` bool [R] and its bit in ``masks`` i32 [R, W] is 0."""
    rows, vocab = logits.shape
    bits = masks[:, :, None] >> lax.broadcasted_iota(jnp.int32, (1, 1, 32), 2) & 1
    allowed = bits.reshape(rows, -1)[:, :vocab] != 0
    return jnp.where(allowed | ~masked[:, None], logits, -jnp.inf)
