"""The page against the fake engine: its files, stop, keys, and what goes wrong."""

from __future__ import annotations

import contextlib
import re
from importlib.resources import files

import httpx
import pytest
from browsing import ask, metric, opened, ready, set_fields
from chat_templates import R1
from playwright.sync_api import expect
from serve_fakes import FakeEngine, ScriptedEngine, serving, wait_for

from jaxkv.serve.dialect import ChatOptions


def test_files_are_whole_cached_and_locked_in(fake):
    names = {file.name: file.read_text() for file in (files("jaxkv.serve") / "web").iterdir()}
    wanted = set(re.findall(r'/web/([\w.]+)|from "\./([\w.]+)"', "".join(names.values())))
    assert {one or other for one, other in wanted} | {"index.html"} == set(names)
    for name, text in names.items():
        links = re.findall(r"https?://[\w./]+", text)
        assert set(links) <= {"http://www.w3.org/2000/svg"}, (name, links)
        answer = httpx.get(f"{fake.url}/web/{name}")
        assert answer.text == text and "default-src 'none'" in answer.headers["content-security-policy"]
        etag = {"if-none-match": answer.headers["etag"]}
        again = httpx.get(f"{fake.url}/web/{name}", headers=etag)
        assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", etag["if-none-match"])
    page = httpx.get(f"{fake.url}/")
    assert page.text == names["index.html"] and page.headers["content-type"] == "text/html; charset=utf-8"
    assert not re.search(r"<script>|\son\w+=|\sstyle=", page.text)  # the policy would stop them
    assert httpx.head(f"{fake.url}/").status_code == 200
    missing = httpx.get(f"{fake.url}/web/..%2fpage.py")
    assert missing.status_code == 404 and missing.json()["error"]["type"] == "not_found_error"


def test_tokens_are_spelt_as_the_tokenizer_does(browser, fake, tokenizer):
    spell = "strings => import('/web/tokens.js').then(tokens => tokens.textsOfVocabulary(strings))"
    ids = range(tokenizer.vocab_size)
    with opened(browser, fake.url) as page:
        spelt = page.evaluate(spell, tokenizer.hf.convert_ids_to_tokens(list(ids)))
        assert page.evaluate(spell, ["\u2581the", "\u65e5", "\u00e9t\u00e9"]) == [" the", "\u65e5", "\u00e9t\u00e9"]
    for one, text in zip(ids, spelt, strict=True):
        raw = tokenizer.token_bytes(one)
        try:
            assert text == raw.decode()
        except UnicodeDecodeError:
            assert text == "".join(f"\\x{byte:02x}" for byte in raw)


def test_stats_are_those_of_metrics(fake):
    usage = httpx.post(f"{fake.url}/v1/completions", json={"prompt": "a", "max_tokens": 9}).json()["usage"]
    stats = httpx.get(f"{fake.url}/debug/stats").json()
    assert stats["generation_tokens"] == metric(fake.url, "vllm:generation_tokens_total") >= usage["completion_tokens"]
    assert stats["time_to_first_token"]["count"] == metric(fake.url, "vllm:time_to_first_token_seconds_count") > 0


@pytest.fixture(scope="module")
def slow(tokenizer):
    with serving(lambda: FakeEngine(tokenizer, step_seconds=0.05)) as server:
        yield server


def test_stop_ends_the_request_and_keeps_what_came(browser, slow):
    with opened(browser, slow.url) as page:
        ready(page)
        set_fields(page, max_tokens=200)
        page.fill("#question", "hi")
        page.press("#question", "Enter")
        expect(page.locator(".answer .text")).to_contain_text("The cat")
        assert slow.engine.children
        page.click("#ask .stop")
        wait_for(lambda: not slow.engine.children)
        expect(page.locator(".facts")).to_contain_text("stopped")
        assert page.evaluate("document.activeElement.id") == "question"
        said = page.locator(".answer .text").text_content()
        set_fields(page, max_tokens=2)
        ask(page, "more")
        assert said in slow.engine.tokenizer.decode(slow.engine.requests[-1].prompt)


