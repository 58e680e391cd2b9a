"""Hostile requests, a table: each has its status and a short answer; honest clients are told what they are alone."""

from __future__ import annotations

import contextlib
import gzip
import itertools
import json
import re
import socket
import threading
import zlib

import h11
import httpx
import pytest
from serving import Server, post, raw

from lrt.serve.connections import CountedParts
from lrt.serve.grammar import MOST_WRITTEN, remainders, written_out

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
JSON = {"content-type": "application/json"}
HONEST = {"prompt": "the quick", "max_tokens": 10, "seed": 11, "temperature": 0.8, "logprobs": 1}


def asked(more: str = "", **fields) -> bytes:
    """A completion's body, with more JSON or more fields."""
    body = json.dumps({"prompt": "a", "max_tokens": 2, "seed": 1} | fields)
    return (body[:-1] + ("," + more if more else "") + "}").encode()


def user(raw_text: bytes) -> bytes:
    return asked('"user":"X"').replace(b"X", raw_text)


def form(**schema) -> bytes:
    return asked(response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": schema}})


def tools(count: int) -> bytes:
    one = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    return json.dumps(
        {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2, "tools": [one] * count}
    ).encode()


BODIES = {
    "lists in lists": (asked('"metadata":{"a":' + "[" * 5000 + "]" * 5000 + "}"), 400),
    "objects in objects": (asked('"metadata":' + '{"a":' * 5000 + "1" + "}" * 5000), 400),
    "lists without end": (asked('"user":' + "[" * 900_000), 400),
    "100,000 fields": (asked(",".join(f'"k{i}":1' for i in range(60_000))), 400),
    "10,000 fields of what is not read": (asked(metadata={f"k{i}": 1 for i in range(10_000)}), 200),
    "an integer of 100,000 digits": (asked('"seed":' + "9" * 100_000), 400),
    "one below zero": (asked('"top_k":-' + "9" * 100_000), 400),
    "an integer of 400 digits for a number": (asked('"temperature":' + "9" * 400), 400),
    "a number of 900,000 digits": (asked('"temperature":0.' + "3" * 900_000), 200),
    "900,000 digits before the point": (asked('"temperature":' + "1" * 900_000 + ".5"), 400),
    "an exponent that is too large": (asked('"temperature":1e999999'), 400),
    "an exponent that is too small": (asked('"temperature":1e-999999'), 200),
    "an exponent of 5,000 digits": (asked('"temperature":1e' + "9" * 5000), 400),
    "NaN": (asked('"temperature":NaN'), 400),
    "Infinity": (asked('"temperature":Infinity'), 400),
    "-Infinity": (asked('"min_p":-Infinity'), 400),
    "NaN in what is not read": (asked('"metadata":{"a":NaN}'), 400),
    "a number as text": (asked('"temperature":"1"'), 400),
    "true for a number": (asked('"n":true'), 400),
    "a length with a point": (asked('"top_k":2.5'), 400),
    "bytes that are not UTF-8": (user(b"\xc3\x28"), 400),
    "a letter spelled too long": (user(b"\xc0\xaf"), 400),
    "half a pair in UTF-8": (user(b"\xed\xa0\x80"), 400),
    "half a pair": (user(b"\\ud800"), 400),
    "the other half": (user(b"\\udc00"), 400),
    "a whole pair": (user(b"\\ud83d\\ude00"), 200),
    "half a pair as a name": (asked('"\\ud800":1'), 400),
    "a zero byte": (user(b"\0"), 400),
    "a zero character": (user(b"\\u0000"), 200),
    "a byte order mark": (b"\xef\xbb\xbf" + asked(), 400),
    "UTF-16": (asked().decode().encode("utf-16"), 400),
    "a field twice": (asked('"max_tokens":999999999,"max_tokens":2'), 200),
    "a wrong field twice": (asked('"top_p":0.5,"top_p":7'), 400),
    "two bodies": (asked() + b"{}", 400),
    "a comma too many": (asked()[:-1] + b",}", 400),
    "a comment": (asked() + b"//", 400),
    "a list": (b"[1]", 400),
    "spaces": (b" " * 900_000 + asked(), 200),
    "a name of 500,000 letters": (asked('"' + "k" * 500_000 + '":1'), 400),
    "a name of no letter": (asked('"":1'), 400),
    "a name that steers a terminal": (asked('"\\u001b[31m\\u202e":1'), 400),
    "a model of 500,000 letters": (asked(model="m" * 500_000), 404),
    "a salt of 500,000 letters": (asked(cache_salt="m" * 500_000), 400),
    "fields of languages": (asked('"__proto__":{"a":1},"__class__":1'), 400),
    "10,000 stop texts": (asked(stop=[f"x{i}" for i in range(10_000)]), 400),
    "a stop text of no letter": (asked(stop=["a", ""]), 400),
    "16 stop texts that share their beginnings": (asked(stop=["x" * 199 + chr(65 + i) for i in range(16)]), 200),
    "10,000 stop tokens": (asked(stop_token_ids=list(range(10_000))), 400),
    "a stop token outside": (asked(stop_token_ids=[2**31 - 1]), 400),
    "30,000 biases": (asked(logit_bias={str(i): 1 for i in range(30_000)}), 400),
    "100,000 biases": (asked(logit_bias={str(i): 1 for i in range(100_000)})[:1_000_000], 400),
    "a bias outside": (asked(logit_bias={"999999": 1}), 400),
    "a bias of a signed token": (asked(logit_bias={"-0": 1}), 400),
    "a bias of a foreign digit": (asked(logit_bias={"\u0661": 1}), 400),
    "a bias twice": (asked(logit_bias={"1": 1, "01": 2}), 400),
    "n of 30 digits": (asked('"n":' + "9" * 30), 400),
    "n of 64, and a prompt twice": (asked(n=64, prompt=["a", "b"]), 400),
    "a token below zero": (asked(prompt=[-1]), 400),
    "a token of 5,000 digits": (asked('"prompt":[' + "9" * 5000 + "]"), 400),
    "a token outside": (asked(prompt=[2**62]), 400),
    "an empty list of tokens": (asked(prompt=[[1], []]), 400),
    "a schema in itself": (form(**{"$ref": "#"}), 400),
    "a schema of 400 levels": (asked('"response_format":{"type":"json_schema","json_schema":{"schema":'
                               + '{"items":' * 400 + "{}" + "}" * 400 + "}}"), 400),
    "a schema of 100,000 letters": (form(enum=["x" * 100_000]), 400),
    "an expression of nested repeats": (form(type="string", pattern="^" + "(" * 10 + "a+" + ")+" * 10 + "$"), 200),
    "an expression of many choices": (form(type="string", pattern="^(a?){1000}a{1000}$"), 400),
    "an expression of a million repeats": (form(type="string", pattern="^(a{1000}){1000}$"), 400),
    "a number of a million remainders": (form(type="integer", multipleOf=1_000_003), 400),
    "fifty of ten thousand": (form(prefixItems=[{"type": "integer", "multipleOf": 9973 + i} for i in range(50)]), 400),
    "three that hold together": (form(type="integer", allOf=[{"multipleOf": m} for m in (97, 101, 103)]), 400),
    "a number of few remainders": (form(type="integer", multipleOf=12), 200),
    "a hundredth, and three": (form(type="number", allOf=[{"multipleOf": 0.01}, {"multipleOf": 3}]), 200),
    "a divisor of 400 digits": (form(type="integer", multipleOf=10**400), 400),
    "a divisor of no size": (form(type="number", multipleOf=5e-324), 400),
    "references that double": (form(**{"$ref": "#/$defs/a0", "$defs": {"a40": {"type": "string"}} | {
        f"a{i}": {"anyOf": [{"$ref": f"#/$defs/a{i + 1}"}] * 2} for i in range(40)}}), 200),
    "references in a chain": (form(**{"$ref": "#/$defs/a0", "$defs": {"a900": {"type": "string"}} | {
        f"a{i}": {"$ref": f"#/$defs/a{i + 1}"} for i in range(900)}}), 200),
    "a reference elsewhere": (form(**{"$ref": "file:///etc/passwd"}), 400),
    "100,000 values to choose from": (form(enum=list(range(100_000))), 400),
    "7,000 values to choose from": (form(enum=list(range(7000))), 200),
    "lists of a thousand lists": (form(type="array", minItems=1000, items={"type": "array", "minItems": 1000}), 200),
    "a text of 2^62 letters": (form(type="string", minLength=2**62), 400),
    "a bias of a list": (asked(logit_bias={"1": [1]}), 400),
    "a bias of a bias": (asked(logit_bias={"1": {"2": 1}}), 400),
    "a bias 30,000 times": (asked('"logit_bias":{' + ",".join(['"1":1'] * 30_000) + "}"), 200),
    "a stream's option that is a number": (asked(stream=True, stream_options={"include_usage": 1}), 400),
    "a stream's options in a list": (asked(stream=True, stream_options=[]), 400),
    "stop texts in a list of a list": (asked(stop=[["a"]]), 400),
    "a stop token of a point": (asked(stop_token_ids=[1.0]), 400),
    "tokens of a point": (asked(prompt=[1.0]), 400),
    "tokens and a text": (asked(prompt=[1, "a"]), 400),
    "lists of lists of lists of tokens": (asked(prompt=[[[1]]]), 400),
    "a minus at zero": (asked('"temperature":-0.0,"min_p":-0,"top_k":-0,"seed":-0'), 200),
    "1e308": (asked('"presence_penalty":1e308'), 400),
    "a seed of 65 bits": (asked('"seed":18446744073709551616'), 400),
    "a name of a million repeats": (form(items={"patternProperties": {"^(a{999,1000}){1000}$": {}}}), 400),
}  # fmt: skip


@pytest.fixture(scope="module")
def alone(server) -> dict:
    return post(server, "/v1/completions", HONEST).json()["choices"][0]


def plain(found: httpx.Response, status: int) -> None:
    """The status, and if it is an error one short line that steers no terminal."""
    assert found.status_code == status, found.text[:500]
    if status != 200:
        error = found.json()["error"]
        assert 0 < len(error["message"]) <= 300 and error["message"].isprintable() and len(found.text) < 800
        assert "instance of" not in error["message"] and "Request" not in error["message"]


@pytest.mark.parametrize("name", BODIES)
def test_hostile_bodies_have_one_plain_answer_and_touch_nobody(server, alone, caplog, name):
    content, status = BODIES[name]
    found = list[httpx.Response]()
    sender = threading.Thread(
        target=lambda: found.append(
            httpx.post(server.url + "/v1/completions", content=content, headers=JSON, timeout=60)
        )
    )
    sender.start()
    honest = post(server, "/v1/completions", HONEST)
    sender.join()
    plain(found[0], status)
    assert honest.json()["choices"][0] == alone
    assert caplog.text == ""


def test_of_a_field_given_twice_the_last_counts(server):
    def text(content: bytes) -> str:
        return httpx.post(server.url + "/v1/completions", content=content, headers=JSON, timeout=60).json()["choices"]

    law = b'"max_tokens":4,"seed":1}'
    assert text(b'{"prompt":"a","prompt":"def",' + law) == text(b'{"prompt":"def",' + law)


def test_many_tools_are_refused_and_touch_nobody(server, alone):
    for count, status in ((10_000, 400), (1, 200)):
        content = tools(count)[:999_999]
        plain(httpx.post(server.url + "/v1/chat/completions", content=content, headers=JSON, timeout=60), status)
    assert post(server, "/v1/completions", HONEST).json()["choices"][0] == alone


@pytest.mark.parametrize("escape", [lambda c: f"\\u{ord(c):04x}", lambda c: f"\\u{ord(c):04X}"])
def test_escapes_of_a_special_token_are_text(server, escape):
    """However JSON spells it, a prompt never holds a special token."""
    tokenizer, special = server.loaded.tokenizer, server.served.words.about()
    names = [name for name in json.dumps(special).split('"') if name.startswith("<|")] or ["<|bos|>"]
    for name in names:
        spelled = '{"prompt":"' + "".join(map(escape, name)) + '"}'
        ids = httpx.post(server.url + "/tokenize", content=spelled, headers=JSON, timeout=60).json()["tokens"]
        assert ids == [tokenizer.bos, *tokenizer.encode(name)] and len(ids) > 2
        assert tokenizer.bos not in ids[1:]


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        ("", 0), ("abc", 3), ("^a{3}$", 5), ("a{2,5}", 5), ("a{3,}", 3), ("(ab){4}", 8), ("((a{2}b){3}c){4}", 40),
        (r"\({3}", 3), (r"[(){}\]]{7}", 7), (r"\p{L}{2}", 5), ("a{2}{3}", 6), ("){9}", 9), ("a{0}b", 1), ("a{b}", 4),
    ],
)  # fmt: skip
def test_repeats_of_an_expression_are_written_out(pattern, count):
    assert written_out(pattern) == count


