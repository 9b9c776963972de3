"""Compiles on threads of its own, remembers what it compiled, and bounds both.

The engine asks for a grammar when it takes a request; a server asks before that and holds the answer, so that the
engine's thread never waits for a compile.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

from jaxkv.params import Structured
from jaxkv.runtime.structured.grammar import make_matcher, make_tokenizer
from jaxkv.runtime.structured.trial import Trial
from jaxkv.runtime.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

log = logging.getLogger("jaxkv")
THREADS = 2
MAX_CACHED = 32  # a grammar may grow to tens of MiB
MAX_PENDING = 64


class CompilerBusy(ValueError):
    """Too many grammars wait to be compiled."""


class Grammar:
    """A compiled ``Structured``, for any number of sequences."""

    __slots__ = ("__weakref__", "_matcher")

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    def matcher(self) -> LLMatcher:
        """A fresh matcher, which shares what was compiled."""
        return self._matcher.deep_copy()


def grammar_or_error(found: Grammar | str) -> Grammar:
    """What a compile gave; ValueError if it is a reason."""
    if isinstance(found, str):
        raise ValueError(found)
    return found


class GrammarCompiler:
    """May be used from several threads. ``vocab_size`` is the model's, padding included."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_ids: tuple[int, ...]) -> None:
        self._source, self._vocab_size, self._eos_ids = tokenizer, vocab_size, eos_ids
        self.compiled = 0  # trials and compiles so far
        self._lock = threading.Lock()
        self._recent: OrderedDict[Structured, Future[Grammar | str]] = OrderedDict()  # failures too
        self._alive: WeakValueDictionary[Structured, Grammar] = WeakValueDictionary()  # in use, maybe no longer recent
        self._pending = 0
        self._pool = ThreadPoolExecutor(THREADS, "grammar")
        self._local = threading.local()
        self._trials: list[Trial] = []

    def submit(self, structured: Structured) -> Future[Grammar | str]:
        """A grammar to come, or why there is none: no exception, which would keep alive whoever met it. CompilerBusy."""
        with self._lock:
            future = self._recent.get(structured)
            if future is None:
                future = self._find_or_start(structured)
                self._recent[structured] = future
                if len(self._recent) > MAX_CACHED:
                    self._recent.popitem(last=False)
            self._recent.move_to_end(structured)
            return future

    def compile(self, structured: Structured) -> Grammar:
        """As ``submit``, but waits. ValueError whose message starts with "structured" if there is none."""
        return grammar_or_error(self.submit(structured).result())

    def close(self) -> None:
        """Ends processes and, as soon as they are idle, threads; what waits is given up."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        for trial in self._trials:
            trial.close()

    def _find_or_start(self, structured: Structured) -> Future[Grammar | str]:
        grammar = self._alive.get(structured)
        if grammar is not None:
            future: Future[Grammar | str] = Future()
            future.set_result(grammar)
            return future
        if self._pending >= MAX_PENDING:
            raise CompilerBusy(f"structured cannot be compiled now: {self._pending} wait before it")
        self._pending += 1
        return self._pool.submit(self._build, structured)

    def _build(self, structured: Structured) -> Grammar | str:
        try:
            grammar = Grammar(make_matcher(self._tokenizer, self._trial().compile(structured)))
        except ValueError as error:
            return f"structured cannot be compiled: {error}"
        except Exception as error:  # not the grammar's fault, so it may be tried again
            log.exception("the compiler of structured output failed")
            with self._lock:
                self._recent.pop(structured, None)
            return f"structured cannot be compiled now: {type(error).__name__}"
        finally:
            with self._lock:
                self._pending -= 1
                self.compiled += 1
        with self._lock:
            self._alive[structured] = grammar
        return grammar

    def _trial(self) -> Trial:
        """This thread's."""
        if not hasattr(self._local, "trial"):
            self._local.trial = Trial(self._setup)
            self._trials.append(self._local.trial)
        return self._local.trial

    @cached_property
    def _setup(self) -> dict:
        if not self._eos_ids:
            raise ValueError("the model has no end-of-sequence token")
        return {"tokenizer_json": self._source.to_json(), "vocab_size": self._vocab_size, "eos_ids": list(self._eos_ids)}

    @cached_property
    def _tokenizer(self) -> LLTokenizer:
        return make_tokenizer(**self._setup)
