"""The page in a real browser: write, chat, inspect, keyboard, what survives a reload, and how it fails."""

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
def context(browser, server):
    """A browser's profile; whatever its pages log as an error, or ask of another host, fails the test."""
    made, wrong = browser.new_context(viewport={"width": 1100, "height": 900}), []
    made.grant_permissions(["clipboard-read", "clipboard-write"])
    made.on("console", lambda m: wrong.append(m.text) if m.type == "error" else None)
    made.on("weberror", lambda e: wrong.append(str(e.error)))
    made.on("request", lambda r: None if r.url.startswith((server.url, "data:")) else wrong.append(r.url))
    yield made
    made.close()
    refused = (
        "Failed to load resource"  # what the browser itself says of an answer that is an error, as some tests want
    )
    assert [text for text in wrong if refused not in text] == []


@pytest.fixture
def page(context, server):
    return opened(context, server)


def opened(context, server):
    """The page, loaded."""
    page = context.new_page()
    page.set_default_timeout(60_000)
    page.goto(server.url)
    page.get_by_text("memory from block 2").wait_for()
    return page


def choose(page, **settings) -> None:
    for name, value in settings.items():
        page.locator(f"[name={name}]").fill(str(value))


def text_of(page) -> str:
    return page.locator("#text").text_content()


def completed(server, **body) -> str:
    answer = httpx.post(server.url + "/v1/completions", json=body, timeout=60)
    return answer.json()["choices"][0]["text"]


def test_write_streams_the_servers_answer(page, server):
    page.locator("#prompt").fill("def area(")
    choose(page, temperature=0, max_tokens=20)
    page.locator("#prompt").press("Control+Enter")
    page.get_by_text("20 tokens").wait_for()
    text = completed(server, prompt="def area(", max_tokens=20, temperature=0)
    assert text_of(page) == "def area(" + text


def test_every_setting_reaches_the_server(page, server):
    """Values under which the answer differs from that of the page's defaults; a stop text cuts it."""
    page.locator("#prompt").fill("def area(")
    choose(page, temperature=1.5, top_p=0.9, top_k=7, min_p=0.01, repetition_penalty=1.2, seed=5, max_tokens=24)
    sent = []
    page.on("request", lambda r: sent.append(r.post_data_json) if r.url.endswith("/completions") else None)
    page.get_by_role("button", name="Continue", exact=True).click()
    page.get_by_text("24 tokens").wait_for()
    law = {"temperature": 1.5, "top_p": 0.9, "top_k": 7, "min_p": 0.01, "repetition_penalty": 1.2, "seed": 5}
    stream = {"stream": True, "stream_options": {"include_usage": True}}
    assert sent == [law | stream | {"max_tokens": 24, "prompt": "def area("}]
    whole = completed(server, prompt="def area(", max_tokens=24, **law)
    assert text_of(page) == "def area(" + whole
    stop = whole[4:7]
    page.locator("[name=stop]").fill(stop.replace("\n", "\\n"))
    page.get_by_role("button", name="Regenerate").click()
    cut = completed(server, prompt="def area(", max_tokens=24, stop=[stop], **law)
    page.wait_for_function("text => document.querySelector('#text').textContent === text", arg="def area(" + cut)
    assert sent[1]["stop"] == [stop] and len(cut) < len(whole)


def test_go_on_regenerate_and_copy(page):
    page.locator("#prompt").fill("def area(")
    choose(page, temperature=1, max_tokens=12)
    page.get_by_role("button", name="Continue", exact=True).click()
    page.get_by_role("button", name="Continue from here").wait_for()
    first = text_of(page)
    page.get_by_role("button", name="Regenerate").click()
    page.wait_for_function("first => document.querySelector('#text').textContent !== first && "
                           "!document.body.classList.contains('running')", arg=first)  # fmt: skip
    second = text_of(page)
    assert second.startswith("def area(") and second != first
    page.get_by_role("button", name="Copy").click()
    page.get_by_role("button", name="Copied").wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == second
    page.get_by_role("button", name="Continue from here").click()
    page.wait_for_function("n => document.querySelector('#text').textContent.length > n && "
                           "!document.body.classList.contains('running')", arg=len(second))  # fmt: skip
    assert text_of(page).startswith(second)
    # after what is selected, and no further
    page.evaluate("""() => { const range = document.createRange(), given = document.querySelector('#text .given');
      range.setStart(given.firstChild, 0); range.setEnd(given.firstChild, 5);
      getSelection().removeAllRanges(); getSelection().addRange(range); }""")
    page.locator("#further").dispatch_event("click")
    page.wait_for_function("() => document.querySelector('#text .given').textContent === 'def a'")


def test_stop_ends_the_answer_and_frees_the_row(page, server):
    slow = server.loaded.model.blocks[0].register_forward_pre_hook(lambda *_: time.sleep(0.02))
    choose(page, max_tokens=240)
    page.get_by_role("button", name="Continue", exact=True).click()
    page.wait_for_function("() => document.querySelector('#text').textContent.length > 60")
    page.keyboard.press("Escape")
    page.get_by_text("stopped").wait_for()
    slow.remove()
    server.wait_idle()
    assert server.metric("lrt_cancelled_total") == 1
    assert page.get_by_role("button", name="Continue", exact=True).is_enabled()