def test_reasoning_stands_beside_the_answer(browser, tokenizer):
    with serving(lambda: ScriptedEngine(tokenizer), chat=ChatOptions(R1)) as server, opened(browser, server.url) as page:
        ready(page)
        server.engine.script = "hm</think>\n\nYes."
        ask(page, "so?")
        expect(page.locator(".thought")).to_have_text("hm")
        expect(page.locator(".answer .text")).to_have_text("Yes.")
        ask(page, "sure?")
        prompt = tokenizer.decode(server.engine.requests[-1].prompt, skip_special_tokens=False)
        assert "Yes." in prompt and "hm" not in prompt


def test_errors_are_shown_in_the_servers_words(browser, slow):
    with opened(browser, slow.url, fails=True) as page:
        ready(page)
        alert = page.locator("#alert")
        set_fields(page, temperature=101, max_tokens=5)
        page.fill("#question", "hello?")
        page.press("#question", "Enter")
        expect(alert).to_contain_text("400: temperature must be in [0, 100], got 101")
        expect(page.locator("article")).to_have_count(0)
        assert page.input_value("#question") == "hello?"
        set_fields(page, temperature="")
        limit, slow.loop.max_open = slow.loop.max_open, 0
        page.press("#question", "Enter")
        expect(alert).to_contain_text("429: ")
        expect(alert).to_contain_text("Try again in 1 s.")
        slow.loop.max_open = limit
        slow.loop.draining = True
        page.press("#question", "Enter")
        expect(alert).to_contain_text("503: ")
        slow.loop.draining = False
        alert.get_by_role("button").click()
        expect(alert).to_be_hidden()
        ask(page, "hello?")
        expect(page.locator("article")).to_have_count(2)


def test_a_server_that_dies_is_told(browser, tokenizer):
    with serving(lambda: FakeEngine(tokenizer, step_seconds=0.05)) as server, opened(browser, server.url, fails=True) as page:
        ready(page)
        set_fields(page, max_tokens=200)
        page.fill("#question", "hello?")
        page.press("#question", "Enter")
        expect(page.locator(".answer .text")).to_contain_text("The")
        server.engine.crash = RuntimeError("device lost")
        expect(page.locator("#alert")).to_contain_text("the engine failed")
        expect(page.locator(".answer .text")).to_contain_text("The")
        expect(page.locator("#ask .primary")).to_be_enabled()
        expect(page.locator(".facts")).to_contain_text("broken off")


def test_a_server_that_is_gone_is_told(browser, tokenizer):
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(serving(lambda: FakeEngine(tokenizer)))
        with opened(browser, server.url, fails=True) as page:
            ready(page)
            stack.close()
            page.fill("#question", "hello?")
            page.press("#question", "Enter")
            expect(page.locator("#alert")).to_contain_text("cannot be reached")
            expect(page.locator("#state")).to_have_text("away", timeout=15_000)


def test_the_key_is_asked_for_once_and_kept_for_the_tab(browser, tokenizer):
    with serving(lambda: FakeEngine(tokenizer), api_keys=("secret",)) as server:
        assert httpx.get(f"{server.url}/debug/stats").status_code == 401
        with opened(browser, server.url, fails=True) as page:
            dialog = page.get_by_role("dialog")
            for key, why in (("wrong", "asks for a key"), ("secret", "does not know that key")):
                expect(dialog).to_contain_text(why)
                page.fill("#keyvalue", key)
                page.press("#keyvalue", "Enter")
            ready(page)
            expect(dialog).to_be_hidden()
            set_fields(page, max_tokens=3)
            ask(page, "hi")
            page.reload()
            ready(page)
            assert page.evaluate("[Object.keys(localStorage).join(), sessionStorage.length]") == ["jaxkv-theme", 1]
            page.goto(f"{server.url}/#dashboard")
            expect(page.locator("#tiers [role=meter]")).to_have_count(3)
