"""schemathesis: what the OpenAPI document says can be sent, and much that it says cannot. Nothing of it is a 5xx."""

import importlib.util
import json
import subprocess
import sys
from collections import Counter

import pytest

EXAMPLES = "12"  # of each operation, besides those of the coverage phase


@pytest.mark.skipif(importlib.util.find_spec("schemathesis") is None, reason="schemathesis is not installed: extra clients")
def test_no_request_is_a_server_error(server, tmp_path):
    base, report = server.url.removesuffix("/v1"), tmp_path / "report.har"
    done = subprocess.run(
        [sys.executable, "-m", "schemathesis.cli", "run", f"{base}/openapi.json", "--header",
         f"Authorization: Bearer {server.key}", "--checks", "not_a_server_error", "--max-examples", EXAMPLES,
         "--phases", "examples,coverage,fuzzing", "--mode", "all", "--seed", "1", "--request-timeout", "30",
         "--report", "har", "--report-har-path", str(report)],
        text=True, capture_output=True, timeout=200, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    statuses = Counter(entry["response"]["status"] for entry in json.loads(report.read_text())["log"]["entries"])
    assert statuses[200] > 100 and statuses[400] > 500 and max(statuses) < 500, statuses
    assert "Unresolvable references" not in done.stdout
