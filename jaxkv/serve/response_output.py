"""The output of /v1/responses while it is written: reasoning, messages and calls as items, and the events about them.

An item is done before the next one begins, so that the events of a stream put together are the whole answer.
"""

from __future__ import annotations

import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

from jaxkv.serve.parsers.base import CallDelta

Event = dict[str, Any]


class Item(ABC):
    """An item at ``index`` of the output. Each of its methods returns the events of what it did."""

    prefix: ClassVar[str]  # of ids
    field: ClassVar[str]  # what its text is called in events

    def __init__(self, index: int) -> None:
        self.index, self.id = index, f"{self.prefix}_{uuid.uuid4().hex}"
        self.text: list[str] = []

    @abstractmethod
    def whole(self, status: str) -> dict[str, Any]:
        """The item as it is by now."""

    def begin(self) -> list[Event]:
        return [self._about("added", "in_progress")]

    def add(self, text: str, **more: Any) -> list[Event]:
        """The next text."""
        self.text.append(text)
        return [self.event(f"{self.field}.delta", delta=text, **more)]

    def end(self, status: str) -> list[Event]:
        return [self._about("done", status)]

    def event(self, kind: str, **fields: Any) -> Event:
        return {"type": f"response.{kind}", "item_id": self.id, "output_index": self.index} | fields

    def _about(self, kind: str, status: str) -> Event:
        return {"type": f"response.output_item.{kind}", "output_index": self.index, "item": self.whole(status)}


class TextItem(Item):
    """An item with one part of text."""

    @abstractmethod
    def part(self) -> dict[str, Any]:
        """The part as it is by now."""

    def begin(self) -> list[Event]:
        return [*super().begin(), self.event("content_part.added", part=self.part())]

    def end(self, status: str) -> list[Event]:
        part = self.part()
        done = {name: value for name, value in part.items() if name in ("text", "logprobs")}
        return [self.event(f"{self.field}.done", **done), self.event("content_part.done", part=part), *super().end(status)]

    def event(self, kind: str, **fields: Any) -> Event:
        return super().event(kind, content_index=0, **fields)


class Reasoning(TextItem):
    prefix, field = "rs", "reasoning_text"

    def part(self) -> dict[str, Any]:
        return {"type": "reasoning_text", "text": "".join(self.text)}

    def whole(self, status: str) -> dict[str, Any]:
        content = [self.part()] if status != "in_progress" else []
        return {"id": self.id, "type": "reasoning", "status": status, "summary": [], "content": content}


class Message(TextItem):
    prefix, field = "msg", "output_text"

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.logprobs: list[dict[str, Any]] = []

    def add(self, text: str, **more: Any) -> list[Event]:
        self.logprobs += more["logprobs"]
        return super().add(text, **more)

    def part(self) -> dict[str, Any]:
        return {"type": "output_text", "text": "".join(self.text), "annotations": [], "logprobs": self.logprobs}

    def whole(self, status: str) -> dict[str, Any]:
        content = [self.part()] if status != "in_progress" else []
        return {"id": self.id, "type": "message", "status": status, "role": "assistant", "content": content}


class FunctionCall(Item):
    prefix, field = "fc", "function_call_arguments"

    def __init__(self, index: int, call_id: str, name: str) -> None:
        super().__init__(index)
        self._call_id, self._name = call_id, name

    def whole(self, status: str) -> dict[str, Any]:
        return {"id": self.id, "type": "function_call", "status": status, "call_id": self._call_id, "name": self._name,
                "arguments": "".join(self.text)}

    def end(self, status: str) -> list[Event]:
        done = self.event(f"{self.field}.done", name=self._name, arguments="".join(self.text))
        return [done, *super().end(status)]


class Output:
    """The items of an answer, of which the last may be open. Methods return the events of what they did."""

    def __init__(self, call_id: Callable[[], str]) -> None:
        self.items: list[dict[str, Any]] = []  # that are done
        self._call_id = call_id
        self._open: Item | None = None
        self._logprobs: list[dict[str, Any]] = []  # of tokens whose text has not come yet

    def reason(self, text: str) -> list[Event]:
        """The next text of the reasoning."""
        events = [] if isinstance(self._open, Reasoning) else self._begin(Reasoning(self._next()))
        return events + self._add(text)

    def score(self, logprobs: list[dict[str, Any]], *, reasoning: bool) -> None:
        """Those of the next tokens. Of reasoning and of calls they are left out."""
        if reasoning:
            self._logprobs = []
        else:
            self._logprobs += logprobs

    def say(self, text: str) -> list[Event]:
        """The next text of a message."""
        events = [] if isinstance(self._open, Message) else self._begin(Message(self._next()))
        logprobs, self._logprobs = self._logprobs, []
        return events + self._add(text, logprobs=logprobs)

    def call(self, piece: CallDelta) -> list[Event]:
        """The next piece of a call."""
        self._logprobs = []
        events = [] if piece.name is None else self._begin(FunctionCall(self._next(), self._call_id(), piece.name))
        return events + (self._add(piece.arguments) if piece.arguments else [])

    def end(self, status: str) -> list[Event]:
        """No more comes. An answer of nothing is an empty message."""
        rest = self._open is None or isinstance(self._open, Message) and bool(self._logprobs)
        return (self.say("") if rest else []) + self._close(status)

    def _next(self) -> int:
        return len(self.items) + (self._open is not None)

    def _add(self, text: str, **more: Any) -> list[Event]:
        assert self._open is not None
        return self._open.add(text, **more)

    def _begin(self, item: Item) -> list[Event]:
        events = self._close("completed")
        self._open = item
        return events + item.begin()

    def _close(self, status: str) -> list[Event]:
        if self._open is None:
            return []
        item, self._open = self._open, None
        self.items.append(item.whole(status))
        return item.end(status)