@pytest.mark.parametrize(
    ("divisors", "combined", "count"),
    [
        ([], True, 1), ([7], False, 7), ([0.01], False, 1), ([0.25, 2.5], False, 50), ([-5], True, 5),
        ([97, 101], False, 198), ([97, 101], True, 9797), ([0.01, 3], True, 300), ([6, 4, 12], True, 22),
        ([0], True, 1),
    ],
)  # fmt: skip
def test_remainders_are_those_of_the_divisors_or_of_what_they_have_in_common(divisors, combined, count):
    assert remainders(divisors, combined) == count


def test_remainders_without_end_are_counted_no_further():
    tiny = [1e-300 + i * 1e-301 for i in range(3000)]
    for divisors in ([1e308], [10**4000], [5e-324], tiny, list(range(9000, 9050))):
        assert remainders(divisors, True) > MOST_WRITTEN


def test_sizes_are_those_of_all_tools_together(server):
    one = {"type": "object", "properties": {"a": {"type": "integer", "multipleOf": 9973}}}
    tools = [{"type": "function", "function": {"name": f"f{i}", "parameters": one}} for i in range(8)]
    ask = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2, "tool_choice": "required"}
    plain(post(server, "/v1/chat/completions", ask | {"tools": tools}), 400)
    assert "remainders" in post(server, "/v1/chat/completions", ask | {"tools": tools}).json()["error"]["message"]


