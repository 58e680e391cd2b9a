"""Requests at the edges of what is allowed: sampling laws at their limits, and HTTP that few clients write."""

from __future__ import annotations

import itertools
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
from serving import Server, post, raw

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
LIMITS = {
    "temperature": (0, 5e-324, 1e-30, 100), "top_p": (5e-324, 1e-30, 1), "top_k": (-1, 0, 1, 2**31),
    "min_p": (0, 5e-324, 1), "repetition_penalty": (0.01, 100), "presence_penalty": (-2, 2),
    "frequency_penalty": (-2, 2), "min_tokens": (0, 6, 2**31), "n": (1, 3), "seed": (-(2**63), 0, 2**64 - 1),
    "max_tokens": (1, 6), "ignore_eos": (False, True), "logprobs": (0, 20),
    "logit_bias": (
        {}, {str(i): -100 for i in range(290)}, {str(i): 100 for i in range(0, 290, 2)}, {"0": 100, "1": -100},
    ),
}  # fmt: skip
HONEST = {"prompt": "the quick", "max_tokens": 10, "seed": 11, "temperature": 0.8, "logprobs": 1}


def choice(found) -> dict:
    assert found.status_code == 200, found.text
    return found.json()["choices"][0]


def extremes(count: int) -> list[dict]:
    """Each limit by itself, then limits drawn together."""
    chance = random.Random(5)
    alone = [{name: value} for name, values in LIMITS.items() for value in values]
    drawn = [{name: chance.choice(values) for name, values in LIMITS.items()} for _ in range(count)]
    return [*alone, *drawn]


def test_laws_at_their_limits_answer_and_touch_nobody(server, caplog):
    """Every one is 200 with finite log-probabilities; answers beside it equal those given alone to the last bit."""
    alone = choice(post(server, "/v1/completions", HONEST))
    laws = extremes(40)
    with ThreadPoolExecutor(12) as pool:
        made = [
            (pool.submit(post, server, "/v1/completions", {"prompt": "def", "max_tokens": 4} | law),
             pool.submit(post, server, "/v1/completions", HONEST) if i % 3 == 0 else None)
            for i, law in enumerate(laws)
        ]  # fmt: skip
        for law, (hostile, honest) in zip(laws, made, strict=True):
            found = hostile.result()
            assert found.status_code == 200, (law, found.text)  # NaN cannot be written as JSON: it would be 500
            for one in found.json()["choices"]:
                assert one["finish_reason"] in ("stop", "length"), law
            if honest is not None:
                assert choice(honest.result()) == alone, law
    assert caplog.text == ""


OUTSIDE = {
    "temperature": (-5e-324, 100.1, 1e308), "top_p": (0, -1, 1.1), "top_k": (-2, 2**31 + 1, 1.5), "min_p": (-0.1, 1.1),
    "repetition_penalty": (0, 5e-324, 0.009, 101), "presence_penalty": (-2.1, 3), "frequency_penalty": (-3, 2.1),
    "min_tokens": (-1, 2**31 + 1), "n": (0, 65, 2**31), "seed": (-(2**63) - 1, 2**64, 1.5, "1"),
    "max_tokens": (-1, 2**63), "logprobs": (-1, 21), "best_of": (0, 2),
    "logit_bias": ({"-1": 1}, {"999999999": 1}, {"1": 101}, {"1": True}, {"x": 1}, {"1e1": 1}, [1]),
}  # fmt: skip


@pytest.mark.parametrize("name", OUTSIDE)
def test_laws_outside_their_range_are_refused_by_name(server, name):
    for value in OUTSIDE[name]:
        found = post(server, "/v1/completions", {"prompt": "a", "max_tokens": 1} | {name: value})
        assert found.status_code == 400, (value, found.text)
        assert name in (found.json()["error"]["param"], "n")


# HTTP.

BODY = b'{"prompt":"a","max_tokens":1}'


def asked(*headers: bytes, body: bytes = BODY, host: bytes = b"localhost") -> bytes:
    lines = [b"POST /v1/completions HTTP/1.1", b"Host: " + host, b"Content-Type: application/json", *headers]
    return b"\r\n".join([*lines, b"", body])


