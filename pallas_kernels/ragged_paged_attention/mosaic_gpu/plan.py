"""The host's half of attention on Hopper: a balanced, static-size work list, made once per step (FlashInfer's plan and run).

Short sequences become *tiles*: the query rows of one KV head (tokens x G heads, at most `TILE_ROWS`) that read one run of
keys. A sequence is one tile over its own keys; decodes that start with the same pages also share tiles over that prefix,
which is then read once for all of them (cascade attention). The keys of all tiles are laid end to end, in units of
`unit_keys`, and cut into equal ranges, one per worker, wherever the cuts fall (stream-K): no worker has more than one unit
above the mean. An *item* is a piece of one tile within one worker's range; its partial result is merged by tile afterwards.
Every KV head is worked through with the same list. Longer sequences become tiles of the prefill kernel.

Rows live in a *row space* of R rows in which every tile starts at a multiple of 8, as wide as a shared-memory tile.

The same code runs in numpy on the host and, where a caller has no plan, in jax.numpy inside the jit (without sharing).
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import jax
import numpy as np

from ...dispatch import ARGUMENT_ALIGN
from ..tuning import CHIPS, Chip, decode_tuning
from .prefix import FAR, Shared, find_shared

TILE_ROWS = 64  # of a wgmma
ROW_ALIGN = 8
PREFILL_ROWS = 128
ITEM_FIELDS, TILE_FIELDS, PREFILL_FIELDS = 8, 8, 4

Array = Any  # numpy or jax.numpy


class PlanSpec(NamedTuple):
    """What decides a plan's size and meaning; static. tokens, seqs: of the padded batch; groups: G; unit_keys: keys that a
    cut may fall between; workers: ranges per KV head; max_q_len: the longest sequence's queries."""

    tokens: int
    seqs: int
    groups: int
    unit_keys: int
    workers: int
    max_q_len: int

    @property
    def tile_tokens(self) -> int:
        """Most tokens in a tile."""
        return TILE_ROWS // self.groups

    @property
    def own_tokens(self) -> int:
        """Most tokens of a sequence that is a tile."""
        return min(self.tile_tokens, self.max_q_len)

    @property
    def own_rows(self) -> int:
        """Most rows of such a tile, rounded up."""
        return _round_up(self.own_tokens * self.groups, ROW_ALIGN)

    @property
    def prefill(self) -> bool:
        """Whether sequences may be longer than a tile."""
        return self.max_q_len > self.tile_tokens

    @property
    def shared_tiles(self) -> int:
        return self.seqs // 2

    @property
    def tiles(self) -> int:
        return self.seqs + self.shared_tiles

    @property
    def items(self) -> int:
        return self.tiles + self.workers

    @property
    def rows(self) -> int:
        """R: rows of all tiles, each rounded up."""
        own = min(self.tokens * self.groups + (ROW_ALIGN - 1) * self.seqs, self.seqs * self.own_rows)
        shared = self.seqs * self.groups + (ROW_ALIGN - 1) * self.shared_tiles
        return _round_up(own + shared, ROW_ALIGN)

    @property
    def partial_rows(self) -> int:
        """Rows of all items: those of the tiles, and once more for every cut."""
        return self.rows + self.workers * TILE_ROWS

    @property
    def prefill_tiles(self) -> int:
        """One query head each is not in the list: (sequence, first row, rows)."""
        return self.tokens // PREFILL_ROWS + min(self.seqs, self.tokens // (self.tile_tokens + 1)) if self.prefill else 0

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {
            "items": (self.items, ITEM_FIELDS),
            "worker_items": (self.workers + 1,),
            "tiles": (self.seqs, TILE_FIELDS),
            "row_token": (self.rows,),
            "token_slot": (self.tokens,),
            "prefill": (self.prefill_tiles, PREFILL_FIELDS),
        }


class Plan(NamedTuple):
    """int32 arrays; shapes as in `PlanSpec.shapes`.

    items: first row in the row space, rows / 8, row of the page table, first key, end of keys, position of the first
    token (a row sees no key after its own), what a token's position adds (0: all rows see all keys), first partial row.
    worker_items: worker w does items [w] to [w + 1].
    tiles: per sequence first row, rows / 8, its items (begin, end), the shared tile's items (begin, end) and its row there,
    1 if the sequence is this kernel's.
    row_token: token of each row * G + head within the group, -1 for none. token_slot: sequence * 64 + row in its tile,
    of each token's first head, -1 for none.
    prefill: sequence, first token, tokens, 0.
    """

    items: Array
    worker_items: Array
    tiles: Array
    row_token: Array
    token_slot: Array
    prefill: Array