def test_repeats_without_end_are_counted_no_further():
    for pattern in ("(" * 20_000 + "a" + "){9}" * 20_000, "a{9}" * 3 + "{999999999}" * 5000, "a{" + "9" * 50_000 + "}"):
        assert written_out(pattern) > MOST_WRITTEN


# Bodies on their way.

COMPRESSED = {
    "gzip": gzip.compress(asked()), "deflate": zlib.compress(asked()), "br": asked(), "identity, gzip": asked(),
    "GZIP": gzip.compress(b" " * 10**8),
}  # fmt: skip


@pytest.mark.parametrize("coding", COMPRESSED)
def test_compressed_bodies_are_refused_by_name(server, coding):
    headers = JSON | {"content-encoding": coding}
    found = httpx.post(server.url + "/v1/completions", content=COMPRESSED[coding], headers=headers, timeout=60)
    plain(found, 415)
    assert "Content-Encoding" in found.json()["error"]["message"]
    fine = JSON | {"content-encoding": "identity"}
    assert httpx.post(server.url + "/v1/completions", content=asked(), headers=fine, timeout=60).status_code == 200


HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


def test_a_body_in_chunks_of_a_byte_is_one_body(server):
    body = asked()
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n"
    answer = raw(server, HEAD + b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n" + chunks)
    assert b" 200 " in answer[:20]


@pytest.mark.parametrize("chunk", [b"1\r\n \r\n", b"1;a=b\r\n \r\n", b"01\r\n \r\n"])
def test_a_body_of_crumbs_is_given_up_early(server, chunk):
    """Every part costs the loop some microseconds, so a megabyte of single bytes is not taken in to its end."""
    with socket.create_connection(server.address, timeout=60) as s, contextlib.suppress(ConnectionError):
        s.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunk * 400)
        while s.recv(4096):
            pass
    assert post(server, "/v1/completions", HONEST).status_code == 200


