"""The server's process: how it ends, what it logs when clients vanish, and what memory it gives back."""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import signal
import socket
import struct
import threading
import time

import httpx
import psutil
import pytest
from serving import Server, started

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
LONG = {"prompt": "def", "max_tokens": 250, "seed": 1, "stop": "\x00", "ignore_eos": True}
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


def test_what_runs_when_the_drain_is_over_is_told_so(run, caplog, monkeypatch):
    """A stream ends with an error event, a whole answer with 503, and nothing is logged."""
    monkeypatch.setattr("lrt.serve.server.LAST_WORDS", 30.0)
    with Server(run, drain=0.2) as server:
        asked, go, told = threading.Event(), threading.Event(), threading.Event()
        engine, submitted = server.served.engine, itertools.count(1)
        submit, abort = engine.submit, engine.abort
        monkeypatch.setattr(engine, "submit", lambda jobs: (submit(jobs), next(submitted) == 2 and asked.set()))
        monkeypatch.setattr(engine, "abort", lambda: (abort(), told.set()))
        server.hold(asked, after=20)  # the first has begun; it waits for the second,
        server.hold(go, after=40)  # and both wait, long before they are done, for the end of the drain
        found: dict[str, object] = {}

        def stream() -> None:
            with httpx.stream("POST", server.url + "/v1/completions", json=LONG | {"stream": True}, timeout=60) as r:
                found["stream"] = [line for line in r.iter_lines() if line]

        def whole() -> None:
            found["whole"] = httpx.post(server.url + "/v1/completions", json=LONG, timeout=60)

        clients = [threading.Thread(target=stream), threading.Thread(target=whole)]
        for client in clients:
            client.start()
        while server.metric("lrt_rows_running") < 2:
            time.sleep(0.01)
        server.server.should_exit = True
        assert told.wait(240)
        go.set()
        for client in clients:
            client.join(240)
    lines = found["stream"]
    assert isinstance(lines, list) and isinstance(found["whole"], httpx.Response)
    assert "shutting down" in json.loads(lines[-1].removeprefix("data: "))["error"]["message"]
    assert found["whole"].status_code == 503
    assert caplog.text == ""


@pytest.mark.slow
def test_a_short_drain_and_silent_clients_end_in_time_without_a_traceback(run, tmp_path):
    with started(run, tmp_path / "log", "--drain", "1") as server:
        body = json.dumps(LONG | {"stream": True}).encode()
        ask = HEAD + b"Content-Length: %d\r\n\r\n" % len(body)
        sockets = [socket.create_connection(server.address) for _ in range(60)]
        for i, s in enumerate(sockets):  # streams that nobody reads, bodies that never end, headers, silence
            s.sendall((ask + body, ask + body[:10], ask[:30], b"")[i % 4])
        time.sleep(1)
        begin = time.monotonic()
        server.popen.send_signal(signal.SIGTERM)
        assert server.popen.wait(30) in (0, -signal.SIGTERM)
        took = time.monotonic() - begin
        for s in sockets:
            s.close()
    log = server.log.read_text()
    print(f"ended after {took:.1f} s, {len(log)} bytes of log")
    assert "Traceback" not in log and len(log) < 2000, log[:2000]
    assert took < 15


def vanish(address: tuple[str, int], seconds: float) -> int:
    """Clients that reset their connections at random moments of a request; how many there were."""
    chance, end, count = random.Random(0), time.monotonic() + seconds, 0
    bodies = [json.dumps(LONG | extra).encode() for extra in ({"stream": True}, {}, {"n": 3}, {"prompt": [None]})]
    while time.monotonic() < end:
        body = chance.choice(bodies)
        data = HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body
        with contextlib.suppress(ConnectionError), socket.create_connection(address, timeout=60) as s:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close by a reset
            s.sendall(data[: chance.randrange(1, len(data) + 1)] if chance.random() < 0.5 else data)
            time.sleep(chance.random() * 0.05)
            count += 1
    return count


@pytest.mark.slow
def test_clients_that_vanish_write_nothing_into_the_log(run, tmp_path):
    with started(run, tmp_path / "log") as server:
        counts: list[int] = []
        crowd = [threading.Thread(target=lambda: counts.append(vanish(server.address, 20))) for _ in range(8)]
        for one in crowd:
            one.start()
        for one in crowd:
            one.join()
        assert httpx.get(server.url + "/health", timeout=60).status_code == 200
        answer = httpx.post(server.url + "/v1/completions", json={"prompt": "def", "max_tokens": 2}, timeout=60)
        assert answer.status_code == 200
    log = server.log.read_text()
    print(f"{sum(counts)} clients vanished, {len(log)} bytes of log")
    assert log == ""


@pytest.mark.slow
def test_memory_returns_after_large_bodies(run, tmp_path):
    """60 s of bodies of 0.9 MB, all wrong; a little later the process holds about what it held before."""
    bodies = ({"prompt": "the quick " * 90_000}, {"prompt": [None] * 180_000}, {"prompt": [[1]] * 180_000},
              {"prompt": "a", "stop": [1] * 300_000})  # fmt: skip
    large = [json.dumps(body).encode() for body in bodies]
    with started(run, tmp_path / "log") as server:
        process = psutil.Process(server.popen.pid)

        def send(seconds: float, number: int) -> None:
            end, kind = time.monotonic() + seconds, {"content-type": "application/json"}
            with httpx.Client(timeout=60) as client:
                while time.monotonic() < end:
                    client.post(server.url + "/v1/completions", content=large[number % 4], headers=kind)

        def crowd(seconds: float) -> None:
            senders = [threading.Thread(target=send, args=(seconds, i)) for i in range(8)]
            for one in senders:
                one.start()
            for one in senders:
                one.join()
            time.sleep(5)

        httpx.post(server.url + "/v1/completions", json={"prompt": "def", "max_tokens": 2}, timeout=60)
        begin = process.memory_info().rss
        crowd(60)
        after, files = process.memory_info().rss, process.num_fds()
        crowd(20)
        again = process.memory_info().rss
    mb = lambda more: f"{(more - begin) / 2**20:+.1f} MB"  # noqa: E731
    print(f"memory after 60 s {mb(after)}, after 20 s more {mb(again)}; {files} descriptors")
    assert after - begin < 40 * 2**20 and again - after < 10 * 2**20
