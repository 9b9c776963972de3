"""What tests of the page share: a view of it that must not complain, and its forms."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator

import httpx
from playwright.sync_api import Browser, Locator, Page, expect

FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]


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


def open_tokens(page: Page) -> tuple[Locator, Locator]:
    """The token lists of the last answer: prompt and answer."""
    page.get_by_role("button", name="Tokens", exact=True).last.click()
    lists = page.locator("article").last.get_by_role("listbox")
    expect(lists).to_have_count(2)
    return lists.nth(0).locator(".tok"), lists.nth(1).locator(".tok")


def metric(url: str, name: str) -> float:
    line = next(line for line in httpx.get(f"{url}/metrics").text.splitlines() if line.startswith(name))
    return float(line.split()[-1])
