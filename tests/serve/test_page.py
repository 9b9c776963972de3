"""The page in a real browser: against the real engine with pools so small that all tiers are used, and against the fake one
for what must go wrong."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Iterator
from importlib.resources import files

import httpx
import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright
from serve_fakes import FakeEngine, ServerProcess, serving, wait_for

CHROMIUM = shutil.which("chromium")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]
PROMPTS = [f"# file {i}\n" + "".join(f"def function_{i}_{k}(argument):\n    return argument + {i * k}\n" for k in range(16))
           for i in range(5)]  # three pools of HBM
TIERS = ("hbm", "host", "disk")
browses = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on the path")


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    """The real server. Steps of 64 tokens are too short to be measured, so all that is found below HBM is brought."""
    disk = str(tmp_path_factory.mktemp("disk"))
    server = ServerProcess("-m", "jaxkv.serve", "--port", "0", "--max-model-len", "512", "--max-num-seqs", "2",
                           "--max-num-batched-tokens", "64", "--kv-cache-memory", "3M", "--host-kv-memory", "2M",
                           "--disk-kv-path", disk, "--disk-kv-memory", "32M")
    try:
        yield server.ready().removesuffix("/v1")
    finally:
        server.child.terminate()
    assert server.end()[0] == 0


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@contextlib.contextmanager
def opened(browser: Browser, url: str, view: str = "chat", *, width: int = 1280, scheme: str = "light",
           fails: bool = False) -> Iterator[Page]:
    """A view of the page in a fresh profile. It asks nobody but its server, and complains of nothing: with ``fails`` the
    browser may, of answers that are no success."""
    complaints, elsewhere = [], []
    with browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme) as context:
        page = context.new_page()
        page.set_default_timeout(15_000)
        page.on("console", lambda m: complaints.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda r: None if r.url.startswith(f"{url}/") else elsewhere.append(r.url))
        page.goto(f"{url}/#{view}")
        yield page
    assert not elsewhere
    assert not [text for text in complaints if not (fails and text.startswith("Failed to load resource"))]


def ready(page: Page) -> None:
    expect(page.locator("#state")).to_have_text("ready")


def set_fields(page: Page, **fields: object) -> None:
    for name, value in fields.items():
        page.fill(f"[name={name}]", str(value))


def run(page: Page, form: str, path: str) -> tuple[list[dict], dict]:
    """Sends what stands in a form; the events of the answer and its last usage."""
    with page.expect_response(lambda response: response.url.endswith(path)) as caught:
        page.click(f"{form} .primary")
    text = caught.value.text()
    expect(page.locator(f"{form} .primary")).to_be_enabled()
    events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    return events, events[-1]["usage"]


def complete(page: Page, prompt: str, **fields: object) -> tuple[list[dict], dict]:
    page.fill("#prompt", prompt)
    set_fields(page, **fields)
    return run(page, "#finish", "/v1/completions")


def ask(page: Page, question: str) -> tuple[list[dict], dict]:
    page.fill("#question", question)
    return run(page, "#ask", "/v1/chat/completions")


def open_tokens(page: Page):
    """The token lists of the last answer: prompt and answer."""
    page.get_by_role("button", name="Tokens", exact=True).last.click()
    lists = page.locator("article").last.get_by_role("listbox")
    expect(lists).to_have_count(2)
    return lists.nth(0).locator(".tok"), lists.nth(1).locator(".tok")


def metric(url: str, name: str) -> float:
    line = next(line for line in httpx.get(f"{url}/metrics").text.splitlines() if line.startswith(name))
    return float(line.split()[-1])


def fill(url: str) -> None:
    """Uses every prompt twice: then all tiers hold something."""
    with httpx.Client(base_url=url, timeout=60) as http:
        for prompt in PROMPTS * 2:
            http.post("/v1/completions", json={"prompt": prompt, "max_tokens": 1}).raise_for_status()


# ---- the files


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


def test_stats_are_those_of_metrics(fake):
    usage = httpx.post(f"{fake.url}/v1/completions", json={"prompt": "a", "max_tokens": 9}).json()["usage"]
    stats = httpx.get(f"{fake.url}/debug/stats").json()
    assert stats["generation_tokens"] == metric(fake.url, "vllm:generation_tokens_total") >= usage["completion_tokens"]
    assert stats["time_to_first_token"]["count"] == metric(fake.url, "vllm:time_to_first_token_seconds_count") > 0


# ---- with the real engine


@browses
def test_chat_streams_and_the_second_turn_is_cached(browser, url):
    with opened(browser, url) as page:
        ready(page)
        set_fields(page, temperature=0, max_tokens=24, system="Be brief.")
        events, usage = ask(page, "alpha -> red blue\nbeta -> green stone\nWhat is beta?")
        texts = [e["choices"][0]["delta"].get("content") or "" for e in events if e["choices"]]
        assert len([text for text in texts if text]) > 5 and usage["prompt_tokens_details"]["cached_tokens"] == 0
        answer = page.locator("article.answer").last
        expect(answer.locator(".text")).to_have_text("".join(texts), use_inner_text=False)
        expect(answer.locator(".facts")).to_contain_text(f"prompt {usage['prompt_tokens']} tokens, 0 cached")
        _, second = ask(page, "And alpha?")
        cached = second["prompt_tokens_details"]["cached_tokens"]
        assert cached > usage["prompt_tokens"]
        expect(page.locator(".facts").last).to_contain_text(f"{cached} cached")
        prompt, answer_tokens = open_tokens(page)
        assert (prompt.count(), answer_tokens.count()) == (second["prompt_tokens"], second["completion_tokens"])
        spelt = "".join(prompt.all_text_contents()).replace("⏎", "")
        assert "Be brief." in spelt and "".join(texts)[:10] in spelt and spelt.endswith("<|im_start|>assistant\n")
        assert "alpha -> red blue" in page.locator("#live").text_content() + spelt
        page.click("#fresh")
        expect(page.locator("article")).to_have_count(0)


@browses
def test_tokens_have_the_colours_of_the_tiers_that_usage_names(browser, url):
    fill(url)
    seen = dict.fromkeys(TIERS, 0)
    with opened(browser, url, "complete") as page:
        ready(page)
        for prompt in [*PROMPTS, PROMPTS[-1], PROMPTS[-2], PROMPTS[-3]]:
            events, usage = complete(page, prompt, temperature=0, max_tokens=3)
            found = usage["prompt_tokens_details"]
            by_tier = found["cached_tokens_by_tier"]
            assert sum(by_tier.values()) == found["cached_tokens"] < usage["prompt_tokens"]
            tokens, answer = open_tokens(page)
            ids = next(e["choices"][0]["prompt_token_ids"] for e in events if "prompt_token_ids" in e["choices"][0])
            assert tokens.count() == len(ids) == usage["prompt_tokens"]
            for tier in TIERS:
                assert page.locator(f".tok.{tier}").count() == by_tier[tier]
                seen[tier] += by_tier[tier]
            assert page.locator(".tok.computed").count() == usage["prompt_tokens"] - found["cached_tokens"]
            classes = tokens.evaluate_all("all => all.map(one => one.className)")
            order = [f"tok {kind}" for kind in (*TIERS, "computed")]
            assert classes == sorted(classes, key=order.index), "a prefix lies in HBM, then below it, the rest is computed"
            assert "".join(tokens.all_text_contents()).replace("⏎", "") == prompt
            assert answer.count() == usage["completion_tokens"]
        assert all(seen.values()), seen
        answer.first.hover()
        logprobs = events[0]["choices"][0]["logprobs"]
        expect(page.locator(".tokenview .panel")).to_contain_text(f"id {events[0]['choices'][0]['token_ids'][0]}")
        rows = page.locator(".tokenview .panel tr")
        assert rows.count() == len(logprobs["top_logprobs"][0])


@browses
def test_dashboard_numbers_are_those_of_metrics(browser, url):
    fill(url)
    with opened(browser, url, "dashboard") as page:
        ready(page)
        httpx.post(f"{url}/v1/completions", json={"prompt": PROMPTS[0], "max_tokens": 20, "ignore_eos": True}, timeout=60)
        tile = lambda name: page.locator("dl", has=page.get_by_text(name, exact=True)).locator("dd")  # noqa: E731
        expect(tile("Generated tokens")).to_have_text(f"{metric(url, 'vllm:generation_tokens_total'):,.0f}")
        expect(tile("Prompt tokens")).to_have_text(f"{metric(url, 'vllm:prompt_tokens_total'):,.0f}")
        rate = metric(url, "vllm:prefix_cache_hits_total") / metric(url, "vllm:prefix_cache_queries_total")
        percent = float(tile("Hit rate").text_content().removesuffix(" %"))
        assert percent == pytest.approx(100 * rate, abs=0.051)
        for tier, name, unit in zip(TIERS, ("device", "host", "disk"), ("pages", "pages", "bytes")):
            used, total = (int(metric(url, f'jaxkv:tier_{unit}_{kind}{{model_name="jaxkv-tiny",tier="{name}"}}'))
                           for kind in ("used", "total"))
            meter = page.locator(f"[data-tier={tier}] [role=meter]")
            assert 0 < used <= total
            expect(meter).to_have_attribute("aria-valuenow", str(round(100 * used / total)))
        expect(page.locator("#charts svg").first).to_have_attribute("aria-label", re.compile("Throughput in tokens/s, now: "))
        expect(page.locator("#charts .line").first).to_have_attribute("d", re.compile("^M.*L"))
        drawn = page.locator("#charts .line").evaluate_all("all => all.map(line => line.getAttribute('d'))")
        assert not [d for d in drawn if "NaN" in d]


@browses
def test_trie_is_walked_and_zoomed_by_keyboard(browser, url):
    fill(url)
    with opened(browser, url, "dashboard") as page:
        nodes = page.locator("#tree [role=treeitem]")
        expect(nodes.nth(2)).to_be_attached()
        rows = httpx.get(f"{url}/debug/kv?top=100").json()["nodes"]
        expect(nodes).to_have_count(len(rows) + 1)
        for tier in ("hbm", "host"):
            assert page.locator(f"#tree .node.{tier}").count() == sum(row["tier"] == tier.upper() for row in rows) > 0
        page.select_option("#top", "30")
        page.focus("#tree [tabindex='0']")
        selected = page.locator("#tree [aria-selected=true]")
        expect(selected).to_have_attribute("aria-label", re.compile("^Root"))
        page.keyboard.press("ArrowRight")
        expect(selected).to_have_attribute("aria-level", "2")
        digest = selected.get_attribute("data-digest")
        row = next(row for row in rows if row["digest"] == digest)
        details = page.locator("#node")
        expect(details).to_contain_text(f"{row['tokens']} from position 0")
        text = httpx.post(f"{url}/detokenize", json={"tokens": row["head"]}).json()["prompt"]
        expect(details.locator("pre")).to_contain_text(text)
        view = lambda: page.locator("#tree > g").get_attribute("transform")  # noqa: E731
        whole = view()
        page.keyboard.press("Enter")
        zoomed = view()
        assert zoomed != whole
        page.keyboard.press("+")
        assert view() != zoomed
        page.keyboard.press("Escape")
        assert view() == whole
        box = page.locator("#tree").bounding_box()
        page.mouse.move(box["x"] + 5, box["y"] + 5)
        page.mouse.down()
        page.mouse.move(box["x"] + 45, box["y"] + 25)
        page.mouse.up()
        shift = [float(after) - float(before) for before, after in zip(*(re.findall(r"-?[\d.]+", v) for v in (whole, view())))]
        assert shift == pytest.approx([40, 20, 0])
        page.keyboard.press("Escape")
        page.keyboard.press("ArrowDown")
        page.keyboard.press("ArrowLeft")
        expect(selected).to_have_attribute("aria-level", re.compile("^[123]$"))
        page.keyboard.press("Home")
        expect(selected).to_have_attribute("aria-label", re.compile("^Root"))
        page.wait_for_timeout(3500)  # the tree is drawn again, and the focus stays
        assert page.evaluate("document.activeElement.getAttribute('role')") == "treeitem"


@browses
def test_a_salted_prefix_is_drawn_and_not_shown(browser, url):
    body = {"prompt": "A private prompt that nobody else shall read. " * 4, "max_tokens": 1, "cache_salt": "s"}
    httpx.post(f"{url}/v1/completions", json=body, timeout=60).raise_for_status()
    salted = next(row for row in httpx.get(f"{url}/debug/kv?top=100").json()["nodes"] if row["head"] is None)
    with opened(browser, url, "dashboard") as page:
        page.locator(f"#tree [data-digest='{salted['digest']}'] .dot").click()
        expect(page.locator("#node")).to_contain_text("this prefix has a cache_salt")


@browses
def test_everything_by_keyboard(browser, url):
    with opened(browser, url, "") as page:
        ready(page)

        def tab_to(selector: str) -> None:
            for _ in range(40):
                page.keyboard.press("Tab")
                outline = "document.activeElement === document.body || getComputedStyle(document.activeElement).outlineStyle"
                assert page.evaluate(outline) != "none"
                if page.evaluate("selector => document.activeElement.matches(selector)", selector):
                    return
            raise AssertionError(f"Tab does not reach {selector}")

        tab_to(".skip")
        tab_to("nav a[href='#complete']")
        page.keyboard.press("Enter")
        expect(page.locator("#complete")).to_be_visible()
        tab_to("#theme")
        page.keyboard.press("ArrowDown")
        page.keyboard.press("ArrowDown")
        assert page.evaluate("getComputedStyle(document.documentElement).colorScheme") == "dark"
        tab_to("#prompt")
        page.keyboard.press("End")
        page.keyboard.press("Control+Enter")
        expect(page.locator(".facts")).to_be_visible()
        tab_to("footer button")
        page.keyboard.press("Enter")
        tab_to(".toks [role=option]")
        page.keyboard.press("ArrowRight")
        expect(page.locator(".tokenview .panel")).to_contain_text("position 1")
        tab_to(".toks [role=option]")
        page.keyboard.press("End")
        expect(page.locator(".tokenview .panel")).to_contain_text("log-probability")
        tab_to("[name=temperature]")
        page.keyboard.type("0.5")
        tab_to("[name=tokens]")
        assert page.locator("[name=temperature]").input_value() == "0.5"


@browses
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_360_pixels_are_enough(browser, url, scheme):
    for view in ("chat", "complete", "dashboard"):
        with opened(browser, url, view, width=360, scheme=scheme) as page:
            ready(page)
            page.evaluate("document.querySelector('#settings').open = true")
            if view == "chat":
                ask(page, "x" * 300)
                open_tokens(page)
            elif view == "complete":
                complete(page, PROMPTS[0], max_tokens=8)
                open_tokens(page)
            else:
                expect(page.locator("#tree [role=treeitem]").nth(1)).to_be_attached()
            assert page.evaluate("document.documentElement.scrollWidth") <= 360
            back = page.evaluate("getComputedStyle(document.body).backgroundColor")
            assert (sum(map(int, re.findall(r"\d+", back)[:3])) < 384) == (scheme == "dark")


# ---- with the fake engine, and what goes wrong


@pytest.fixture(scope="module")
def slow(tokenizer):
    with serving(lambda: FakeEngine(tokenizer, step_seconds=0.05)) as server:
        yield server


@browses
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


@browses
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


@browses
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


@browses
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


@browses
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