def test_parts_are_counted_by_request_and_by_size():
    def parts(*sizes: int) -> int:
        """How many parts of these sizes are taken, over and over, before they are too many."""
        conn, taken = CountedParts(h11.SERVER), 0
        conn.receive_data(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
        assert isinstance(conn.next_event(), h11.Request)
        for size in itertools.islice(itertools.cycle(sizes), 2000):
            conn.receive_data(b"%x\r\n" % size + b"a" * size + b"\r\n")
            try:
                assert isinstance(conn.next_event(), h11.Data)
            except h11.RemoteProtocolError:
                return taken
            taken += 1
        return taken

    assert parts(1) == 260  # 256, and one more for each 64 bytes
    assert parts(64) == parts(1, 200) == 2000


@pytest.mark.parametrize(("length", "status"), [(5, 400), (len(asked()), 200)])
def test_what_follows_a_body_is_another_request(server, length, status):
    """A length that is too short cuts the body; the rest is no HTTP, and ends the connection."""
    answer = raw(server, HEAD + b"Content-Length: %d\r\n\r\n" % length + asked())
    assert answer.split(b" ", 2)[1] == b"%d" % status


@pytest.mark.parametrize("body", [b"-5\r\n{}", b"0x2\r\n{}", b"2\r\n{}xx", b"zz\r\n"])
def test_a_body_that_is_not_what_its_headers_say_is_told_so(server, body):
    answer = raw(server, HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + body + b"\r\n0\r\n\r\n")
    assert answer.split(b" ", 2)[1] == b"400" and b"its body is not what they say" in answer
    assert answer.count(b"HTTP/1.1") == 1


@pytest.mark.parametrize("length", [17_000, 60_000])
def test_headers_that_come_at_once_are_measured_too(server, length):
    for request in (b"GET /" + b"a" * length, b"GET /health HTTP/1.1\r\nX: " + b"a" * length):
        line = b"" if b"HTTP" in request else b" HTTP/1.1"
        answer = raw(server, request + line + b"\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert answer.split(b" ", 2)[1] == b"400" and b"its headers are too long" in answer


def test_pipelined_requests_are_answered_in_turn(server):
    """Good and bad, in one write; the second answer follows the first."""
    good = HEAD + b"Content-Length: %d\r\n\r\n" % len(asked()) + asked()
    bad = HEAD + b"Content-Length: 2\r\n\r\n[]"
    with socket.create_connection(server.address, timeout=60) as s:
        s.sendall(good + bad + good + bad.replace(b"Host", b"Connection: close\r\nHost"))
        answer = b""
        while part := s.recv(65536):
            answer += part
    assert re.findall(rb"HTTP/1.1 (\d+)", answer) == [b"200", b"400", b"200", b"400"]


def test_one_that_reads_its_stream_slowly_keeps_nobody_waiting(server, alone):
    """Its row is free once its answer is made, whether or not it has read it."""
    body = json.dumps({"prompt": "def", "max_tokens": 60, "stream": True, "logprobs": 20, "ignore_eos": True}).encode()
    with contextlib.ExitStack() as stack:
        for _ in range(6):
            s = stack.enter_context(socket.socket())
            s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            s.connect(server.address)
            s.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        for _ in range(3):
            assert post(server, "/v1/completions", HONEST).json()["choices"][0] == alone
        server.wait_idle()


def test_upgrades_lead_nowhere(server: Server):
    for protocol in (b"websocket", b"h2c", b"TLS/1.0", b"x" * 4000):
        ask = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade, close\r\nUpgrade: " + protocol
        keyed = ask + b"\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
        answer = raw(server, keyed)
        assert b" 200 " in answer[:20] and b"101" not in answer[:20]
