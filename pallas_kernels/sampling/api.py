"""Public `truncated_argmax`: validation and choice of implementation."""

from __future__ import annotations

import jax

from ..dispatch import dispatch
from . import ref, xla

IMPLEMENTATIONS = {"xla": xla.truncated_argmax, "ref": ref.truncated_argmax}


def truncated_argmax(
    race: jax.Array, z: jax.Array, top_k: jax.Array, top_p: jax.Array, min_p: jax.Array, *, impl: str = "auto"
) -> jax.Array:
    """Index i32 [R] of the largest ``race`` f32 [R, V] among the tokens that min-p, top-k and top-p keep.

    z: f32 [R, V], log-probabilities up to a constant: 0 for the likeliest token of a row, else below, -inf: never kept;
    denormal values may count as 0. top_k: i32 [R], 0 or at least V: off; top_p: f32 [R], 1 or more: off; min_p: f32 [R]
    in [0, 1], 0: off. Lowest index among equals; 0 in a row that keeps nothing; a row of NaN gives some index.

    As in vLLM: min_p (against the likeliest token), then top_k, then top_p over what is left, renormalised. A token is
    kept or dropped by its z alone, so all ties at a border are kept (as in vLLM's and Hugging Face's top-k; their top-p
    breaks ties by sort order); the likeliest token is always kept. Mass is counted in integers, see `border`: all
    implementations agree exactly, and with real numbers up to 2^-29 of a row's mass per token.
    ValueError: shapes or dtypes that do not belong together.
    """
    if race.ndim != 2 or race.shape != z.shape or race.dtype != "float32" or z.dtype != "float32":
        raise ValueError(f"race and z must be float32 [R, V] of one shape, got {race.dtype} {race.shape} and "
                         f"{z.dtype} {z.shape}")
    for name, column, dtype in (("top_k", top_k, "int32"), ("top_p", top_p, "float32"), ("min_p", min_p, "float32")):
        if column.shape != z.shape[:1] or column.dtype != dtype:
            raise ValueError(f"{name} must be {dtype} [{z.shape[0]}] to match z {z.shape}, got {column.dtype} {column.shape}")
    return dispatch("truncated_argmax", IMPLEMENTATIONS, impl, race, z, top_k, top_p, min_p)
