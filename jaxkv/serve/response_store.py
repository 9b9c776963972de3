"""Finished answers of /v1/responses, in memory, for ``previous_response_id``."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import orjson

from jaxkv.serve.errors import ApiError

MAX_STORED = 4096  # answers
MAX_STORED_BYTES = 64 * 2**20  # of their JSON and the conversations they belong to


@dataclass(frozen=True)
class Stored:
    """A finished answer and the conversation that ends with it."""

    body: dict[str, Any]
    messages: list[dict[str, Any]]
    size: int  # bytes
    owner: str


class ResponseStore:
    """Answers by id, bounded in number and bytes; the oldest leave first."""

    def __init__(self, max_items: int = MAX_STORED, max_bytes: int = MAX_STORED_BYTES):
        self._max_items, self._max_bytes = max_items, max_bytes
        self._items: OrderedDict[str, Stored] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()  # long answers are made, and kept, on another thread

    def put(self, body: dict[str, Any], messages: list[dict[str, Any]], owner: str = "") -> None:
        """Keeps an answer as long as there is room."""
        size = len(orjson.dumps([body, messages]))
        with self._lock:
            self._items[body["id"]] = Stored(body, messages, size, owner)
            self._bytes += size
            while len(self._items) > self._max_items or self._bytes > self._max_bytes:
                self._bytes -= self._items.popitem(last=False)[1].size

    def get(self, name: str, param: str | None = None, owner: str = "") -> Stored:
        """Raises ApiError, a 404, for an id that the owner does not know or that has left."""
        found = self._items.get(name)
        if found is None or found.owner != owner:
            raise ApiError(404, f"response {name[:100]!r} does not exist, or was kept no longer", param=param,
                           code="response_not_found")
        return found

    def delete(self, name: str, owner: str = "") -> None:
        """Raises ApiError, a 404, for an id that the owner does not know or that has left."""
        with self._lock:
            self._bytes -= self.get(name, owner=owner).size
            del self._items[name]