def chatted(server, messages: list[dict], **body) -> str:
    answer = httpx.post(server.url + "/v1/chat/completions", json={"messages": messages} | body, timeout=60)
    return answer.json()["choices"][0]["message"]["content"].strip()


def said(page) -> list[str]:
    return page.locator("#turns .said").all_text_contents()


def say(page, text: str, turns: int) -> None:
    """Send it, and wait until the conversation has so many turns and nothing runs."""
    page.locator("#say").fill(text)
    page.locator("#say").press("Enter")
    settled(page, turns)


def settled(page, turns: int) -> None:
    page.wait_for_function("n => document.querySelectorAll('#turns li').length === n && "
                           "!document.body.classList.contains('running')", arg=turns)  # fmt: skip


def test_a_conversation_is_the_servers(page, server):
    page.get_by_role("tab", name="Chat").click()
    choose(page, temperature=0, max_tokens=8)
    say(page, "   ", 0)
    say(page, "hello 🙂", 2)
    one = {"role": "user", "content": "hello 🙂"}
    first = chatted(server, [one], temperature=0, max_tokens=8)
    assert said(page) == ["hello 🙂", first] and page.locator("#say").input_value() == ""
    say(page, "and?", 4)
    history = [one, {"role": "assistant", "content": first}, {"role": "user", "content": "and?"}]
    second = chatted(server, history, temperature=0, max_tokens=8)
    assert said(page) == ["hello 🙂", first, "and?", second]
    page.get_by_role("button", name="Copy").last.click()
    page.get_by_role("button", name="Copied").wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == second
    page.locator("#turns").get_by_role("button", name="Continue from here").click()
    settled(page, 2)
    choose(page, temperature=2)
    page.locator("#turns").get_by_role("button", name="Regenerate").click()
    page.wait_for_function("a => document.querySelectorAll('.said')[1].textContent !== a", arg=first)
    settled(page, 2)
    assert said(page)[0] == "hello 🙂"
    page.get_by_role("button", name="New conversation").click()
    settled(page, 0)


def test_a_long_conversation_leaves_out_its_oldest_turns_and_says_so(page, server):
    page.get_by_role("tab", name="Chat").click()
    choose(page, temperature=0, max_tokens=8)
    sent = []
    page.on("request", lambda r: sent.append(r.post_data_json) if "chat" in r.url else None)
    for k in range(1, 7):
        say(page, f"{k} the quick brown fox jumps over the lazy dog", 2 * k)
        if "not sent" in page.locator("#chat-pace").text_content():
            break
    else:
        raise AssertionError("the context was never full")
    contents = [m["content"] for m in sent[-1]["messages"]]
    assert not any(text.startswith("1 the quick") for text in contents) and contents[-1].startswith(f"{k} the")
    count = httpx.post(server.url + "/tokenize", json={"messages": sent[-1]["messages"]}, timeout=60).json()["count"]
    assert count + 8 <= 256 and len(said(page)) == 2 * k


def test_what_was_chosen_survives_a_reload(page, context, server):
    page.locator("#prompt").fill("a prompt of my own")
    choose(page, temperature=0.3, top_k=9, seed=11, stop="END")
    page.get_by_role("tab", name="Chat").click()
    choose(page, max_tokens=6)
    say(page, "hello", 2)
    page.locator("#say").fill("not sent yet")
    before = said(page)
    page.get_by_role("button", name="Change to dark").click()
    for again in (page, opened(context, server)):
        again.reload()
        again.get_by_text("memory from block 2").wait_for()
        settled(again, 2)
        assert again.get_by_role("tab", name="Chat").get_attribute("aria-selected") == "true"
        assert said(again) == before and again.locator("#say").input_value() == "not sent yet"
        values = {
            name: again.locator(f"[name={name}]").input_value() for name in ("temperature", "top_k", "seed", "stop")
        }
        assert values == {"temperature": "0.3", "top_k": "9", "seed": "11", "stop": "END"}
        assert again.evaluate("document.documentElement.dataset.theme") == "dark"
        again.get_by_role("tab", name="Write").click()
        assert again.locator("#prompt").input_value() == "a prompt of my own"
        again.get_by_role("tab", name="Chat").click()


@pytest.mark.parametrize(
    "stored", ["", "null", "[]", '"x"', '{"settings":7,"turns":[{"role":"x"}],"tab":"none","prompt":[1]}']
)
def test_a_damaged_memory_of_the_browser_is_no_error(page, stored):
    page.evaluate("text => localStorage.setItem('lrt-page', text)", stored)
    page.reload()
    page.get_by_text("memory from block 2").wait_for()
    assert page.get_by_role("tab", name="Write").get_attribute("aria-selected") == "true"


