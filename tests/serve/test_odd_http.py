"""Requests that are HTTP by the letter, or hardly: each has one plain answer, and nothing is logged."""

from __future__ import annotations

import re
import socket

import pytest
from serving import Server, post, raw

ASK = b'{"prompt":"def","max_tokens":2,"seed":1}'
START = b"POST /v1/completions HTTP/1.1\r\n"
HEAD = START + b"Host: localhost\r\nContent-Type: application/json\r\n"
LENGTH = b"Content-Length: %d\r\n" % len(ASK)
LAST = b"Connection: close\r\n\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n" + LAST
CHUNK = b"%x\r\n%s\r\n" % (len(ASK), ASK)
GET = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"
OLD = HEAD.replace(b"1.1", b"1.0")
STREAM = ASK[:-1] + b',"stream":true}'

BODIES = {
    "trailers": (HEAD + CHUNKED + CHUNK + b"0\r\nX-T: a\r\nHost: evil.example\r\n\r\n", 200),
    "trailers without end": (HEAD + CHUNKED + CHUNK + b"0\r\n" + b"X-T: aaaaaaaaaaaaaaaa\r\n" * 3000, 400),
    "a long extension of a chunk": (HEAD + CHUNKED + CHUNK.replace(b"\r\n", b";a=b\r\n", 1) + b"0\r\n\r\n", 200),
    "one length twice": (HEAD + LENGTH + LENGTH + LAST + ASK, 200),
    "two lengths": (HEAD + LENGTH + b"Content-Length: 3\r\n" + LAST + ASK, 400),
    "lengths in a list": (HEAD + LENGTH.replace(b"\r\n", b", 3\r\n") + LAST + ASK, 400),
    "a length with a sign": (HEAD + LENGTH.replace(b": ", b": +") + LAST + ASK, 400),
    "a length below zero": (HEAD + b"Content-Length: -1\r\n" + LAST + ASK, 400),
    "a length with an underscore": (HEAD + b"Content-Length: 4_0\r\n" + LAST + ASK, 400),
    "a length in other digits": (HEAD + "Content-Length: ٤٠\r\n".encode() + LAST + ASK, 400),
    "a length of 5,000 digits": (HEAD + b"Content-Length: " + b"9" * 5000 + b"\r\n" + LAST, 400),
    "chunked twice": (HEAD + b"Transfer-Encoding: chunked\r\n" + CHUNKED + CHUNK + b"0\r\n\r\n", 400),
    "gzip, chunked": (HEAD + CHUNKED.replace(b"chunked", b"gzip, chunked") + CHUNK + b"0\r\n\r\n", 400),
    "identity": (HEAD + CHUNKED.replace(b"chunked", b"identity") + CHUNK + b"0\r\n\r\n", 400),
    "a length and chunks": (HEAD + LENGTH + CHUNKED + CHUNK + b"0\r\n\r\n", 400),
    "neither": (HEAD + LAST + ASK, 400),
    "a byte order mark": (HEAD + b"Content-Length: %d\r\n" % (len(ASK) + 3) + LAST + b"\xef\xbb\xbf" + ASK, 400),
    "UTF-16": (HEAD + b"Content-Length: %d\r\n" % (2 * len(ASK)) + LAST + ASK.decode().encode("utf-16-le"), 400),
    "100-continue": (HEAD + LENGTH + b"Expect: 100-continue\r\n" + LAST + ASK, 100),
    "another expectation": (HEAD + LENGTH + b"Expect: 200-ok\r\n" + LAST + ASK, 200),
    "HTTP/1.0": (OLD + LENGTH + b"\r\n" + ASK, 200),
    "HTTP/1.0 without a length": (OLD + b"\r\n" + ASK, 400),
    "a stream over HTTP/1.0": (OLD + b"Content-Length: %d\r\n\r\n" % len(STREAM) + STREAM, 200),
    "an upgrade to HTTP/2": (HEAD + LENGTH + b"Upgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n" + LAST + ASK, 200),
}
HEADERS = {
    "a folded header": (GET + b"X-A: a\r\n b\r\n\tc\r\n" + LAST, 200),
    "a folded name of the host": (b"GET /health HTTP/1.1\r\nHost:\r\n localhost\r\n" + LAST, 200),
    "a fold before any header": (b"GET /health HTTP/1.1\r\n Host: localhost\r\n" + LAST, 400),
    "a space before the colon": (b"GET /health HTTP/1.1\r\nHost : localhost\r\n" + LAST, 400),
    "two hosts": (GET + b"Host: evil.example\r\n" + LAST, 400),
    "no host": (b"GET /health HTTP/1.1\r\n" + LAST, 400),
    "no host over HTTP/1.0": (b"GET /health HTTP/1.0\r\n\r\n", 403),
    "HTTP/1.0 that wants to stay": (GET.replace(b"1.1", b"1.0") + b"Connection: keep-alive\r\n\r\n", 200),
    "HTTP/0.9": (b"GET /health\r\n\r\n", 400),
    "HTTP/2 at once": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0" * 9, 403),
    "a websocket": (
        GET + b"Upgrade: websocket\r\nSec-WebSocket-Key: eA==\r\nSec-WebSocket-Version: 13\r\n" + LAST,
        200,
    ),
    "CONNECT": (b"CONNECT localhost:80 HTTP/1.1\r\nHost: localhost\r\n" + LAST, 404),
    "OPTIONS *": (b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\n" + LAST, 404),
    "TRACE": (b"TRACE / HTTP/1.1\r\nHost: localhost\r\n" + LAST, 405),
    "a body where none belongs": (GET + LENGTH + LAST + ASK, 200),
    "NUL in a path": (b"GET /\0 HTTP/1.1\r\nHost: localhost\r\n" + LAST, 400),
    "NUL in a value": (GET + b"X: a\0b\r\n" + LAST, 400),
    "letters beyond ASCII in a path": ("GET /ü HTTP/1.1\r\nHost: localhost\r\n".encode() + LAST, 400),
    "the same, escaped, and no UTF-8": (b"GET /v1/models/%00%ff HTTP/1.1\r\nHost: localhost\r\n" + LAST, 404),
    "a user in the target": (b"GET http://evil@localhost/health HTTP/1.1\r\nHost: localhost\r\n" + LAST, 403),
    "lines that end in LF": ((GET + LAST).replace(b"\r", b""), 200),
    "a method of 5,000 letters": (b"A" * 5000 + b" / HTTP/1.1\r\nHost: localhost\r\n" + LAST, 405),
    "another host that a proxy names": (GET + b"X-Forwarded-Host: evil.example\r\n" + LAST, 200),
}


@pytest.mark.parametrize("name", [*BODIES, *HEADERS])
def test_odd_requests_have_one_plain_answer(server: Server, caplog, name: str):
    data, status = (BODIES | HEADERS)[name]
    answer = raw(server, data)
    found = [int(code) for code in re.findall(rb"^HTTP/1\.1 (\d+)", answer, re.M)]
    assert found[0] == status and found[1:] in ([], [200] if status == 100 else [400]), answer[:500]
    assert caplog.text == ""


def test_a_body_is_waited_for_where_its_client_waits_for_a_word(server: Server):
    with socket.create_connection(server.address, timeout=60) as s:
        s.sendall(HEAD + LENGTH + b"Expect: 100-continue\r\n" + LAST)
        assert s.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        s.sendall(ASK)
        assert s.recv(100).startswith(b"HTTP/1.1 200 ")
    too_large = HEAD + b"Content-Length: 5000000\r\nExpect: 100-continue\r\n" + LAST
    assert raw(server, too_large).startswith(b"HTTP/1.1 413 ")
    assert post(server, "/v1/completions", {"prompt": "def", "max_tokens": 2}).status_code == 200
