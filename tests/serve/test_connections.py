"""Connections: the silent ones make room, what trickles or never ends is given up, kept ones and pipelines work."""

from __future__ import annotations

import contextlib
import socket
import time

import httpx
import pytest
from serving import Server, raw

from lrt.serve.connections import ConnectionLimits, OpenConnections

BODY = {"prompt": "def", "max_tokens": 2, "temperature": 0}
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


class Fake:
    """A connection as the registry sees it."""

    def __init__(self):
        self.transport, self.aborted = self, False

    def abort(self) -> None:
        self.aborted = True


def test_the_one_that_has_waited_longest_makes_room():
    everyone = OpenConnections(ConnectionLimits(4, 3, 1, 1, 1000))
    silent = [Fake() for _ in range(3)]
    for one in silent:
        assert everyone.admit(one, "greedy")
        everyone.waits(one)
    everyone.served(silent[0])  # its request has arrived
    fourth, fifth, sixth = Fake(), Fake(), Fake()
    assert everyone.admit(fourth, "greedy")  # in place of another of the same peer, though there is room in all
    assert [s.aborted for s in silent] == [False, True, False]
    assert everyone.admit(fifth, "modest")
    assert everyone.admit(sixth, "modest")  # all are taken: the peer with most connections makes room
    assert [s.aborted for s in silent] == [False, True, True] and len(everyone) == 4
    everyone.served(fourth)
    assert not everyone.admit(Fake(), "greedy" if len(everyone) < 4 else "third")  # nobody who waits is left
    everyone.forget(silent[0])
    assert everyone.admit(Fake(), "third")


def test_silent_connections_make_room_for_those_who_speak(run):
    with Server(run, connections=40, connections_per_peer=30) as server, contextlib.ExitStack() as stack:
        for _ in range(120):
            stack.enter_context(socket.create_connection(server.address))
        for _ in range(3):
            assert httpx.get(server.url + "/health", timeout=60).status_code == 200
            assert httpx.post(server.url + "/v1/completions", json=BODY, timeout=60).status_code == 200
        assert len(server.server.open) <= 30 and server.server.open.dropped >= 90


def test_headers_and_bodies_that_do_not_end_are_given_up(run, monkeypatch):
    monkeypatch.setattr("lrt.serve.connections.GRACE", 240.0)  # a busy machine may need it for the answer
    with Server(run, header_seconds=0.3, body_seconds=0.3) as server:
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        for data, status in (
            (b"", None),
            (b"GET / HT", None),
            (head, None),
            (head + b"Content-Length: 9\r\n\r\n{", b"408"),
            (head + b"Transfer-Encoding: chunked\r\n\r\n5\r\n{", b"408"),
            (head + b"X-Long: " + b"a" * 40_000, b"400"),
            (b"".join([head, *(b"X-%d: a\r\n" % i for i in range(4000))]), b"400"),
            (b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", b"400"),
            (b"GET / HTTP/9.9\r\n\r\n", b"403"),
        ):
            with socket.create_connection(server.address, timeout=60) as s:
                s.sendall(data)
                answer = b""
                with contextlib.suppress(ConnectionError):
                    while not answer.endswith(b"}}") and (part := s.recv(4096)):
                        answer += part
            assert (answer.split()[1] if answer else None) == status, (data[:40], answer)
        assert server.thread.is_alive()


def test_trickling_does_not_keep_a_connection(run):
    """A byte now and then, in headers, in a body, and in a body whose answer has long been given."""
    with Server(run, "key", header_seconds=0.4, body_seconds=0.4) as server:
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        keyed = head + b"Authorization: Bearer key\r\n"
        for begin in (head, keyed + b"Content-Length: 999\r\n\r\n{", head + b"Content-Length: 999\r\n\r\n{"):
            with socket.create_connection(server.address, timeout=60) as s:
                assert _dropped(s, begin)


def _dropped(s: socket.socket, begin: bytes) -> bool:
    """Whether the server ends a connection on which a byte comes now and then."""
    end = time.monotonic() + 20
    try:
        s.sendall(begin)
        while time.monotonic() < end:
            s.sendall(b"X")
            time.sleep(0.05)
    except ConnectionError:
        return True
    return False


def test_kept_connections_and_pipelines_still_work(server):
    ask = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with socket.create_connection(server.address, timeout=60) as s:
        s.sendall(ask * 3)
        answer = b""
        while answer.count(b'{"status":"ok"}') < 3:
            answer += s.recv(65536)
        s.sendall(ask)
        assert b" 200 " in s.recv(65536)


def test_empty_lines_before_a_request_are_passed_over(server):
    """Old clients send one after a body; RFC 9112, section 2.2."""
    ask = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"
    assert b" 200 " in raw(server, b"\r\n\r\n" + ask + b"Connection: close\r\n\r\n")[:20]
    with socket.create_connection(server.address, timeout=240) as s:
        for _ in range(2):
            s.sendall(ask + b"\r\n")
            assert b" 200 " in s.recv(65536)[:20]
            s.sendall(b"\r\n")
    assert b" 400 " in raw(server, b"\r\n \r\n" + ask + b"Connection: close\r\n\r\n")[:20]
