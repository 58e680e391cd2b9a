"""The page in a real browser, as it looks: contrast, and what is in view on a phone."""

from __future__ import annotations

from itertools import pairwise

import pytest
from test_serve_page import browser, choose, context, opened, page, pytestmark, say, server

__all__ = ["browser", "context", "page", "pytestmark", "server"]  # fixtures, and when they run


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_and_phone_width(page, scheme):
    """Nothing is wider than a phone, and text stands out from its ground by 4.5 to 1."""
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": 360, "height": 740})
    for name in ("Chat", "Inspect", "Write"):
        page.get_by_role("tab", name=name).click()
        page.evaluate("document.querySelector('#settings-box').open = true")
        assert page.evaluate("document.documentElement.scrollWidth") <= 360, name
    assert page.evaluate("document.documentElement.dataset.theme") == scheme
    ratio = """() => {
      const lum = (text) => { const c = document.createElement('canvas').getContext('2d'); c.fillStyle = text;
        c.fillRect(0, 0, 1, 1); const [r, g, b] = [...c.getImageData(0, 0, 1, 1).data].map(x => x / 255)
          .map(x => x <= .04045 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4); return .2126*r + .7152*g + .0722*b; };
      const ground = lum(getComputedStyle(document.body).backgroundColor);
      return ['body', '.quiet'].map(s => { const ink = lum(getComputedStyle(document.querySelector(s)).color);
        return (Math.max(ink, ground) + .05) / (Math.min(ink, ground) + .05); }); }"""
    assert min(page.evaluate(ratio)) >= 4.5


def test_on_a_phone_the_answer_is_on_the_first_screen(browser, server):
    context = browser.new_context(viewport={"width": 390, "height": 844})
    page = opened(context, server)
    closed = page.locator("#settings-box").get_attribute("open") is None
    page.get_by_role("button", name="Continue", exact=True).click()
    page.wait_for_function("() => document.querySelector('#text').textContent.length > 20")
    top = page.evaluate("document.querySelector('#text').getBoundingClientRect().top + scrollY")
    assert top < 500 and closed
    context.close()


def test_after_a_long_talk_the_next_turn_and_the_last_answer_are_in_view(page):
    page.set_viewport_size({"width": 390, "height": 700})
    page.get_by_role("tab", name="Chat").click()
    choose(page, temperature="0", max_tokens="8")
    for turns in (2, 4, 6, 8):
        say(page, "def f(x):\n" * 4, turns)
    box = "() => %s.getBoundingClientRect()"
    answer, form = (
        page.evaluate(box % f"document.querySelector('{what}')") for what in ("#turns li:last-child", "#chat-form")
    )
    assert page.evaluate("document.documentElement.scrollHeight") > 2 * 700  # or all of it would be in view anyway
    assert answer["bottom"] <= form["top"] and form["bottom"] <= 701


def test_what_was_wrong_of_a_setting_goes_with_it(page):
    """The field is marked, and the sentence goes when the value is right or another view is chosen."""
    choose(page, temperature=9)
    page.get_by_role("button", name="Continue", exact=True).click()
    page.get_by_text("Temperature: ").wait_for()
    edge, ink = (page.evaluate(f"getComputedStyle(document.querySelector('{one}')).{of}")
                 for one, of in (("[name=temperature]", "borderColor"), ("#error", "color")))  # fmt: skip
    assert edge == ink
    choose(page, temperature=8)
    assert page.locator("#error").is_visible()
    choose(page, temperature=1)
    assert page.locator("#error").is_hidden()
    choose(page, temperature=9)
    page.get_by_role("button", name="Continue", exact=True).click()
    page.get_by_text("Temperature: ").wait_for()
    page.get_by_role("tab", name="Inspect").click()
    assert page.locator("#error").is_hidden()


def test_an_answer_says_that_it_ended_at_its_length(page):
    choose(page, temperature=0, max_tokens=5)
    page.get_by_role("button", name="Continue", exact=True).click()
    page.get_by_text("5 tokens").wait_for()
    assert page.locator("#pace").text_content().endswith("; stopped at the length that was asked for")


def test_values_of_settings_are_ink_and_the_map_has_a_legend(page):
    ink = "getComputedStyle(document.querySelector('%s')).color"
    assert page.evaluate(ink % "[name=top_p]") == page.evaluate(ink % "body")
    page.get_by_role("tab", name="Inspect").click()
    page.locator("#text-in").fill("def area(self)")
    assert page.locator("#inspect-empty").is_visible()
    page.get_by_role("button", name="Inspect", exact=True).click()
    page.locator("#tokens span").first.wait_for()
    most = float(page.locator("#most").text_content().split()[0])
    told = page.locator("#heat").get_attribute("aria-label")
    assert page.locator("#inspect-empty").is_hidden() and f"the strongest is {most:.2f}" in told
    full = float(page.locator("#most-gain").text_content().split("+")[1].split()[0])
    much = "[...document.querySelectorAll('#tokens span')].map(s => parseInt(s.style.getPropertyValue('--much')))"
    shares = page.evaluate(much)
    assert 0.1 <= full <= 2 and max(shares) == 62 and min(shares) < 62
    left, right = page.evaluate("""() => { const pen = document.querySelector('#shade').getContext('2d');
      return [0, 111].map(x => [...pen.getImageData(x, 5, 1, 1).data].join()); }""")
    assert left != right


def test_a_screen_reader_finds_names_roles_and_lists(page):
    """In every view, with an answer in it: controls have names, names have roles, items of lists stand in lists."""
    choose(page, temperature="0", max_tokens="6")
    page.get_by_role("button", name="Continue", exact=True).click()
    page.get_by_role("button", name="Inspect this text").wait_for()
    page.get_by_role("tab", name="Chat").click()
    say(page, "def f(x): 🙂", 2)
    assert page.get_by_role("log", name="Conversation").get_by_role("listitem").count() == 2
    wrong = """() => {
      const labelled = (e) => e.ariaLabel || e.textContent.trim() || e.labels?.length;
      const bad = [...document.querySelectorAll('button, input, textarea, summary, a')].filter(e => !labelled(e));
      const native = 'button, input, textarea, section, form, nav, canvas';
      bad.push(...[...document.querySelectorAll('[aria-label]')].filter(e => !e.role && !e.matches(native)));
      bad.push(...[...document.querySelectorAll('li')].filter(e => e.parentElement.role));
      return bad.map(e => e.outerHTML.slice(0, 80)); }"""
    assert page.evaluate(wrong) == []


ROW = 20
"""Pixels by which the lower edges of what stands in one row differ."""


def test_every_view_is_walked_by_the_keyboard_from_top_to_bottom(page):
    """On a phone's one column Tab visits what is seen from above to below, and arrows change the view."""
    page.set_viewport_size({"width": 390, "height": 844})
    page.get_by_role("tab", name="Write").focus()
    for view in ("write", "chat", "inspect"):
        assert page.evaluate("document.activeElement.id") == f"tab-{view}"
        tops = []
        while not tops or page.evaluate("document.activeElement.tagName") not in ("A", "BODY"):
            page.keyboard.press("Tab")
            tops.append(page.evaluate("document.activeElement.getBoundingClientRect().bottom + scrollY"))
        assert len(tops) > 3, view
        assert all(below > above - ROW for above, below in pairwise(tops)), (view, tops)
        page.locator(f"#tab-{view}").focus()
        page.keyboard.press("ArrowRight")
