"""The official Node client."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

NODE = Path(__file__).parent / "node"
pytestmark = [
    pytest.mark.skipif(shutil.which("node") is None, reason="there is no node"),
    pytest.mark.skipif(not (NODE / "node_modules" / "openai").is_dir(), reason="run `npm ci` in tests/clients/node first"),
]


def test_openai_for_node(server):
    done = subprocess.run(["node", "client.mjs", server.url, server.key], cwd=NODE, text=True, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["models"] == [server.model]
    choice = seen["chat"]["choices"][0]
    assert choice["message"]["role"] == "assistant" and choice["finish_reason"] in ("stop", "length")
    assert "".join(seen["deltas"]) == choice["message"]["content"] != ""
    tokens = choice["logprobs"]["content"]
    assert seen["usage"]["completion_tokens"] == seen["chat"]["usage"]["completion_tokens"] == len(tokens)
    assert all(len(token["top_logprobs"]) == 2 for token in tokens)
    assert [c["index"] for c in seen["completion"]["choices"]] == [0, 1]
    assert 3 <= seen["aborted"] < 50, "an answer would have hundreds"
    assert seen["errors"] == [
        {"name": "BadRequestError", "status": 400, "param": "temperature", "code": None},
        {"name": "NotFoundError", "status": 404, "param": "model", "code": "model_not_found"},
        {"name": "AuthenticationError", "status": 401, "param": None, "code": "invalid_api_key"}]
