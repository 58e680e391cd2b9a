"""A report in a real browser, as wide as a desk and as narrow as a phone: nothing is lost, and letters stay legible."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from test_report import arms_of

from lrt.cli.main import main
from lrt.experiments.pages import LEGIBLE

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine: install Debian's package"),
]
REACHED = """() => [...document.querySelectorAll('.wide')].map(frame => {
  frame.scrollLeft = 1e6; const inner = frame.firstElementChild.getBoundingClientRect();
  return inner.right - frame.getBoundingClientRect().right; })"""
"""By how much the right end of what a frame holds lies outside it when it is scrolled as far as it goes."""


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    records = arms_of(["plain", "shift", "an arm with quite a long name, and more of it", "lrt"])
    (folder / "r.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    assert main(["report", str(folder / "r.jsonl"), "--out", str(folder)]) == 0
    return folder / "report.html"


@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_is_lost(width: int, report: Path):
    sync_playwright = pytest.importorskip("playwright.sync_api").sync_playwright
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": 900})
        page.goto(report.as_uri())
        assert page.evaluate("() => document.documentElement.scrollWidth") <= width
        ends = page.evaluate(REACHED)
        assert len(ends) >= 5 and max(ends) <= 1
        shown = page.evaluate("() => [...document.images].map(i => i.getBoundingClientRect().width / i.naturalWidth)")
        assert min(shown) >= LEGIBLE / 130 - 0.01  # of the 130 pixels that an inch was drawn with
        headings = page.locator("h2").all_text_contents()
        assert headings[:3] == ["verdict", "what the words mean", "next"]
        browser.close()
