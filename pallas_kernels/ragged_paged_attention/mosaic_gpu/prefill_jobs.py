"""Work of the prefill kernel as arrays: jobs, and an order of rows in which every job starts at a multiple of 8.

TMA moves a swizzled tile of shared memory in groups of 8 rows, but the tiles of ragged sequences start anywhere. So the kernel
reads and writes rows in a *packed* order, in which every tile of the plan is padded to a multiple of 8. The gather into that
order fuses with whatever makes the queries, the one out of it with whatever merges the result. Nothing here depends on a
layer: XLA keeps one copy of it per step.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ..geometry import I32, cumulative
from .plan import PREFILL_ROWS, ROW_ALIGN

FIELDS = 6


class Jobs(NamedTuple):
    """total: [1] int32, jobs that there are. fields: [J, 6] int32, of which the first `total` rows are defined: packed row of
    a job's first query, its queries, its sequence, the position of its first query, the first key that any query of the
    sequence sees, kv_len.

    source: [R] int32, the row of q in every packed row. packed, job, at: [T] int32, the packed row, job and place in the job of
    every row of q; something valid for rows of q that no tile has.
    """

    total: jax.Array
    fields: jax.Array
    source: jax.Array
    packed: jax.Array
    job: jax.Array
    at: jax.Array


def make_jobs(
    tiles: jax.Array, kv_lens: jax.Array, cu_q_lens: jax.Array, tokens: int, job_rows: int, window: int | None
) -> Jobs:
    """Tiles [n, 4] int32 (sequence, first row of q, rows, _) cut into jobs of at most `job_rows`, a divisor of PREFILL_ROWS.

    Jobs come in the reverse order of the tiles: in a sequence, those that see the most keys start first.
    """
    count, cuts = tiles.shape[0], PREFILL_ROWS // job_rows
    seq, first_row, rows = jnp.clip(tiles[:, 0], 0, kv_lens.shape[0] - 1), tiles[:, 1], tiles[:, 2]
    start = cumulative((rows + ROW_ALIGN - 1) // ROW_ALIGN * ROW_ALIGN)  # packed row of every tile
    cut = cumulative((rows + job_rows - 1) // job_rows)
    total = cut[-1]

    number = total - 1 - jnp.arange(count * cuts, dtype=I32)
    tile = _owner(cut, number)
    begin = (number - cut[tile]) * job_rows
    s = seq[tile]
    position = kv_lens[s] - cu_q_lens[s + 1] + first_row[tile] + begin
    first = jnp.zeros_like(s)
    if window is not None:
        first = jnp.maximum(first, kv_lens[s] - (cu_q_lens[s + 1] - cu_q_lens[s]) - window + 1)
    fields = jnp.stack([start[tile] + begin, jnp.clip(rows[tile] - begin, 0, job_rows), s, position, first, kv_lens[s]], axis=1)

    most = tokens + (ROW_ALIGN - 1) * min(count, tokens)
    row = jnp.arange(-(-most // ROW_ALIGN) * ROW_ALIGN + PREFILL_ROWS, dtype=I32)  # a job reads a whole tile
    owner = _owner(start, row)
    ahead = row - start[owner]
    source = jnp.clip(first_row[owner] + ahead, 0, tokens - 1)
    packed = jnp.zeros(tokens, I32).at[jnp.where(ahead < rows[owner], source, tokens)].set(row, mode="drop")
    ahead = packed - start[owner[packed]]
    job = jnp.clip(total - 1 - cut[owner[packed]] - ahead // job_rows, 0, count * cuts - 1)
    return Jobs(total[None], fields, source, packed, job, ahead % job_rows)


def _owner(starts: jax.Array, number: jax.Array) -> jax.Array:
    """Which of n owners has each number, given their `starts` [n + 1]; a valid one for any number."""
    return jnp.clip(jnp.searchsorted(starts, number, side="right").astype(I32) - 1, 0, starts.shape[0] - 2)