def got(line: bytes, *headers: bytes) -> bytes:
    return b"\r\n".join([line, *headers, b"Connection: close", b"", b""])


LENGTH, CHUNKED, HERE = b"Content-Length: %d" % len(BODY), b"Transfer-Encoding: chunked", b"Host: localhost"
GET = b"GET /health HTTP/1.1"
ODD = {
    "two lengths": (asked(LENGTH, b"Content-Length: 3"), 400),
    "two equal lengths": (asked(LENGTH, LENGTH), 200),
    "length and chunks": (asked(LENGTH, CHUNKED, body=b"0\r\n\r\n"), 400),
    "chunks and length": (asked(CHUNKED, LENGTH, body=b"1d\r\n" + BODY + b"\r\n0\r\n\r\n"), 400),
    "chunks twice": (asked(CHUNKED, CHUNKED), 400),
    "chunks of gzip": (asked(b"Transfer-Encoding: gzip, chunked"), 400),
    "a chunk's extension": (asked(CHUNKED, body=b"1d;a=b\r\n" + BODY + b"\r\n0\r\n\r\n"), 200),
    "length below zero": (asked(b"Content-Length: -1"), 400),
    "length with a sign": (asked(b"Content-Length: +29"), 400),
    "length without end": (asked(b"Content-Length: " + b"9" * 24), 400),
    "no body": (asked(body=b""), 400),
    "absolute": (got(b"GET http://localhost/health HTTP/1.1", HERE), 200),
    "absolute, the page": (got(b"GET http://localhost HTTP/1.1", HERE), 200),
    "absolute with a query": (got(b"GET HTTPS://LOCALHOST:8000/health?a=b HTTP/1.1", HERE), 200),
    "absolute, whose Host is ignored": (got(b"GET http://[::1]:1/health HTTP/1.1", b"Host: evil.example"), 200),
    "absolute in HTTP/1.0": (got(b"GET http://localhost/health HTTP/1.0"), 200),
    "absolute elsewhere": (got(b"GET http://evil.example/health HTTP/1.1", HERE), 403),
    "absolute with a user": (got(b"GET http://evil.example@localhost/health HTTP/1.1", HERE), 403),
    "absolute without a name": (got(b"GET http:///health HTTP/1.1", HERE), 403),
    "absolute without a Host": (got(b"GET http://localhost/health HTTP/1.1"), 400),
    "absolute in an absolute one": (got(b"GET http://localhost/http://localhost/health HTTP/1.1", HERE), 404),
    "absolute of another scheme": (got(b"GET ftp://localhost/health HTTP/1.1", HERE), 404),
    "authority": (got(b"CONNECT evil.example:80 HTTP/1.1", HERE), 404),
    "star": (got(b"OPTIONS * HTTP/1.1", HERE), 404),
    "HTTP/1.0": (got(b"GET /health HTTP/1.0", HERE), 200),
    "HTTP/1.0 without a host": (got(b"GET /health HTTP/1.0"), 403),
    "no host": (got(GET), 400),
    "HTTP/0.9": (b"GET /health\r\n\r\n", 400),
    "two hosts": (got(GET, HERE, b"Host: evil.example"), 400),
    "two hosts, the other way": (got(GET, b"Host: evil.example", HERE), 400),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 403),
    "h2c": (got(GET, HERE, b"Upgrade: h2c", b"HTTP2-Settings: AA"), 200),
    "websocket": (got(b"GET / HTTP/1.1", HERE, b"Upgrade: websocket", b"Sec-WebSocket-Version: 13"), 200),
    "space in a name": (got(GET, b"Host : localhost"), 400),
    "zero byte": (got(GET, HERE, b"X: a\0b"), 400),
    "header of no UTF-8": (got(GET, HERE, b"X: \xff\xfe"), 200),
    "path of no UTF-8": (got(b"GET /\xff\xfe HTTP/1.1", HERE), 400),
    **{f"path {path}": (got(b"GET " + path.encode() + b" HTTP/1.1", HERE), 404) for path in (
        "/%ff%fe", "/%00", "/v1/models/%00", "/v1/models/../x", "/v1/models/..%2fx", "/v1/models//tiny", "//health",
        "/v1/models/a%0d%0aX:y", "/%", "/%u0041", "/v1/models/%ed%a0%80", "/health;a=b", "/health/", "/health%20",
    )},
    **{f"host {host}": (got(GET, b"Host: " + host.encode("latin-1")), 403) for host in (
        "localhost..", ".", "evil.example.", "[::1].", "[::1]x", ":", "localhost:\xb2",
        "127.1", "2130706433", "0x7f.1", "[::1", "[::ffff:127.0.0.1]", "0.0.0.0", "127.0.0.2", "",
        "localhost:x", "localhost.evil.example", "localhost@evil.example", "evil.example@localhost", "localhost/",
        "localhost,evil.example", "localhost evil.example", "::1", "127.0.0.1:80:80", "localhost#x", "localhost\xe9",
    )},
    **{f"host {host}": (got(GET, b"Host: " + host.encode()), 200) for host in (
        "[::1]:8000", "localhost:99999", "LocalHost", "127.0.0.1:1",
        "localhost.", "localhost.:80", "127.0.0.1.", "localhost:", "[::1]:",
    )},
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_odd_http_has_one_plain_answer(server, name):
    data, status = ODD[name]
    answer = raw(server, data)
    assert answer.split(b" ", 2)[1] == b"%d" % status, answer
    assert b"location:" not in answer.lower() and b"\r\nx:" not in answer.lower()


