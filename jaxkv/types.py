"""The host's vocabulary: every value that crosses a layer border, standard library only.

Owns the nouns (requests, chunks, moves, plans, results), none of which changes once it is made. Owns no behaviour beyond
validation and (de)serialisation.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import IntEnum
from typing import Any, Protocol

from jaxkv.params import SamplingParams


class Tier(IntEnum):
    """Where a page lives, fastest first."""

    HBM = 0
    HOST = 1
    DISK = 2


class Kind(IntEnum):
    """Who wrote a trie node's KV first. An ANSWER that a later prompt matches becomes PROMPT."""

    PROMPT = 0
    ANSWER = 1


@dataclass(frozen=True, slots=True)
class KVGroup:
    """Layers that share a page table: same attention span, same KV shape, own page pool.

    ``kv_heads`` counts heads as stored over the whole mesh. ``window`` is in tokens: a query at position p sees
    keys at positions > p - window; None sees everything.
    """

    layers: tuple[int, ...]
    kv_heads: int
    head_dim: int
    dtype: str
    window: int | None = None

    def page_bytes(self, page_size: int) -> int:
        """Bytes of one page over all layers of the group, keys and values."""
        scale = 4  # bytes: quantised rows carry a float32
        row = {"float32": 4 * self.head_dim, "bfloat16": 2 * self.head_dim, "float16": 2 * self.head_dim,
               "int8": self.head_dim + scale, "float8_e4m3fn": self.head_dim + scale}[self.dtype]
        return 2 * len(self.layers) * page_size * self.kv_heads * row


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt to complete once: a request with n > 1 is n of these with the same ``parent`` and child 0..n-1."""

    id: str
    prompt: tuple[int, ...]
    params: SamplingParams
    max_tokens: int  # resolved against the window, >= 1
    seed: int = 0
    child: int = 0
    parent: str = ""  # id shared by the children of one request
    arrival: float = 0.0  # seconds on the injected clock
    priority: int = 0  # lower runs earlier
    namespace: str = ""  # cache salt: requests of different namespaces share no KV
    stop_ids: tuple[int, ...] = ()  # ends the sequence: stop_token_ids plus eos unless ignore_eos
    session_id: str = ""  # conversation or agent session that the request is a turn of
    end_session: bool = False  # the last turn: KV that only this session used may leave first
    retention: float | None = None  # seconds that the KV is kept after use as long as anything else can leave
    no_store: bool = False  # reads the cache, leaves nothing in it
    needs_last_token: bool = False  # what may follow depends on the token before: no step while one is in flight

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Request:
        """The request ``to_dict`` wrote, also after a JSON round trip."""
        return cls(**{**data, "prompt": tuple(data["prompt"]), "stop_ids": tuple(data["stop_ids"]),
                      "params": SamplingParams(**data["params"])})


@dataclass(frozen=True, slots=True)
class PageMove:
    """Copy page ``src`` to ``dst`` over all layers of ``group``. Moves run in order, before the plan's chunks.

    A HOST source that is ``last`` is dropped after the move; ``dst`` None drops a HOST page that nobody reads. As drops
    keep their place in the order, a later move of the same plan may write the host page number that was freed.
    DISK pages have no number: as a source (of a ``Fetch``) it is an index into ``Fetch.keys``, as a destination an
    index into ``StepPlan.saves``.
    """

    group: int
    src: tuple[Tier, int]
    dst: tuple[Tier, int] | None
    last: bool = False

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> PageMove:
        place = lambda pair: pair and (Tier(pair[0]), pair[1])  # noqa: E731
        return cls(data["group"], place(data["src"]), place(data["dst"]), data["last"])


@dataclass(frozen=True, slots=True)
class PageKey:
    """Name of a page's content: the digest of the path that ends with it, and its own tokens, compared on a read."""

    digest: str  # hexadecimal
    tokens: tuple[int, ...]

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> PageKey:
        return cls(data["digest"], tuple(data["tokens"]))


@dataclass(frozen=True, slots=True)
class Fetch:
    """Pages to bring to the device while steps go on: ``moves`` from HOST or DISK to HBM pages that nothing reads yet.

    A fetch fills staging memory only. Once it arrived, a later plan lists it under ``landings``, and its pages are valid
    for everything in that plan.
    """

    id: int
    moves: tuple[PageMove, ...]
    keys: tuple[PageKey, ...] = ()  # what to read from disk

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Fetch:
        return cls(data["id"], tuple(map(PageMove.from_dict, data["moves"])), tuple(map(PageKey.from_dict, data["keys"])))


