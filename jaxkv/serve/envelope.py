"""What stands around the answer to a line of a batch, for files of ours and for /v1/batches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxkv.serve.errors import ApiError, bad_request


@dataclass(frozen=True)
class Envelope:
    """What stands around an answer: the batch format's ids, or a plain line's "id" and prompt."""

    plain: bool
    fields: dict[str, Any]

    def answer(self, status: int, body: Any) -> dict[str, Any]:
        """A batch record around an HTTP-like response."""
        return self.fields | {"response": {"status_code": status, "request_id": self.fields["id"], "body": body},
                              "error": None}

    def refusal(self, error: ApiError) -> dict[str, Any]:
        """The record of a line that cannot be answered."""
        if self.plain:
            return self.fields | {"error": error.body()["error"]}
        if "custom_id" not in self.fields:  # no request at all
            return self.fields | {"custom_id": None, "response": None, "error": error.body()["error"]}
        return self.answer(error.status, error.body())


def envelope_of(data: Mapping[str, Any], unnamed: Envelope) -> Envelope:
    """What stands around a line's answer. Raises ApiError for a batch line without a name."""
    if not {"custom_id", "url", "method", "body"} & set(data):
        return Envelope(True, {key: data[key] for key in ("id", "prompt") if key in data})
    if not isinstance(data.get("custom_id"), str):
        raise bad_request(f"custom_id must be a string, got {data.get('custom_id')!r:.80}", "custom_id")
    return Envelope(False, unnamed.fields | {"custom_id": data["custom_id"]})
