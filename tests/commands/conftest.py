"""A server around the fake engine for the commands that talk to one."""

import pytest

from jaxkv.runtime.tokenizer import load_tokenizer
from jaxkv.runtime.weights import BUILT_IN
from tests.serve.serve_fakes import FakeEngine, serving


@pytest.fixture(scope="session")
def tokenizer():
    return load_tokenizer(BUILT_IN)


@pytest.fixture(scope="module")
def server(tokenizer):
    with serving(lambda: FakeEngine(tokenizer, max_model_len=5000, step_seconds=0.005), api_keys=("secret",)) as server:
        yield server
