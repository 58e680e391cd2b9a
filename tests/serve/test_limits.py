"""What the server refuses before it works: names, keys and bodies; and that it stays at hand meanwhile."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from serving import Server, raw

from lrt.serve.fields import counted
from lrt.serve.intake import _json
from lrt.serve.keys import ApiKeys, HostNames

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
BODY = {"prompt": "def", "max_tokens": 2, "temperature": 0}
N, MORE = 15_000, 180_000


@pytest.fixture(scope="module")
def locked(run):
    """A server with two keys, one of them not ASCII."""
    with Server(run, "sécret", "ключ") as running:
        yield running


# Names and keys.


@pytest.mark.parametrize(
    "name",
    ["localhost", "127.0.0.1", "[::1]", "LOCALHOST", "page.example", "localhost.", "page.example.", "rooted.example"],
)
def test_names_of_this_machine_and_allowed_ones_are_served(name):
    hosts = HostNames("127.0.0.1", ["page.example", "rooted.example."])
    assert hosts.serves(name) and hosts.serves(f"{name}:8000")


@pytest.mark.parametrize(
    "name",
    ["evil.example", "127.0.0.1.evil.example", "localhost..", "evil.example.", ".", "10.0.0.1", "", "a:b:c", "[::1"],
)
def test_other_names_are_not(name):
    assert not HostNames("127.0.0.1").serves(name)


def test_all_addresses_are_served_where_all_are_listened_at_but_no_names():
    hosts = HostNames("0.0.0.0")
    assert hosts.serves("10.0.0.1:80") and hosts.serves("[fe80::1]:80") and not hosts.serves("evil.example")
    assert HostNames("0.0.0.0", ["*"]).serves("evil.example")


@pytest.mark.parametrize("path", ["/health", "/", "/v1/models", "/openapi.json", "/nowhere"])
def test_a_page_of_another_name_that_resolves_here_gets_nothing(server, path):
    found = httpx.get(server.url + path, headers={"host": "evil.example"}, timeout=60)
    assert found.status_code == 403
    assert "--allowed-host" in found.json()["error"]["message"]


def test_everything_but_health_and_the_page_asks_for_the_key(locked):
    for path in ("/health", "/", "/app.js", "/common.js", "/style.css"):
        assert httpx.get(locked.url + path, timeout=60).status_code == 200
        assert httpx.head(locked.url + path, timeout=60).status_code == 200
    for path in ("/openapi.json", "/docs", "/redoc", "/metrics", "/v1/models", "/api/about", "/tokenizer_info", "/x"):
        found = httpx.get(locked.url + path, timeout=60)
        assert (found.status_code, found.json()["error"]["code"]) == (401, "invalid_api_key")
    for key in ("sécret".encode(), "sécret".encode("latin-1"), "ключ".encode()):
        for scheme in (b"Bearer ", b"bearer   "):
            headers = {b"authorization": scheme + key}
            assert httpx.get(locked.url + "/v1/models", headers=headers, timeout=60).status_code == 200
    for wrong in (b"Bearer", b"Bearer s", b"Basic s\xc3\xa9cret", "Bearer ключ ключ".encode(), b"s\xc3\xa9cret"):
        assert httpx.get(locked.url + "/v1/models", headers={b"authorization": wrong}, timeout=60).status_code == 401


def test_the_key_is_asked_for_before_the_body_is_read(locked):
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    assert b" 401 " in raw(locked, head + b"Content-Length: 500000\r\n\r\n")[:20]
    assert b" 401 " in raw(locked, head + b"Expect: 100-continue\r\nContent-Length: 9\r\n\r\n")[:20]


@pytest.mark.parametrize("key", ["", " ", "two words", "line\nbreak", "\x00"])
def test_keys_that_no_header_carries_are_refused(key):
    with pytest.raises(ValueError, match="an API key"):
        ApiKeys(["good", key])


@pytest.mark.slow
@pytest.mark.parametrize(("flags", "variable"), [(["--api-key", ""], None), ([], ""), ([], "  ")])
def test_an_empty_key_does_not_leave_the_server_open(run, flags, variable):
    environment = os.environ | ({} if variable is None else {"LRT_API_KEY": variable})
    command = [sys.executable, "-m", "lrt", "serve", str(run), "--port", "0", *flags]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2 and ended.stdout == ""
    assert "is empty" in ended.stderr and len(ended.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "path", ["/..%2f", "/%2e%2e/", "//evil.example", "/%2fevil.example", "/v1/models/", "/page/../x"]
)
def test_odd_paths_are_not_found_and_lead_nowhere(server, path):
    answer = raw(server, f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
    assert b" 404 " in answer[:20] and b"location:" not in answer.lower()


def test_answers_carry_request_ids_and_safe_headers(server):
    given = httpx.get(server.url + "/health", headers={"x-request-id": "mine-1"}, timeout=60)
    assert given.headers["x-request-id"] == "mine-1"
    made = httpx.get(server.url + "/health", headers={"x-request-id": "not mine!"}, timeout=60)
    assert len(made.headers["x-request-id"]) == 32
    assert "default-src 'none'" in made.headers["content-security-policy"]
    assert "access-control-allow-origin" not in made.headers


def test_cross_origin_pages_are_served_where_they_are_allowed(run):
    with Server(run, "key", allow_origin=("https://page.example",)) as server:
        asks = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,content-type"}
        for origin, allowed in (("https://page.example", True), ("https://evil.example", False)):
            found = httpx.options(server.url + "/v1/completions", headers={"origin": origin, **asks}, timeout=60)
            assert (found.headers.get("access-control-allow-origin") == origin) is allowed
            found = httpx.post(server.url + "/v1/completions", json=BODY, timeout=60,
                               headers={"origin": origin, "authorization": "Bearer key"})  # fmt: skip
            assert (found.headers.get("access-control-allow-origin") == origin) is allowed


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded", "application/jsonp"])
def test_bodies_that_a_page_may_send_unasked_are_refused(server, kind):
    headers = {} if kind is None else {"content-type": kind}
    found = httpx.post(server.url + "/v1/completions", content=json.dumps(BODY), headers=headers, timeout=60)
    assert (found.status_code, "application/json" in found.json()["error"]["message"]) == (415, True)
    fine = {"content-type": "Application/JSON; charset=utf-8"}
    assert (
        httpx.post(server.url + "/v1/completions", content=json.dumps(BODY), headers=fine, timeout=60).status_code
        == 200
    )


# Bodies: the first thing wrong is told at once, whatever follows.


def message(**fields) -> dict:
    return {"messages": [{"role": "user", "content": "a"} | fields]}


LARGE = {
    "mixed prompt": ("completions", {"prompt": ["a", *[1] * N]}, "prompt has 15001 prompts"),
    "nulls": ("completions", {"prompt": [None] * N}, "prompt has 15000 prompts"),
    "ids": ("completions", {"prompt": [1] * N}, "the prompt has 15000 tokens; at most 255 fit here"),
    "texts": ("completions", {"prompt": ["a"] * N}, "at most 64 at a time"),
    "lists": ("completions", {"prompt": [[1]] * N}, "at most 64 at a time"),
    "wrong late": ("completions", {"prompt": ["a"] * 63 + [1]}, "prompt must be a text"),
    "words": ("completions", {"prompt": "the quick brown fox " * 45_000}, "tokens; at most 255 fit here"),
    "fields": ("completions", {f"k{i}": 1 for i in range(15_000)}, "the body has 15000 fields"),
    "stop": ("completions", {"prompt": "a", "stop": [1] * N}, "stop must be"),
    "bias": ("completions", {"prompt": "a", "logit_bias": {str(i): 1 for i in range(15_000)}}, "logit_bias must be"),
    "messages": ("chat/completions", {"messages": [1] * N}, "messages has 15000 entries"),
    "wrong messages": ("chat/completions", {"messages": [{}] * 4000}, "messages.0.role is missing"),
    "content": ("chat/completions", message(content=[1] * N), "messages.0.content has 15000 entries"),
    "parts": ("chat/completions", message(content=[{}] * 250), "messages.0.content"),
    "unknown": ("chat/completions", message(**{f"k{i}": 1 for i in range(15_000)}), "messages.0 has 15002 fields"),
    "tools": ("chat/completions", message() | {"tools": [1] * N}, "tools has 15000 entries"),
    "long talk": ("chat/completions", message(content="the quick brown fox " * 45_000), "tokens; at most 255 fit here"),
}


@pytest.mark.parametrize("name", LARGE)
def test_large_wrong_bodies_are_told_the_first_thing_wrong(server, name):
    path, body, says = LARGE[name]
    found = httpx.post(f"{server.url}/v1/{path}", json=body, timeout=60)
    assert found.status_code == 400
    assert says in found.json()["error"]["message"], found.text
    assert len(found.text) < 800


JSON = {"content-type": "application/json"}
COUNTED = {
    "numbers": ("completions", {"prompt": [1] * MORE}, "180000 values"),
    "lists": ("completions", {"prompt": [[1]] * MORE}, "180002 lists and objects"),
    "texts": ("completions", {"prompt": ['"'] * MORE}, "more than"),
    "names": ("completions", {f"k{i}": 1 for i in range(60_000)}, "60000 values"),
    "messages": ("chat/completions", {"messages": [{}] * MORE}, "180002 lists and objects"),
}


@pytest.mark.parametrize("name", COUNTED)
def test_bodies_of_too_many_values_are_not_parsed(server, monkeypatch, name):
    path, body, says = COUNTED[name]
    monkeypatch.setattr("lrt.serve.intake.from_json", None)
    compact = json.dumps(body, separators=(",", ":"))  # older httpx writes spaces, and the body would be too long
    found = httpx.post(f"{server.url}/v1/{path}", content=compact, headers=JSON, timeout=60)
    assert found.status_code == 400 and f"the body has {says}" in found.json()["error"]["message"]


@given(st.recursive(
    st.none() | st.integers(0, 9) | st.text('a"\\\\,[{]}é\n', max_size=6),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text('a"\\\\,[{', max_size=3), inner, max_size=4),
    max_leaves=30,
))  # fmt: skip
def test_values_are_counted_as_they_are_parsed(data):
    """Beside a count of the parsed body; texts and names count for nothing, whatever they hold."""
    lists, commas, waiting = 0, 0, [data]
    while waiting:
        one = waiting.pop()
        if isinstance(one, (list, dict)):
            lists, commas = lists + 1, commas + max(0, len(one) - 1)
            waiting += one if isinstance(one, list) else one.values()
    for spaces in ((",", ":"), (" , ", " : ")):
        for plain in (True, False):
            body = json.dumps(data, separators=spaces, ensure_ascii=plain).encode()
            assert counted(body) == (lists, commas)


@pytest.mark.parametrize(
    "content",
    [b"[" * 900_000, b'{"prompt":' + b"[" * 200_000, b'{"prompt": 1' + b"0" * 800_000 + b"}", b'{"prompt": NaN}',
     b"\xff", b'{"prompt": "\\ud800"}', b"", b"null", b'"text"', b"[" + b"[]," * 250_000 + b"[]]"],
)  # fmt: skip
def test_any_bytes_are_400(server, content):
    found = httpx.post(server.url + "/v1/completions", content=content, headers={"content-type": "application/json"},
                       timeout=60)  # fmt: skip
    assert found.status_code == 400 and len(found.text) < 800


def test_answers_are_counted_before_anything_is_tokenised(server, monkeypatch):
    encoded = []
    monkeypatch.setattr(server.served.words, "opened", lambda text: encoded.append(text) or [1])
    body = BODY | {"prompt": ["a"] * 60, "n": 2}
    assert httpx.post(server.url + "/v1/completions", json=body, timeout=60).status_code == 400
    assert encoded == []


@pytest.mark.slow
def test_health_is_at_hand_under_every_large_body(server):
    """The slowest of many calls while eight clients send one kind of large body after the other, without a pause."""
    slowest = {}
    with httpx.Client(base_url=server.url, timeout=60) as client:
        for name, (path, body, _) in LARGE.items():
            data, stop = json.dumps(body).encode(), threading.Event()

            def send(path=path, data=data, stop=stop) -> None:
                with httpx.Client(timeout=60) as own:
                    while not stop.is_set():
                        own.post(f"{server.url}/v1/{path}", content=data, headers={"content-type": "application/json"})

            senders = [threading.Thread(target=send) for _ in range(8)]
            for sender in senders:
                sender.start()
            times = []
            for _ in range(40):
                begin = time.perf_counter()
                assert client.get("/health").status_code == 200
                times.append(time.perf_counter() - begin)
            stop.set()
            for sender in senders:
                sender.join()
            slowest[name] = sorted(times)[-2]
    print({name: round(1e3 * seconds) for name, seconds in slowest.items()}, "ms")
    assert max(slowest.values()) < 0.5  # clients and server share this process's interpreter


def test_parsing_keeps_nothing_of_a_body():
    """The parser's own cache of texts would: 16,384 of them, all over the memory that a large body took."""

    def body(round_: int) -> bytes:
        return b"{" + b",".join(b'"name %d %d":"text %d %d"' % (round_, i, round_, i) for i in range(10_000)) + b"}"

    _json(body(0), 32_768)
    before = sys.getallocatedblocks()
    for round_ in (1, 2):
        assert len(_json(body(round_), 32_768)) == 10_000
    assert sys.getallocatedblocks() - before < 1000


def test_an_oversized_body_is_answered_though_it_is_still_being_sent(server):
    for headers in ({"content-type": "application/json"}, {"content-type": "application/json", "expect": "x"}):
        found = httpx.post(server.url + "/v1/completions", content=b" " * 1_500_000, headers=headers, timeout=60)
        assert found.status_code == 413
