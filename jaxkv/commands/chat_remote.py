"""A running server as the one who answers in a chat."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxkv.commands.http import HttpError, Server
from jaxkv.config import ConfigError


class Remote:
    """Asks the first model that the server lists. ConfigError if the server cannot be asked."""

    def __init__(self, server: Server, url: str, params: Mapping[str, Any]) -> None:
        self._server, self._params = server, dict(params)
        try:
            self._model = asyncio.run(server.get("/v1/models"))["data"][0]["id"]
        except HttpError as error:
            raise ConfigError(f"url {url}: {error}") from None
        except (LookupError, TypeError):
            raise ConfigError(f"url {url} lists no models: is it an OpenAI-compatible server?") from None
        self.name = f"{self._model} at {url}"

    def answer(self, messages: Sequence[Mapping[str, str]], show: Callable[[str], None]) -> None:
        """Shows the parts of an answer as they come. Ctrl+C ends the connection, and so the server's work; ValueError says
        what the server refused."""
        try:
            asyncio.run(self._stream(messages, show))
        except HttpError as error:
            raise ValueError(str(error)) from None

    async def _stream(self, messages: Sequence[Mapping[str, str]], show: Callable[[str], None]) -> None:
        request = {"model": self._model, "messages": list(messages), "stream": True, **self._params}
        async for event in self._server.events("/v1/chat/completions", request):
            for choice in event.get("choices") or ():
                delta = choice["delta"]
                if part := (delta.get("reasoning_content") or "") + (delta.get("content") or ""):
                    show(part)

    def close(self) -> None:
        """Nothing is left open between answers."""
