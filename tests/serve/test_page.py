"""The page in a real browser against the real engine, with pools so small that all tiers are used."""

from __future__ import annotations

import re

import httpx
import pytest
from browsing import ask, complete, metric, open_tokens, opened, ready, set_fields
from playwright.sync_api import expect
from serve_fakes import ServerProcess

PROMPTS = [f"# file {i}\n" + "".join(f"def function_{i}_{k}(argument):\n    return argument + {i * k}\n" for k in range(16))
           for i in range(5)]  # three pools of HBM
TIERS = ("hbm", "host", "disk")


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


def fill(url: str) -> None:
    """Uses every prompt twice: then all tiers hold something."""
    with httpx.Client(base_url=url, timeout=60) as http:
        for prompt in PROMPTS * 2:
            http.post("/v1/completions", json={"prompt": prompt, "max_tokens": 1}).raise_for_status()


def test_chat_streams_and_the_second_turn_is_cached(browser, url):
    with opened(browser, url) as page:
        ready(page)
        set_fields(page, temperature=0, max_tokens=24, system="Be brief.")
        events, usage = ask(page, "alpha -> red blue\nbeta -> green stone\nWhat is beta?")
        texts = [e["choices"][0]["delta"].get("content") or "" for e in events if e["choices"]]
        first = usage["prompt_tokens_details"]["cached_tokens"]
        assert len([text for text in texts if text]) > 5 and first < 16, "less than a page"
        answer = page.locator("article.answer").last
        expect(answer.locator(".text")).to_have_text("".join(texts), use_inner_text=False)
        expect(answer.locator(".facts")).to_contain_text(f"prompt {usage['prompt_tokens']} tokens, {first} cached")
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


def test_a_salted_prefix_is_drawn_and_not_shown(browser, url):
    body = {"prompt": "A private prompt that nobody else shall read. " * 4, "max_tokens": 1, "cache_salt": "s"}
    httpx.post(f"{url}/v1/completions", json=body, timeout=60).raise_for_status()
    salted = next(row for row in httpx.get(f"{url}/debug/kv?top=100").json()["nodes"] if row["head"] is None)
    with opened(browser, url, "dashboard") as page:
        page.locator(f"#tree [data-digest='{salted['digest']}'] .dot").click()
        expect(page.locator("#node")).to_contain_text("this prefix has a cache_salt")


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
