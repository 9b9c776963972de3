"""guidellm, a load generator: every request of it succeeds, and it counts the tokens that the server counts."""

import importlib.util
import json
import subprocess
import sys

import pytest


@pytest.mark.skipif(importlib.util.find_spec("guidellm") is None, reason="guidellm is not installed: extra clients")
def test_a_load_of_conversations(server, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "guidellm", "run",
         "--backend", f"kind=openai_http,target={server.url.removesuffix('/v1')},model={server.model},api_key={server.key}",
         "--profile", "kind=concurrent,streams=16", "--constraint", "kind=max_requests,count=48",
         "--tokenizer", f"kind=huggingface_auto,model={server.tokenizer}",
         "--data", "kind=synthetic_text,prompt_tokens=40,output_tokens=16",
         "--output", "kind=json,path=out.json", "--disable-console"], cwd=tmp_path, text=True, capture_output=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    benchmark = json.loads((tmp_path / "out.json").read_text())["benchmarks"][0]
    assert benchmark["metrics"]["request_totals"] == {"successful": 48, "errored": 0, "incomplete": 0, "total": 48}
    requests = benchmark["requests"]["successful"]
    assert all(r["output_tokens"] == 16 and r["prompt_tokens"] >= 40 for r in requests)
    assert all(0 < r["time_to_first_token_ms"] < 1e3 * r["request_latency"] for r in requests)
