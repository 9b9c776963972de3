"""A real server for clients that people use. They live in an environment of their own (the extra ``clients``), which needs
no JAX: the server runs under $JAXKV_PYTHON, by default the Python of the tests. Loads nothing of ours."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[2]
PYTHON = os.environ.get("JAXKV_PYTHON", sys.executable)
KEY = "key-for-tests"


@pytest.fixture(scope="session")
def python():
    """Runs a script with the Python that has JAX: (arguments, standard input) -> standard output."""
    def run(*args: str, stdin: str = "") -> str:
        return subprocess.run([PYTHON, *args], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, input=stdin, text=True,
                              stdout=subprocess.PIPE, check=True, timeout=250).stdout

    return run


@pytest.fixture(scope="session")
def server():
    """The built-in model: ``url`` (ends with /v1), ``key``, ``model`` and ``tokenizer``, its directory."""
    child = subprocess.Popen(
        [PYTHON, "-m", "jaxkv.serve", "--port", "0", "--api-key", KEY, "--max-model-len", "512", "--max-num-seqs", "8",
         "--max-num-batched-tokens", "128", "--kv-cache-memory", "8M", "--host-kv-memory", "4M"],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout
        url = next((line.split()[1] for line in child.stdout if line.startswith("ready: ")), None)
        assert url, "the server ended before it was ready"
        yield SimpleNamespace(url=url, key=KEY, model="jaxkv-tiny", tokenizer=str(ROOT / "checkpoints" / "default"))
        assert child.poll() is None, "a client brought the server down"
    finally:
        child.terminate()
        assert child.wait(60) == 0
