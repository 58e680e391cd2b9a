"""The page in a real browser: write, stop, inspect, keyboard, and what it says when the server is gone."""

from __future__ import annotations

import re
import shutil
import time

import httpx
import pytest
from serving import Server, make_run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine: install Debian's package"),
]


@pytest.fixture(scope="module")
def browser():
    sync_playwright = pytest.importorskip("playwright.sync_api").sync_playwright
    with sync_playwright() as play:
        made = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield made
        made.close()


@pytest.fixture
def server(tmp_path):
    with Server(make_run(tmp_path / "tiny")) as running:
        yield running


@pytest.fixture
def page(browser, server):
    """The page, loaded; whatever it logs as an error, or asks of another host, fails the test."""
    context = browser.new_context(viewport={"width": 1100, "height": 900})
    page, wrong = context.new_page(), []
    page.set_default_timeout(60_000)
    page.on("console", lambda m: wrong.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda e: wrong.append(str(e)))
    page.on("request", lambda r: None if r.url.startswith((server.url, "data:")) else wrong.append(r.url))
    page.goto(server.url)
    page.get_by_text("layerwise memory from block 2").wait_for()
    page.wrong = wrong
    yield page
    context.close()


def test_write_streams_the_servers_answer(page, server):
    page.locator("#prompt").fill("def area(")
    page.locator("[name=temperature]").fill("0")
    page.locator("[name=max_tokens]").fill("20")
    page.locator("#prompt").press("Control+Enter")
    page.get_by_text("20 tokens").wait_for()
    body = {"prompt": "def area(", "max_tokens": 20, "temperature": 0}
    text = httpx.post(server.url + "/v1/completions", json=body, timeout=60).json()["choices"][0]["text"]
    assert page.locator("#text").text_content() == "def area(" + text
    assert page.wrong == []


def test_stop_ends_the_answer_and_frees_the_row(page, server):
    slow = server.loaded.model.blocks[0].register_forward_pre_hook(lambda *_: time.sleep(0.02))
    page.locator("[name=max_tokens]").fill("240")
    page.get_by_role("button", name="Continue").click()
    while len(page.locator("#text").text_content()) < 60:
        page.wait_for_timeout(50)
    page.keyboard.press("Escape")
    page.get_by_text("stopped").wait_for()
    slow.remove()
    server.wait_idle()
    assert server.metric("lrt_cancelled_total") == 1
    assert page.wrong == []


def test_inspect_colours_explains_and_draws(page):
    page.get_by_role("tab", name="Write").press("ArrowRight")
    assert page.get_by_role("tab", name="Inspect").get_attribute("aria-selected") == "true"
    page.locator("#text-in").fill("def area(self): return width")
    page.get_by_role("button", name="Inspect", exact=True).click()
    page.locator("#tokens span").first.wait_for()
    assert page.locator("#tokens").text_content() == "def area(self): return width"
    assert "never trained without memory" in page.locator("#note").text_content()
    figures = page.locator("dd").all_text_contents()
    assert re.fullmatch(r"\d+\.\d{3}", figures[0]) and re.fullmatch(r"\d+\.\d{3}", figures[1])
    tints = page.eval_on_selector_all("#tokens span", "all => all.map(x => getComputedStyle(x).backgroundColor)")
    assert len(set(tints)) > 3
    page.locator("#tokens span").first.click()
    for _ in range(2):
        page.keyboard.press("ArrowRight")
    assert page.locator("#tokens [aria-selected=true]").get_attribute("id") == "token-2"
    assert "Token 3 of" in page.locator("#detail").text_content()
    assert page.locator("#detail caption").count() == 2
    drawn = "() => [...document.querySelector('#heat').getContext('2d').getImageData(5, 5, 60, 1).data].join()"
    before = page.evaluate(drawn)
    page.locator("[name=kind][value=key]").check()
    assert page.evaluate(drawn) != before
    assert page.wrong == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_and_phone_width(page, scheme):
    """Nothing is wider than a phone, and text stands out from its ground by 4.5 to 1."""
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": 360, "height": 740})
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    ratio = """() => {
      const lum = (text) => { const c = document.createElement('canvas').getContext('2d'); c.fillStyle = text;
        c.fillRect(0, 0, 1, 1); const [r, g, b] = [...c.getImageData(0, 0, 1, 1).data].map(x => x / 255)
          .map(x => x <= .04045 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4); return .2126*r + .7152*g + .0722*b; };
      const ground = lum(getComputedStyle(document.body).backgroundColor);
      return ['body', '.quiet'].map(s => { const ink = lum(getComputedStyle(document.querySelector(s)).color);
        return (Math.max(ink, ground) + .05) / (Math.min(ink, ground) + .05); }); }"""
    assert min(page.evaluate(ratio)) >= 4.5


def test_errors_are_shown_also_when_the_server_stops(page, server):
    page.locator("[name=max_tokens]").fill("100")
    page.locator("#prompt").fill("x" * 3000)
    page.get_by_role("button", name="Continue").click()
    page.get_by_role("alert").get_by_text("at most 255 fit here").wait_for()
    server.server.should_exit = True
    server.thread.join(30)
    page.locator("#prompt").fill("def")
    page.get_by_role("button", name="Continue").click()
    page.get_by_role("alert").get_by_text("The server does not answer").wait_for()
    assert page.get_by_role("button", name="Continue").is_enabled()
