"""The last lines of a start: where the server answers, and a request to paste."""

from __future__ import annotations

import json
import shlex
from typing import Any


def announcement(url: str, model: str, *, text: bool, chat: bool, keys: bool) -> list[str]:
    """``text``: there is a tokenizer; ``chat``: and a chat template; ``keys``: a key is needed, which is never shown."""
    reachable = url.replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:")
    path = "completions"
    ask: dict[str, Any] = {"prompt": "Once upon a time" if text else [1, 2, 3]}
    if chat:
        path, ask = "chat/completions", {"messages": [{"role": "user", "content": "Hello"}]}
    body = json.dumps({"model": model, **ask, "max_tokens": 32}, ensure_ascii=False)
    key = " -H 'authorization: Bearer YOUR_KEY'" if keys else ""
    return [f"ready: {url}/v1 (model {model}{', key needed' if keys else ''}); stop with Ctrl+C",
            f"try: curl {reachable}/v1/{path} -H 'content-type: application/json'{key} -d {shlex.quote(body)}"]
