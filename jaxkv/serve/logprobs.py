"""Log-probabilities in the three shapes clients know: completions, chat, and vLLM's prompt_logprobs.

Owns the text of single tokens. Never writes -Infinity: JSON has none, so very unlikely tokens get vLLM's floor.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from jaxkv.types import Logprobs

FLOOR = -9999.0


class TokenText:
    """Text and bytes of single tokens; without a tokenizer, or with ``as_ids``, the text is "token_id:N"."""

    def __init__(self, tokenizer: Any, as_ids: bool | None = False):
        self._tokenizer, self._as_ids = tokenizer, as_ids

    def text(self, token: int) -> str:
        """The token's text; bytes that are no whole character come as OpenAI's "bytes:\\\\xe2\\\\x82"."""
        if self._as_ids:
            return f"token_id:{token}"
        raw = self.bytes(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def bytes(self, token: int) -> bytes:
        """UTF-8 bytes of the token, possibly a part of a character."""
        return f"token_id:{token}".encode() if self._tokenizer is None else self._tokenizer.token_bytes(token)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """The text of several tokens; empty without a tokenizer."""
        return "" if self._tokenizer is None else self._tokenizer.decode(ids, skip_special_tokens)


def floor(logprob: float) -> float:
    """A number JSON can hold."""
    return max(logprob, FLOOR)


def completion_logprobs(entries: Iterable[tuple[int, Logprobs | None]], top: int, tokens: TokenText,
                        offset: int) -> tuple[dict[str, Any], int]:
    """The `logprobs` of a completion and the text offset after it. Only a first prompt token has no entry."""
    texts: list[str] = []
    values: list[float | None] = []
    tops: list[dict[str, float] | None] = []
    offsets: list[int] = []
    for token, entry in entries:
        text = tokens.text(token)
        texts.append(text)
        offsets.append(offset)
        offset += len(text)
        values.append(None if entry is None else floor(entry.logprob))
        if entry is None or not top:
            tops.append(None)
        else:
            best = {tokens.text(t): floor(p) for t, p in reversed(entry.top[:top])}
            tops.append(dict(reversed(best.items())) | {text: floor(entry.logprob)})
    body = {"tokens": texts, "token_logprobs": values, "top_logprobs": tops if top else None, "text_offset": offsets}
    return body, offset


def chat_logprobs(entries: Iterable[Logprobs], top: int, tokens: TokenText) -> dict[str, Any]:
    """The `logprobs` of a chat choice."""

    def one(token: int, logprob: float) -> dict[str, Any]:
        return {"token": tokens.text(token), "logprob": floor(logprob), "bytes": list(tokens.bytes(token))}

    content = [one(e.token_id, e.logprob) | {"top_logprobs": [one(t, p) for t, p in e.top[:top]]} for e in entries]
    return {"content": content, "refusal": None}


def prompt_logprobs(entries: Sequence[Logprobs], top: int, tokens: TokenText) -> list[dict[str, Any] | None]:
    """vLLM's `prompt_logprobs`: per prompt token None (the first) or {token id: {logprob, rank, decoded_token}}."""
    rows: list[dict[str, Any] | None] = [None]
    for e in entries:
        ranked = [(t, p, rank) for rank, (t, p) in enumerate(e.top[:top], 1)] + [(e.token_id, e.logprob, e.rank)]
        rows.append({str(t): {"logprob": floor(p), "rank": rank, "decoded_token": tokens.text(t)}
                     for t, p, rank in ranked})
    return rows
