"""Token ids to text while they arrive, and stop strings in that text.

Owns the per-sequence state of both. Every operation costs O(1) amortised per token or character: nothing is decoded
or searched twice. Owns no tokens and no reasons to finish (``outputs`` does).
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Protocol

from jaxkv.runtime.tokenizer import Tokenizer

_LONGEST = 8  # tokens that may wait for the rest of a character; more are broken bytes


class Detokenizer(Protocol):
    """Text of a growing list of tokens; what it returns is whole characters and never taken back. A character that no token
    finishes is no text."""

    def push(self, token_ids: Sequence[int]) -> str: ...


def make_detokenizer(tokenizer: Tokenizer, prompt: Sequence[int], skip_special_tokens: bool) -> Detokenizer:
    """The exact one where tokens are bytes, else one that decodes a short window."""
    if tokenizer.byte_level:
        return ByteDetokenizer(tokenizer, skip_special_tokens)
    return WindowDetokenizer(tokenizer, prompt, skip_special_tokens)


class ByteDetokenizer:
    """For byte-level vocabularies: the texts joined are ``tokenizer.decode`` of all tokens, whatever they are, but for the
    bytes of a last unfinished character."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._bytes, self._characters = tokenizer.token_bytes, tokenizer.token_characters
        self._skip = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._waiting = False  # for the rest of a character

    def push(self, token_ids: Sequence[int]) -> str:
        skip = self._skip
        if len(token_ids) == 1 and not self._waiting:  # the usual case
            token = token_ids[0]
            text = "" if token in skip else self._characters(token)
            if text is not None:
                return text
        text = self._utf8.decode(b"".join([self._bytes(token) for token in token_ids if token not in skip]))
        self._waiting = bool(self._utf8.getstate()[0])
        return text


class WindowDetokenizer:
    """For the others (SentencePiece): new tokens are decoded behind the piece before them, for the space between words.

    The end of the prompt is the first piece, so that an answer's leading space is kept, as in vLLM. Broken bytes are
    given up after 8 tokens; only there the text may differ from decoding everything at once.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], skip_special_tokens: bool) -> None:
        self._tokenizer, self._skip = tokenizer, skip_special_tokens
        self._known: list[int] = []  # the piece before, whole characters
        self._known_text = ""
        for start in range(len(prompt) - 1, max(-1, len(prompt) - 1 - _LONGEST), -1):
            text = self._decode(list(prompt[start:]))
            if text and "\ufffd" not in text:
                self._known, self._known_text = list(prompt[start:]), text
                break
        self._new: list[int] = []  # waiting for the rest of a character

    def push(self, token_ids: Sequence[int]) -> str:
        return "".join([self._push_one(token) for token in token_ids])

    def _push_one(self, token: int) -> str:
        self._new.append(token)
        unfinished = self._decode(self._known + self._new).endswith("\ufffd")
        return "" if unfinished and len(self._new) < _LONGEST else self._take()

    def _take(self) -> str:
        text = self._decode(self._known + self._new)[len(self._known_text):]
        if text:  # not for special tokens that are skipped
            self._known, self._known_text = self._new, self._decode(self._new)
        self._new = []
        return text

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, self._skip) if token_ids else ""


class StopStrings:
    """Finds the stop string that ends first in a text given in pieces, and holds back what may be its beginning.

    Of several that end at the same character the longest counts. The result depends on the text only, not on how it
    was cut into pieces. With ``include`` the stop string stays in the text and nothing need be held back.
    """

    def __init__(self, stops: Sequence[str], include: bool) -> None:
        self._matchers = [_Matcher(stop) for stop in sorted(set(stops), key=len, reverse=True)]
        self._include = include
        self._firsts = frozenset(stop[0] for stop in stops)
        self._idle = True  # no stop string has begun
        self._held = ""

    def push(self, text: str, active: bool = True) -> tuple[str, str | None]:
        """Text that may be shown now, and the stop string if the text has come to its end. Not ``active``: stop
        strings that end in ``text`` do not count."""
        if self._idle and self._firsts.isdisjoint(text):  # the usual case
            return text, None
        for index, char in enumerate(text):
            hit: str | None = None
            for matcher in self._matchers:  # all of them must see the character
                if matcher.advance(char) and active and hit is None:
                    hit = matcher.stop
            if hit is not None:
                whole = self._held + text[:index + 1]
                self._held = ""
                return whole if self._include else whole[:-len(hit)], hit
        begun = max([matcher.matched for matcher in self._matchers])
        self._idle = not begun
        if self._include:
            return text, None
        whole = self._held + text
        shown = len(whole) - begun
        self._held = whole[shown:]
        return whole[:shown], None

    def flush(self) -> str:
        """What was held back, when no text follows."""
        held, self._held = self._held, ""
        return held


class _Matcher:
    """Knuth-Morris-Pratt: ``matched`` is the length of the longest suffix of the text that begins ``stop``."""

    __slots__ = ("_fallback", "matched", "stop")

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.matched = 0
        self._fallback = [0] * len(stop)  # [i]: longest proper prefix of stop that is a suffix of stop[:i + 1]
        length = 0
        for index in range(1, len(stop)):
            while length and stop[index] != stop[length]:
                length = self._fallback[length - 1]
            length += stop[index] == stop[length]
            self._fallback[index] = length

    def advance(self, char: str) -> bool:
        """Whether ``stop`` ends with this character; ``matched`` then is what a next match could reuse."""
        matched, stop = self.matched, self.stop
        while matched and stop[matched] != char:
            matched = self._fallback[matched - 1]
        matched += stop[matched] == char
        done = matched == len(stop)
        self.matched = self._fallback[matched - 1] if done else matched
        return done
