"""Which implementation of an op runs. Decided while tracing, so a choice costs nothing at run time.

An op hands over its implementations as an ordered dict name -> function, best first. An implementation that cannot
serve a call (shape, dtype, platform) raises NotImplementedError and the next is tried.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

ARGUMENT_ALIGN = 64  # int32: 256 bytes, where Mosaic GPU wants arguments to start; XLA may pass a slice without a copy

_log = logging.getLogger(__name__)
_said: set[tuple[str, str]] = set()  # (op, implementation) that the log has
_used: ContextVar[dict[tuple[str, str], None] | None] = ContextVar("used", default=None)


def dispatch(op: str, implementations: Mapping[str, Callable[..., Any]], impl: str, *args: Any, **kwargs: Any) -> Any:
    """Call the first implementation that accepts the call, or exactly `impl` if it is not "auto".

    ValueError for an unknown `impl`; an ExceptionGroup of every refusal if none is left.
    """
    if impl != "auto" and impl not in implementations:
        raise ValueError(f"{op}: impl must be one of {('auto', *implementations)}, got {impl!r}")
    refusals = []
    for name in implementations if impl == "auto" else (impl,):
        try:
            result = implementations[name](*args, **kwargs)
        except NotImplementedError as error:
            error.add_note(f"implementation {name!r} of {op}")
            refusals.append(error)
        else:
            note_implementation(op, name)
            return result
    raise ExceptionGroup(f"{op}: no implementation serves this call", refusals)


def note_implementation(op: str, name: str) -> None:
    """Say that `op` runs as `name`: `dispatch` does, and whoever has a function that was traced in another process."""
    if (op, name) not in _said:
        _said.add((op, name))
        _log.info("%s runs as %s", op, name)
    if (used := _used.get()) is not None:
        used[op, name] = None


@contextmanager
def implementations_used() -> Iterator[dict[tuple[str, str], None]]:
    """The (op, implementation) that this context traces from here on to the end of the block, in order. Blocks nest; threads
    that trace for it run in copies of the context."""
    used: dict[tuple[str, str], None] = {}
    token = _used.set(used)
    try:
        yield used
    finally:
        _used.reset(token)
        if (outer := _used.get()) is not None:
            outer.update(used)
