"""The page at ``/``: a playground and a live view of the KV cache, and the numbers that it shows.

Owns which files are served, how they are cached and what the browser may do with them. The files in ``web/`` are the
whole app: no build step, nothing from other origins. They hold no secret, so no key guards them; what they ask for is
guarded as for any other client.
"""

from __future__ import annotations

import time
from hashlib import blake2b
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from jaxkv.runtime.metrics import EngineMetrics, Histogram, TierUsage
from jaxkv.serve.openapi import documented
from jaxkv.serve.service import Service

_TYPES = {"html": "text/html; charset=utf-8", "css": "text/css; charset=utf-8", "js": "text/javascript; charset=utf-8",
          "svg": "image/svg+xml"}
_HEADERS = {
    "cache-control": "no-cache",  # asked for again every time, answered by 304 while it is the same
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
                               "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


def add_page(app: FastAPI, service: Service) -> None:
    """Adds ``/``, its files under ``/web/`` and ``/debug/stats`` to the app."""
    assets = {file.name: (file.read_bytes(), kind) for file in (files("jaxkv.serve") / "web").iterdir()
              if (kind := _TYPES.get(file.name.rpartition(".")[2]))}

    @app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    @app.api_route("/web/{name}", methods=["GET", "HEAD"], include_in_schema=False)
    async def asset(request: Request, name: str = "index.html") -> Response:
        if name not in assets:
            raise HTTPException(404)
        body, kind = assets[name]
        headers = _HEADERS | {"etag": f'"{blake2b(body, digest_size=12).hexdigest()}"'}
        if request.headers.get("if-none-match") == headers["etag"]:
            return Response(status_code=304, headers=headers)
        return Response(body, headers=headers, media_type=kind)

    @app.get("/debug/stats", **documented(None, None))
    async def stats() -> Any:
        latencies = service.loop.latencies
        return {"time": time.monotonic(), "model": service.model_name(), **_counters(service.engine().metrics),
                "time_to_first_token": _sums(latencies.first_token), "inter_token": _sums(latencies.between_tokens)}


def _counters(m: EngineMetrics) -> dict[str, Any]:
    return {
        "running": m.running, "waiting": m.waiting, "preemptions": m.preemptions,
        "prompt_tokens": m.prompt_tokens, "generation_tokens": m.generation_tokens, "computed_tokens": m.computed_tokens,
        "prefix_query_tokens": m.prefix_query_tokens, "prefix_hit_tokens": m.prefix_hit_tokens,
        "tiers": {"hbm": _fill(m.device), "host": _fill(m.host), "disk": _fill(m.disk)},
    }


def _fill(tier: TierUsage) -> dict[str, int]:
    return {"pages_used": tier.pages_used, "pages_active": tier.pages_active, "pages_total": tier.pages_total,
            "tokens_total": tier.tokens_total, "bytes_used": tier.bytes_used, "bytes_total": tier.bytes_total}


def _sums(histogram: Histogram) -> dict[str, float]:
    """Seconds in all and how many observations."""
    return {"sum": histogram.total, "count": sum(histogram.counts)}