METHODS = ("OPTIONS", "HEAD", "TRACE", "PUT", "DELETE", "PATCH", "CONNECT", "get", "PROPFIND")
READ = ("/health", "/", "/v1/models", "/v1/models/tiny", "/metrics", "/openapi.json", "/api/about", "/tokenizer_info")
SENT = ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize", "/api/inspect")


def test_other_methods_are_405_and_echo_nothing(server):
    """HEAD is GET without a body; no method reads back what was sent (TRACE), or opens a tunnel (CONNECT)."""
    for method, path in itertools.product(METHODS, (*READ, *SENT)):
        answer = raw(server, got(f"{method} {path} HTTP/1.1".encode(), HERE, b"X-Secret: 42"))
        wanted = b"200" if method == "HEAD" and path in READ else b"405"
        assert answer.split(b" ", 2)[1] == wanted, (method, path, answer)
        assert b"X-Secret" not in answer and (method != "HEAD" or answer.endswith(b"\r\n\r\n"))


def test_a_whole_address_in_place_of_a_path_asks_for_the_key_all_the_same(run):
    with Server(run, "key") as server:
        for path in (b"/v1/models", b"/openapi.json", b"/metrics", b"/health/../v1/models"):
            answer = raw(server, got(b"GET http://localhost" + path + b" HTTP/1.1", HERE))
            assert answer.split(b" ", 2)[1] == b"401", path
        answer = raw(server, got(b"GET http://localhost/v1/models HTTP/1.1", HERE, b"Authorization: Bearer key"))
        assert answer.split(b" ", 2)[1] == b"200"


@pytest.mark.parametrize(
    "header",
    [b"X-Api-Key: key", b"Authorization: Basic key", b"Authorization: Bearer", b"Authorization: key", b"Cookie: key",
     b"Authorization: Token key", b"Proxy-Authorization: Bearer key", b"Authorization: Bearer key, Bearer key",
     b"Authorization: Bearer key\r\nAuthorization: Bearer wrong", b"Authorization: Bearer KEY"],
)  # fmt: skip
def test_a_key_in_another_place_opens_nothing(run, header):
    with Server(run, "key") as server:
        answer = raw(server, got(b"GET /v1/models?api_key=key HTTP/1.1", HERE, header))
        assert answer.split(b" ", 2)[1] == b"401"
        assert raw(server, got(b"GET /v1/models HTTP/1.1", HERE, b"Authorization: Bearer key"))[9:12] == b"200"
