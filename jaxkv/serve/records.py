"""What is known of one HTTP request at its end, and its line in the log, as text or JSON.

Owns the names of the logged fields. Nothing of an API key, a prompt or an answer is ever in a record.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from jaxkv.serve.calls import Call

log = logging.getLogger("jaxkv.serve.request")
RECORD = "jaxkv.record"  # where in an ASGI scope the request's record is
_TEXT = "%(levelname)s %(name)s: %(message)s"


@dataclass(slots=True)
class Record:
    """One request from its head to its last byte. Times are seconds of ``time.monotonic``."""

    id: str
    route: str  # method and path
    traceparent: str | None = None
    arrival: float = field(default_factory=time.monotonic)
    end: float = 0.0
    status: int = 0  # 0: no answer was begun
    error: str | None = None  # code of an error that came after the status line
    calls: Sequence[Call] = ()  # what it asked of the engine

    def fields(self) -> dict[str, Any]:
        """The logged values; times in milliseconds. Those of the engine are there if the request got to it."""
        out: dict[str, Any] = {"id": self.id, "route": self.route, "status": self.status}
        if self.calls:
            queued = [call.start.admitted - call.arrival for call in self.calls if call.start]
            reasons = dict.fromkeys(reason for call in self.calls for reason in call.reasons)
            out |= {"prompt_tokens": sum(len(call.prompt) for call in self.calls),
                    "cached_tokens": sum(call.cached for call in self.calls),
                    "output_tokens": sum(call.tokens for call in self.calls)}
            if queued:
                out["queue_ms"] = _ms(min(queued))
            if firsts := [call.first for call in self.calls if call.first]:  # none for embeddings
                out["ttft_ms"] = _ms(min(firsts) - self.arrival)
            out["finish_reason"] = "+".join(reasons) or None
        if self.error:
            out["error"] = self.error
        return out | {"total_ms": _ms(self.end - self.arrival)}

    def write(self) -> None:
        """Logs the request; what only looks at the server, and finds it well, at a level nobody sees."""
        level = logging.DEBUG if self.route.startswith("GET ") and self.status == 200 else logging.INFO
        if log.isEnabledFor(level):
            fields = self.fields()
            log.log(level, " ".join(f"{name}={value}" for name, value in fields.items()), extra={"fields": fields})


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, and the message or, of a request, its fields."""

    def format(self, record: logging.LogRecord) -> str:
        line = {"time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"), "level": record.levelname, "logger": record.name}
        fields = getattr(record, "fields", None)
        line |= fields if fields is not None else {"message": record.getMessage()}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return orjson.dumps(line, default=str).decode()


def set_up_logs(form: str, requests: bool) -> None:
    """Logs of the process go to stderr as ``form`` ("text" or "json"), warnings of others, more of ours."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if form == "json" else logging.Formatter(_TEXT))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    for name in ("jaxkv", "pallas_kernels"):
        logging.getLogger(name).setLevel(logging.INFO)
    log.setLevel(logging.INFO if requests else logging.WARNING)


def _ms(seconds: float) -> float:
    return round(1e3 * seconds, 1)