@dataclass(frozen=True, slots=True)
class Arrival:
    """How a fetch ended. Not ``ok``: failed or too slow, and its pages will never come."""

    fetch_id: int
    ok: bool = True
    seconds: float = 0.0  # its link was busy with it: from its start, or the end of the one before it from the same tier


@dataclass(frozen=True, slots=True)
class Admit:
    """What the device must know of a sequence that enters a slot."""

    slot: int
    request_id: str
    params: SamplingParams
    seed: int
    child: int
    prompt_len: int
    tokens: tuple[int, ...]  # everything so far; empty unless params.needs_slot_state
    stop_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive positions of one sequence to run in this step. Values only, never a live Sequence."""

    request_id: str
    slot: int
    start: int  # position of the first token
    tokens: tuple[int, ...]  # -1: the token the slot sampled last, still on the device
    num_logits: int  # how many trailing positions yield logits: 0, 1 or k + 1
    pages: tuple[tuple[int, tuple[int, ...]], ...]  # [group] (first index, pages): replaces the slot's row from there
    next_token: int = -1  # the known token after the chunk, for prompt log-probabilities
    prompt_logprobs: bool = False


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What one step does, in the order of its fields. A value: it can be logged, compared, sent and replayed."""

    id: int
    landings: tuple[tuple[int, bool], ...] = ()  # (fetch that arrived, whether its pages are still wanted)
    moves: tuple[PageMove, ...] = ()
    saves: tuple[PageKey, ...] = ()  # pages that moves to DISK make up, one of every group
    fetches: tuple[Fetch, ...] = ()  # to start
    admits: tuple[Admit, ...] = ()
    chunks: tuple[Chunk, ...] = ()

    @property
    def num_tokens(self) -> int:
        return sum(len(c.tokens) for c in self.chunks)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form; equal plans give equal dicts."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> StepPlan:
        """The plan ``to_dict`` wrote, also after a JSON round trip."""
        return cls(
            id=data["id"],
            landings=tuple((fetch_id, wanted) for fetch_id, wanted in data["landings"]),
            moves=tuple(map(PageMove.from_dict, data["moves"])),
            saves=tuple(map(PageKey.from_dict, data["saves"])),
            fetches=tuple(map(Fetch.from_dict, data["fetches"])),
            admits=tuple(Admit(**{**a, "params": SamplingParams(**a["params"]), "tokens": tuple(a["tokens"]),
                                  "stop_ids": tuple(a["stop_ids"])}) for a in data["admits"]),
            chunks=tuple(Chunk(**{**c, "tokens": tuple(c["tokens"]),
                                  "pages": tuple((first, tuple(pages)) for first, pages in c["pages"])})
                         for c in data["chunks"]))


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Log-probability of a token and of the most likely ones, as (token id, logprob) best first."""

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class StepResult:
    """What the host learns from one step, by chunk of the plan: sampled tokens, and log-probabilities if asked for."""

    tokens: tuple[tuple[int, ...], ...]  # -1: there was NaN among the logits
    logprobs: tuple[tuple[Logprobs, ...], ...] = ()
    prompt_logprobs: tuple[tuple[Logprobs, ...], ...] = ()  # for positions start + 1 .. of a chunk that asked
    hidden: tuple[tuple[float, ...], ...] = ()  # of the last position, where the request is to be embedded
    failed: bool = False  # the device's memory ran out: HBM's contents are lost, and nothing else is told


@dataclass(frozen=True, slots=True)
class Start:
    """How a sequence came to its first token; seconds on the injected clock."""

    admitted: float  # it first entered a slot
    first_token: float  # the step that sampled it was read
    page_wait: float = 0.0  # seconds before ``admitted`` that it waited for pages on their way


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """What commit tells the caller about one sequence."""

    request_id: str
    tokens: tuple[int, ...] = ()
    logprobs: tuple[Logprobs, ...] = ()
    prompt_logprobs: tuple[Logprobs, ...] = ()
    finish_reason: str | None = None  # "stop", "length", "abort" or "error"
    stop_token: int | None = None
    num_cached: int = 0
    start: Start | None = None  # with the first token
    hidden: tuple[float, ...] = ()
    cached_below: tuple[int, int] = (0, 0)  # tokens of num_cached that came from host and from disk
    error: str = ""  # why it ended with "error", if there is more to say


class DiskIndex(Protocol):
    """What the cache asks of the disk tier."""

    def match(self, keys: list[bytes]) -> int:
        """How many leading pages of a path, given by their digests, are on disk."""
        ...

    def forget(self, keys: list[bytes]) -> None:
        """Pages that are wrong: they match no more."""
        ...


class StepHandle(Protocol):
    """A submitted step; ``read`` blocks until its result is on the host."""

    def read(self) -> StepResult: ...
