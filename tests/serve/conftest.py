"""Servers for a whole test session: one around the fake engine, one around the real one."""

import shutil
from pathlib import Path

import httpx
import openai
import pytest
from browsing import FLAGS
from chat_templates import QWEN
from playwright.sync_api import sync_playwright
from serve_fakes import FakeEngine, ScriptedEngine, serving

from jaxkv.runtime.tokenizer import load_tokenizer
from jaxkv.serve.dialect import ChatOptions

CHECKPOINT = Path(__file__).parents[2] / "checkpoints" / "default"


@pytest.fixture(scope="session")
def tokenizer():
    return load_tokenizer(CHECKPOINT)


@pytest.fixture(scope="session")
def fake(tokenizer):
    with serving(lambda: FakeEngine(tokenizer)) as server:
        yield server


@pytest.fixture(scope="module")
def server(tokenizer):
    """Around an engine that says what a test tells it to, with tools and reasoning as Qwen writes them."""
    with serving(lambda: ScriptedEngine(tokenizer, max_model_len=1024), chat=ChatOptions(QWEN)) as server:
        yield server


@pytest.fixture(scope="session")
def http(fake):
    with httpx.Client(base_url=fake.url, timeout=20) as client:
        yield client


@pytest.fixture(scope="session")
def client(fake):
    with openai.OpenAI(base_url=f"{fake.url}/v1", api_key="none", max_retries=0, timeout=20) as client:
        yield client


@pytest.fixture(scope="module")
def browser():
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("there is no chromium on the path")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        yield browser
        browser.close()
