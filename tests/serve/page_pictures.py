"""Pictures of the page for docs/serving.md: python tests/serve/page_pictures.py RUN docs/img"""

from __future__ import annotations

import sys
from pathlib import Path

from playwright.sync_api import sync_playwright
from serving import Server
from test_serve_page import CHROMIUM

TEXT = """class Stack:
    def __init__(self, items):
        self.items = list(items)

    def push(self, item):
        self.items.append(item)
        return self.items
"""
SIZES = {"desktop": (1180, 1000), "phone": (390, 844)}


def main(run: str, folder: str) -> None:
    with Server(Path(run)) as server, sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for name, scheme, size in (
            ("light", "light", "desktop"),
            ("dark", "dark", "desktop"),
            ("phone", "light", "phone"),
        ):
            width, height = SIZES[size]
            context = browser.new_context(
                viewport={"width": width, "height": height}, color_scheme=scheme, device_scale_factor=1.5
            )  # fmt: skip
            page = context.new_page()
            page.set_default_timeout(120_000)
            page.goto(server.url)
            page.get_by_text("context").first.wait_for()
            page.locator("[name=seed]").fill("4")
            page.get_by_role("button", name="Continue").click()
            page.get_by_text("a second").wait_for()
            if name == "light":
                page.screenshot(path=f"{folder}/serve-write.png", clip={"x": 0, "y": 0, "width": width, "height": 640})
            page.get_by_role("tab", name="Inspect").click()
            page.locator("#text-in").fill(TEXT)
            page.get_by_role("button", name="Inspect", exact=True).click()
            page.locator("#tokens span").first.wait_for()
            page.locator("#tokens span").nth(30).click()
            page.mouse.move(5, 5)
            page.screenshot(path=f"{folder}/serve-inspect-{name}.png", full_page=True)
            context.close()
        browser.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