def plan_spec(
    tokens: int, seqs: int, *, q_heads: int, kv_heads: int, head_dim: int, page_size: int, kv_dtype: str,
    max_q_len: int | None = None, chip: Chip = CHIPS["h100"],
) -> PlanSpec:
    """The spec of a batch of T tokens and S sequences on one chip, by its tuning."""
    tuning = decode_tuning(chip, head_dim, page_size, kv_dtype)
    groups = q_heads // kv_heads
    if groups > TILE_ROWS:
        raise NotImplementedError(f"at most {TILE_ROWS} query heads per KV head, got {groups}")
    workers = max(1, chip.sms * tuning.ctas_per_sm // (kv_heads * max(1, head_dim // tuning.width)))
    return PlanSpec(tokens, seqs, groups, min(page_size, tuning.block_keys), workers,
                    min(tokens, max_q_len or tokens))


def plan_size(spec: PlanSpec) -> int:
    """int32 entries of a plan; static."""
    return sum(_round_up(int(np.prod(shape)), ARGUMENT_ALIGN) for shape in spec.shapes.values())


def unpack(plan: Array, spec: PlanSpec) -> Plan:
    """Views of a packed plan. ValueError if it was made for another spec."""
    if plan.shape != (plan_size(spec),):
        raise ValueError(f"plan must be int32 [{plan_size(spec)}] for {spec}, got {plan.dtype} {plan.shape}")
    parts, at = {}, 0
    for name, shape in spec.shapes.items():
        size = int(np.prod(shape))
        parts[name] = plan[at : at + size].reshape(shape)
        at += _round_up(size, ARGUMENT_ALIGN)
    return Plan(**parts)


def make_plan(
    spec: PlanSpec, q_lens: np.ndarray, kv_lens: np.ndarray, *, page_table: np.ndarray | None = None,
    page_size: int = 0, window: int | None = None,
) -> np.ndarray:
    """The packed plan of one batch and window on the host: int32 [plan_size(spec)].

    q_lens, kv_lens: of up to S sequences, the rest being padding. page_table [.., P]: when given (with page_size), decodes
    that start with the same pages are looked for; not with a window, which leaves no common beginning.
    """
    q, kv = (np.zeros(spec.seqs, np.int32) for _ in range(2))
    q[: len(q_lens)], kv[: len(kv_lens)] = q_lens, kv_lens
    shared = None
    if page_table is not None and window is None:
        shared = find_shared(q, kv, np.asarray(page_table), page_size, spec.tile_tokens, spec.shared_tiles)
    parts = _build(np, spec, q, kv, window, shared)
    return np.concatenate([np.pad(part.ravel(), (0, -part.size % ARGUMENT_ALIGN)) for part in parts])


def device_plan(spec: PlanSpec, cu_q_lens: jax.Array, kv_lens: jax.Array, window: int | None) -> Plan:
    """The plan made inside the jit, for a caller that brought none. No prefix is shared."""
    import jax.numpy as jnp

    return _build(jnp, spec, cu_q_lens[1:] - cu_q_lens[:-1], kv_lens, window, None)


def _build(xp: ModuleType, spec: PlanSpec, q_lens: Array, kv_lens: Array, window: int | None, shared: Shared | None) -> Plan:
    """Static shapes throughout, so that it can be traced."""
    i32 = np.int32
    seqs, groups, unit = spec.seqs, spec.groups, spec.unit_keys
    index = xp.arange(seqs, dtype=i32)
    first_token = (xp.cumsum(q_lens) - q_lens).astype(i32)
    mine = (q_lens > 0) & (q_lens <= spec.own_tokens)
    count = xp.where(mine, q_lens, 0)
    position = kv_lens - q_lens  # of the first query
    begin = xp.zeros_like(index) if window is None else xp.maximum(position - (window - 1), 0) // unit * unit
    none = np.zeros(spec.shared_tiles, i32)
    if shared is not None:
        begin = shared.keys
    cat = lambda a, b: xp.concatenate([a.astype(i32), xp.asarray(b, dtype=i32)])  # noqa: E731
    members = none if shared is None else shared.members
    tokens = cat(count, members)
    base = cat(first_token, none if shared is None else spec.tokens + shared.start)
    begin = cat(begin, none)
    stop = cat(xp.where(mine, kv_lens, 0), none if shared is None else np.where(members > 0, shared.tile_keys, 0))
    reader = cat(index, none if shared is None else shared.reader)
    position = cat(position, np.full_like(none, FAR))
    step = cat(xp.ones_like(index), none)

    chunks = (tokens * groups + ROW_ALIGN - 1) // ROW_ALIGN
    row = _starts(xp, chunks * ROW_ALIGN)
    units = xp.maximum(stop - begin + unit - 1, 0) // unit
    cum = _starts(xp, units)
    total = cum[-1]
    bounds = (xp.arange(spec.workers + 1) * (total // spec.workers)
              + xp.arange(spec.workers + 1) * (total % spec.workers) // spec.workers).astype(i32)
    start = xp.sort(xp.concatenate([cum[:-1], bounds[:-1]]))
    again = xp.concatenate([start[1:] == start[:-1], start[-1:] >= total])
    start = xp.sort(xp.where(again, total, start))
    end = xp.concatenate([start[1:], xp.reshape(total, (1,))])
    tile = xp.clip(xp.searchsorted(cum, start, side="right").astype(i32) - 1, 0, spec.tiles - 1)
    real = start < end
    keys = begin[tile] + (start - cum[tile]) * unit
    item_chunks = xp.where(real, chunks[tile], 0)
    items = xp.stack([
        row[tile], item_chunks, reader[tile], keys, xp.where(real, xp.minimum(keys + (end - start) * unit, stop[tile]), keys),
        position[tile], step[tile], _starts(xp, item_chunks * ROW_ALIGN)[:-1]], axis=1).astype(i32)
    tile_items = xp.searchsorted(start, cum, side="left").astype(i32)
    return Plan(items, xp.searchsorted(start, bounds, side="left").astype(i32),
                _tiles(xp, row, chunks, tile_items, mine, groups, seqs, shared),
                *_rows(xp, spec, row, tokens, base, first_token, q_lens, mine, shared),
                _prefill(xp, spec, first_token, q_lens, mine))


def _tiles(
    xp: ModuleType, row: Array, chunks: Array, tile_items: Array, mine: Array, groups: int, seqs: int, shared: Shared | None
) -> Array:
    zero = xp.zeros(seqs, dtype=np.int32)
    begin, end, place = zero, zero, zero
    if shared is not None:
        has = shared.keys > 0
        begin = np.where(has, tile_items[shared.tile], 0)
        end = np.where(has, tile_items[np.where(has, shared.tile + 1, 0)], 0)
        place = shared.place * groups
    return xp.stack([row[:seqs], chunks[:seqs], tile_items[:seqs], tile_items[1 : seqs + 1], begin, end, place,
                     mine.astype(np.int32)], axis=1).astype(np.int32)


def _rows(
    xp: ModuleType, spec: PlanSpec, row: Array, tokens: Array, base: Array, first_token: Array, q_lens: Array, mine: Array,
    shared: Shared | None,
) -> tuple[Array, Array]:
    """row_token and token_slot of a `Plan`."""
    number = xp.arange(spec.rows, dtype=np.int32)
    tile = xp.clip(xp.searchsorted(row, number, side="right").astype(np.int32) - 1, 0, spec.tiles - 1)
    local = number - row[tile]
    token = base[tile] + local // spec.groups
    if shared is not None:
        beyond = shared.tokens_of[np.clip(token - spec.tokens, 0, spec.seqs - 1)]
        token = np.where(token >= spec.tokens, beyond, token)
    row_token = xp.where(local < tokens[tile] * spec.groups, token * spec.groups + local % spec.groups, -1)

    number = xp.arange(spec.tokens, dtype=np.int32)
    ends = xp.cumsum(q_lens).astype(np.int32)
    seq = xp.minimum(xp.searchsorted(ends, number, side="right").astype(np.int32), spec.seqs - 1)
    there = mine[seq] & (number < ends[-1])
    token_slot = xp.where(there, seq * TILE_ROWS + (number - first_token[seq]) * spec.groups, -1)
    return row_token.astype(np.int32), token_slot.astype(np.int32)


def _prefill(xp: ModuleType, spec: PlanSpec, first_token: Array, q_lens: Array, mine: Array) -> Array:
    if not spec.prefill_tiles:
        return xp.zeros((0, PREFILL_FIELDS), dtype=np.int32)
    long = xp.where(mine, 0, q_lens)
    cum = _starts(xp, (long + PREFILL_ROWS - 1) // PREFILL_ROWS)
    number = xp.arange(spec.prefill_tiles, dtype=np.int32)
    seq = xp.clip(xp.searchsorted(cum, number, side="right").astype(np.int32) - 1, 0, spec.seqs - 1)
    at = (number - cum[seq]) * PREFILL_ROWS
    rows = xp.where(number < cum[-1], xp.clip(long[seq] - at, 0, PREFILL_ROWS), 0)
    return xp.stack([seq, xp.where(rows > 0, first_token[seq] + at, 0), rows, xp.zeros_like(rows)], axis=1).astype(np.int32)


def _starts(xp: ModuleType, sizes: Array) -> Array:
    """[n] -> [n + 1]: 0 and the running sums."""
    return xp.concatenate([xp.zeros(1, dtype=np.int32), xp.cumsum(sizes).astype(np.int32)])


def _round_up(x: int, to: int) -> int:
    return -(-x // to) * to
