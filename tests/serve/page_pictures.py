"""Pictures of the page for docs/serving.md: PYTHONPATH=.:tests python tests/serve/page_pictures.py RUN docs/img

RUN is a run folder: the committed ones show pretrained/books. The page draws with a seed, so the same run
gives the same texts.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Page, sync_playwright
from serving import Server
from test_serve_page import CHROMIUM

TEXT = (
    "It was a bright morning when the old lady walked down to the village, and said that nothing could be done. "
    "The village laughed, but the old lady said it again, and went home through the rain to dinner."
)
TURNS = "Good morning, Mrs. Smith 🙂", "And where is your brother?"
PICTURES = {
    "serve-write": ("light", (1180, 900)),
    "serve-chat": ("light", (1180, 900)),
    "serve-inspect-light": ("light", (1180, 1000)),
    "serve-inspect-dark": ("dark", (1180, 1000)),
    "serve-write-phone": ("dark", (390, 844)),
    "serve-inspect-phone": ("light", (390, 844)),
}
"""Each picture, its scheme and its window."""


def main(run: str, folder: str) -> None:
    """Write every picture."""
    with Server(Path(run)) as server, sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for name, (scheme, (width, height)) in PICTURES.items():
            window: Any = {"width": width, "height": height}
            page = _opened(browser, server.url, viewport=window, color_scheme=scheme, device_scale_factor=1.5)
            show = {"write": _write, "chat": _chat, "inspect": _inspect}[name.split("-")[1]]
            show(page)
            page.screenshot(path=f"{folder}/{name}.png", full_page=show is _inspect)
            page.context.close()
        browser.close()


def _opened(browser: Browser, url: str, **window: Any) -> Page:
    page = browser.new_context(**window).new_page()
    page.set_default_timeout(120_000)
    page.goto(url)
    page.get_by_text("context").first.wait_for()
    page.evaluate("() => { document.querySelector('[name=seed]').value = 4; }")  # the settings are folded on a phone
    return page


def _write(page: Page) -> None:
    page.get_by_role("button", name="Continue", exact=True).click()
    page.get_by_text("a second").wait_for()


def _chat(page: Page) -> None:
    page.get_by_role("tab", name="Chat").click()
    for turn in TURNS:
        page.locator("#say").fill(turn)
        page.locator("#say").press("Enter")
        page.wait_for_function("() => document.querySelector('#say').value === ''")
        page.wait_for_function("() => !document.body.classList.contains('running')")


def _inspect(page: Page) -> None:
    page.get_by_role("tab", name="Inspect").click()
    page.locator("#text-in").fill(TEXT)
    page.get_by_role("button", name="Inspect", exact=True).click()
    page.locator("#tokens span").first.wait_for()
    page.locator("#tokens span").nth(30).click()
    page.mouse.move(5, 5)


if __name__ == "__main__":
    main(*sys.argv[1:])