WRONG = [
    ({"temperature": ""}, "Temperature"), ({"temperature": "7"}, "Temperature"), ({"top_p": "0"}, "Top p"),
    ({"top_k": "1.5"}, "Top k"), ({"min_p": "2"}, "Min p"), ({"seed": "-1"}, "Seed"),
    ({"max_tokens": "9999"}, "Tokens"),
    ({"stop": "x" * 201}, "Stop at"), ({"stop": "a\n" * 20}, "Stop at"),
]  # fmt: skip


def test_wrong_values_are_said_on_every_path_and_nothing_is_sent(page):
    page.locator("#prompt").fill("def area(")
    choose(page, max_tokens=4)
    page.get_by_role("button", name="Continue", exact=True).click()
    page.get_by_role("button", name="Regenerate").wait_for()
    page.wait_for_function("() => !document.body.classList.contains('running')")
    before, sent = text_of(page), []
    page.on("request", lambda r: sent.append(r.url))
    defaults = {name: page.locator(f"[name={name}]").input_value() for case, _ in WRONG for name in case}
    paths = {
        "button": lambda: page.get_by_role("button", name="Continue", exact=True).click(),
        "key": lambda: page.locator("#prompt").press("Control+Enter"),
        "again": lambda: page.get_by_role("button", name="Regenerate").click(),
        "further": lambda: page.get_by_role("button", name="Continue from here").click(),
    }
    for values, name in WRONG:
        choose(page, **values)
        for path, go in paths.items():
            page.evaluate("document.querySelector('#error').textContent = ''")
            go()
            assert page.locator("#error").text_content().startswith(f"{name}: "), (values, path)
        page.get_by_role("tab", name="Chat").click()
        page.locator("#say").fill("hello")
        page.evaluate("document.querySelector('#error').textContent = ''")
        page.locator("#say").press("Enter")
        assert page.locator("#error").text_content().startswith(f"{name}: "), values
        page.get_by_role("tab", name="Write").click()
        choose(page, **{name: defaults[name] for name in values})
    assert sent == [] and text_of(page) == before


def test_prompts_come_from_the_models_card(server, context):
    page = opened(context, server)
    assert page.locator("#prompt").input_value().startswith("def area")  # of a run on Python sources
    page.locator("#prompts button").nth(1).click()
    assert page.locator("#prompt").input_value().startswith("def mean")
    server.served.prompts = ("It was <b>", "Twice")
    page.evaluate("localStorage.clear()")
    page = opened(context, server)
    assert page.locator("#prompt").input_value() == "It was <b>"
    assert page.locator("#prompts button").all_text_contents() == ["It was <b>", "Twice"]


def test_inspect_colours_explains_and_draws(page):
    page.get_by_role("tab", name="Chat").press("ArrowRight")
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
    by_keys = page.evaluate(drawn)
    page.locator("#theme").click()
    assert page.evaluate(drawn) != by_keys


def test_characters_of_several_tokens_are_shown_whole(page):
    text = "a 🙂 b é\u0301 👩\u200d🚀 \ufeffz"
    page.get_by_role("tab", name="Inspect").click()
    page.locator("#text-in").fill(text)
    page.get_by_role("button", name="Inspect", exact=True).click()
    page.locator("#tokens span").first.wait_for()
    assert page.locator("#tokens").text_content() == text
    assert page.locator("#tokens .rest").count() >= 3
    page.locator("#tokens span", has_text="🙂").first.click()
    assert "part 1 of 4 of 🙂" in page.locator("#detail").text_content()


def test_errors_are_shown_and_keep_the_last_answer(page, server):
    choose(page, max_tokens=8)
    page.locator("#prompt").fill("def")
    page.get_by_role("button", name="Continue", exact=True).click()
    page.get_by_text("8 tokens").wait_for()
    before = text_of(page)
    page.get_by_role("tab", name="Chat").click()
    say(page, "hello", 2)
    conversation = said(page)
    page.get_by_role("tab", name="Write").click()
    page.locator("#prompt").fill("x" * 3000)
    page.get_by_role("button", name="Continue", exact=True).click()
    page.get_by_role("alert").get_by_text("at most 255 fit here").wait_for()
    assert text_of(page) == before
    page.get_by_role("tab", name="Chat").click()
    say(page, "y" * 3000, 2)
    page.get_by_role("alert").get_by_text("at most 255 fit here").wait_for()
    assert said(page) == conversation and page.locator("#say").input_value() == "y" * 3000
    server.server.should_exit = True
    server.thread.join(30)
    for go in (lambda: say(page, "hello", 2), page.get_by_role("button", name="Regenerate").last.click):
        page.evaluate("document.querySelector('#error').textContent = ''")
        go()
        page.get_by_role("alert").get_by_text("The server does not answer").wait_for()
    assert said(page) == conversation and page.locator("#say").input_value() == "hello"
    page.get_by_role("tab", name="Write").click()
    page.get_by_role("button", name="Regenerate").click()
    page.get_by_role("alert").get_by_text("The server does not answer").wait_for()
    assert text_of(page) == before and page.get_by_role("button", name="Continue", exact=True).is_enabled()
