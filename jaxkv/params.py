"""What a request asks: how to sample, what the answer must follow, and hints for the cache. Standard library only."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

MAX_LOGPROBS = 20  # top-n log-probabilities a request may ask for
MAX_LOGIT_BIAS = 300  # entries of `logit_bias`, as the OpenAI API allows
MAX_NAME = 256  # characters of a session id or a cache salt
MAX_RETENTION = 7 * 86400.0  # seconds
MAX_STOP_IDS = 32  # stop ids and end-of-sequence ids of one request together
MAX_GRAMMAR = 2**16  # characters of what an answer must follow
STRUCTURED_KINDS = ("json_object", "json_schema", "regex", "choice", "grammar")


@dataclass(frozen=True, slots=True)
class Structured:
    """What an answer must follow. ``value``: the schema as JSON text, the pattern, a JSON list of strings, the grammar
    (Lark or GBNF), "" for json_object.

    Raises ValueError that names the limit; whether the value compiles is known later.
    """

    kind: str  # one of STRUCTURED_KINDS
    value: str = ""

    def __post_init__(self) -> None:
        if self.kind not in STRUCTURED_KINDS:
            raise ValueError(f"structured.kind must be one of {', '.join(STRUCTURED_KINDS)}, got {self.kind!r:.40}")
        if not isinstance(self.value, str) or not self.value and self.kind != "json_object":
            raise ValueError(f"structured.value must be a non-empty string, got {self.value!r:.40}")
        if len(self.value) > MAX_GRAMMAR:
            raise ValueError(f"structured.value may have at most {MAX_GRAMMAR} characters, got {len(self.value)}")


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose tokens; names and meanings are those of the OpenAI API and of vLLM.

    Raises ValueError that names the field and the limit.
    """

    n: int = 1
    temperature: float = 1.0
    top_k: int = 0  # 0 or -1: off
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()  # a dict is accepted
    logprobs: int | None = None  # None: none; k: the chosen token's and the k most likely ones
    prompt_logprobs: int | None = None
    embed: bool = False  # the hidden state of the last prompt token instead of an answer; needs max_tokens 1 and n 1
    seed: int | None = None
    max_tokens: int | None = 16  # None: up to the window
    min_tokens: int = 0
    stop: tuple[str, ...] = ()  # a string or a list is accepted
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    structured: Structured | None = None

    def __post_init__(self) -> None:
        put = lambda name, value: object.__setattr__(self, name, value)  # noqa: E731  frozen: normalise once
        if isinstance(self.stop, str):
            put("stop", (self.stop,))
        put("stop", _tuple("stop", self.stop))
        put("stop_token_ids", _tuple("stop_token_ids", self.stop_token_ids))
        bias = self.logit_bias
        pairs = _tuple("logit_bias", bias.items() if isinstance(bias, dict) else bias)
        if any(not isinstance(pair, tuple | list) or len(pair) != 2 for pair in pairs):
            raise ValueError("logit_bias must hold pairs of a token id and a number")
        put("logit_bias", tuple((_int("logit_bias", t, 0), _number("logit_bias", b, -100.0, 100.0)) for t, b in pairs))
        if self.top_k == -1:
            put("top_k", 0)
        _int("n", self.n, 1, 128)
        _number("temperature", self.temperature, 0.0, 100.0)
        _int("top_k", self.top_k, 0)
        _number("top_p", self.top_p, 0.0, 1.0)
        if self.top_p == 0.0:
            raise ValueError("top_p must be in (0, 1], got 0")
        _number("min_p", self.min_p, 0.0, 1.0)
        _number("repetition_penalty", self.repetition_penalty, 0.0, 100.0)
        if self.repetition_penalty == 0.0:
            raise ValueError("repetition_penalty must be greater than 0")
        _number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _int(name, getattr(self, name), 0, MAX_LOGPROBS)
        if self.seed is not None:
            _int("seed", self.seed, -(2**63), 2**63 - 1)
        if self.max_tokens is not None:
            _int("max_tokens", self.max_tokens, 1)
        _int("min_tokens", self.min_tokens, 0)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens must be at most max_tokens ({self.max_tokens}), got {self.min_tokens}")
        if self.embed and (self.max_tokens != 1 or self.n != 1):
            raise ValueError(f"embed needs max_tokens 1 and n 1, got {self.max_tokens} and {self.n}")
        if any(not isinstance(s, str) or not s for s in self.stop):
            raise ValueError("stop must hold non-empty strings")
        for t in self.stop_token_ids:
            _int("stop_token_ids", t, 0)
        if len(self.logit_bias) > MAX_LOGIT_BIAS:
            raise ValueError(f"logit_bias may hold at most {MAX_LOGIT_BIAS} entries, got {len(self.logit_bias)}")
        if isinstance(self.structured, dict):  # from JSON
            if not {"kind"} <= set(self.structured) <= {"kind", "value"}:
                raise ValueError(f"structured must hold kind and value, got {self.structured!r:.80}")
            put("structured", Structured(**self.structured))
        if not isinstance(self.structured, Structured | None):
            raise ValueError(f"structured must be a Structured, got {type(self.structured).__name__}")

    @property
    def needs_slot_state(self) -> bool:
        """Whether the device needs per-slot tables (counts, biases, stop ids) for this request."""
        return bool(self.logit_bias or self.min_tokens or self.presence_penalty or self.frequency_penalty
                    or self.repetition_penalty != 1.0)


def _tuple(name: str, value: Any) -> tuple[Any, ...]:
    try:
        return () if value is None else tuple(value)
    except TypeError:
        raise ValueError(f"{name} must be a list, got {value!r:.80}") from None


def _int(name: str, value: Any, low: int, high: int | None = None) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} must be an integer, got {value!r}")
    if value < low or (high is not None and value > high):
        raise ValueError(f"{name} must be {f'in [{low}, {high}]' if high is not None else f'at least {low}'}, got {value}")
    return value


def _number(name: str, value: Any, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < math.inf:
        raise ValueError(f"{name} must be a finite number, got {value!r}")
    if not low <= value <= high:
        raise ValueError(f"{name} must be in [{low:g}, {high:g}], got {value}")
    return float(value)


@dataclass(frozen=True, slots=True)
class CacheHints:
    """What a request says about itself besides its tokens. Hints change which KV stays, never what is answered.

    Raises ValueError that names the field and the limit.
    """

    priority: int = 0  # lower runs earlier, and its KV is worth more
    cache_salt: str = ""  # prompts of different salts share no KV
    session_id: str = ""  # conversation or agent session that the prompt is a turn of
    end_session: bool = False  # the last turn: KV that only this session used may leave first
    retention: float | None = None  # seconds for which other KV leaves before this
    no_store: bool = False  # read the cache, leave nothing in it

    def __post_init__(self) -> None:
        _int("priority", self.priority, -(2**31), 2**31 - 1)
        for name in ("cache_salt", "session_id"):
            value = getattr(self, name)
            if not isinstance(value, str) or len(value) > MAX_NAME:
                raise ValueError(f"{name} must be a string of at most {MAX_NAME} characters, got {value!r:.80}")
        for name in ("end_session", "no_store"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false, got {getattr(self, name)!r}")
        if self.retention is not None:
            _number("retention", self.retention, 0.0, MAX_RETENTION)
        if self.end_session and not self.session_id:
            raise ValueError("end_session needs a session_id")
