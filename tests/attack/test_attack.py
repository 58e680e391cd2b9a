"""Everything at once for a minute: no wrong answer, none lost, /health at hand, and afterwards all is as it was.

The server is a process of its own; abusers and honest clients are another one each. The same honest load runs without
abuse first, so that the cost of the abuse shows beside it.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import random
import socket
import struct
import subprocess
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import httpx
import psutil
import pytest
from serving import make_run

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning")]
SECONDS, HONEST, ABUSERS, SILENT = 60.0, 4, 8, 1100
SLOWER = 20
"""Times as long as without abuse that an honest client's median may take, within one run."""
JSON = {"content-type": "application/json"}
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
N = 180_000
ASKED = [
    {"prompt": f"{i} the quick brown fox ", "max_tokens": 2 + i, "seed": i, "temperature": (0.0, 1.0)[i % 2]}
    for i in range(8)
]
LAW = {"prompt": "def", "max_tokens": 40, "seed": 1}
BODIES: list[tuple[str, dict]] = [
    ("completions", {"prompt": ["a", *[1] * N]}),
    ("completions", {"prompt": [None] * N}),
    ("completions", {"prompt": [[1]] * N}),
    ("completions", {"prompt": ["a"] * N}),
    ("completions", {"prompt": "the quick " * 90_000}),
    ("completions", {f"k{i}": 1 for i in range(60_000)}),
    ("chat/completions", {"messages": [1] * N}),
    ("chat/completions", {"messages": [{"role": "user", "content": [1] * N}]}),
    ("chat/completions", {"messages": [{"role": "user", "content": "the quick " * 90_000}]}),
    ("completions", {"prompt": [["a"]] * N}),
    (
        "completions",
        LAW | {"response_format": {"type": "json_schema", "json_schema": {"schema": {"enum": ["x" * 60_000]}}}},
    ),
    ("completions", LAW | {"response_format": {"type": "json_schema", "json_schema": {"schema": {"$ref": "#"}}}}),
    ("completions", LAW | {"stop": ["x" * 200] * 16, "logit_bias": {str(i): 100 for i in range(290)}}),
    ("completions", LAW | {"temperature": 1e-310}),
    ("completions", LAW | {"temperature": 100, "top_p": 5e-324}),
    ("completions", LAW | {"repetition_penalty": 5e-324}),
]


def post(url: str, path: str, content: bytes) -> int:
    with httpx.Client(timeout=60) as client:
        return client.post(f"{url}/v1/{path}", content=content, headers=JSON).status_code


def open_socket(address: tuple[str, int], data: bytes, linger: bool = False) -> socket.socket:
    made = socket.create_connection(address, timeout=60)
    if linger:  # closing it is a reset
        made.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    made.sendall(data)
    return made


def abuse(url: str, host: str, port: int, seconds: float) -> dict[int, int]:
    """Large bodies, extreme laws, resets, endless headers and silence; how often each status was answered."""
    address, bodies = (host, port), [(path, json.dumps(body).encode()) for path, body in BODIES]
    end, statuses = time.monotonic() + seconds, dict[int, int]()
    lock, quiet = threading.Lock(), list[socket.socket]()

    def sender(number: int) -> None:
        chance = random.Random(number)
        while time.monotonic() < end:
            with contextlib.suppress(OSError, httpx.HTTPError):
                if chance.random() < 0.7:
                    status = post(url, *chance.choice(bodies))
                    with lock:
                        statuses[status] = statuses.get(status, 0) + 1
                    continue
                data = HEAD + b"Content-Length: %d\r\n\r\n" % len(bodies[-3][1]) + bodies[-3][1]
                with open_socket(address, data[: chance.randrange(1, len(data) + 1)], linger=True):
                    time.sleep(chance.random() * 0.05)

    def silence() -> None:
        while time.monotonic() < end:
            with contextlib.suppress(OSError):
                quiet.append(open_socket(address, (b"", HEAD, HEAD + b"X: " + b"a" * 30_000)[len(quiet) % 3]))
            if len(quiet) > SILENT:
                quiet.pop(0).close()

    crowd = [threading.Thread(target=sender, args=(i,)) for i in range(ABUSERS)] + [threading.Thread(target=silence)]
    for one in crowd:
        one.start()
    for one in crowd:
        one.join()
    for one in quiet:
        one.close()
    return statuses


def honest(url: str, seconds: float) -> list[tuple[int, int, str, float]]:
    """What honest clients were answered: which question, status, text, seconds."""
    end, answers = time.monotonic() + seconds, list[tuple[int, int, str, float]]()

    def client(number: int) -> None:
        chance = random.Random(number)
        with httpx.Client(timeout=60) as own:
            while time.monotonic() < end:
                i, begin = chance.randrange(len(ASKED)), time.monotonic()
                try:
                    found = own.post(url + "/v1/completions", json=ASKED[i])
                    text = found.json()["choices"][0]["text"] if found.status_code == 200 else found.text
                    answers.append((i, found.status_code, text, time.monotonic() - begin))
                except httpx.HTTPError as error:
                    answers.append((i, 0, repr(error), time.monotonic() - begin))

    with ThreadPoolExecutor(HONEST) as pool:
        for work in [pool.submit(client, n) for n in range(HONEST)]:
            work.result()
    return answers


def health(host: str, port: int, seconds: float) -> list[float]:
    """The seconds of every /health, each over a connection of its own, without a library between."""
    end, times = time.monotonic() + seconds, list[float]()
    while time.monotonic() < end:
        begin = time.monotonic()
        with socket.create_connection((host, port), timeout=60) as s:
            s.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            answer = b""
            while part := s.recv(4096):
                answer += part
        assert b" 200 " in answer[:20]
        times.append(time.monotonic() - begin)
        time.sleep(0.05)
    return times


def at(share: float, values: list[float]) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def test_everything_at_once_for_a_minute(tmp_path):
    run, log = make_run(tmp_path / "tiny"), tmp_path / "log"
    command = [sys.executable, "-m", "lrt", "serve", str(run), "--port", "0", "--threads", "1", "--keep-mb", "8"]
    with (
        log.open("w") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as server,
        ProcessPoolExecutor(3, multiprocessing.get_context("spawn")) as pool,
    ):
        try:
            assert server.stdout is not None
            url = server.stdout.readline().strip().partition(" at ")[2]
            host, _, port = url.removeprefix("http://").partition(":")
            process = psutil.Process(server.pid)
            with httpx.Client(timeout=60) as own:
                found = [own.post(url + "/v1/completions", json=body).json() for body in ASKED]
            alone = [answer["choices"][0]["text"] for answer in found]
            watched = pool.submit(health, host, int(port), SECONDS / 3)
            quiet, quiet_health = pool.submit(honest, url, SECONDS / 3).result(), watched.result()
            memory, files = process.memory_info().rss, process.num_fds()
            attack = pool.submit(abuse, url, host, int(port), SECONDS)
            watched = pool.submit(health, host, int(port), SECONDS)
            answers, times, statuses = pool.submit(honest, url, SECONDS).result(), watched.result(), attack.result()
            time.sleep(12)  # longer than a silent connection is kept
            more, left = process.memory_info().rss - memory, process.num_fds() - files
        finally:
            server.kill()
    print(
        f"honest: {len(answers)} answers, median {1e3 * at(0.5, [a[3] for a in answers]):.0f} ms, 99 % "
        f"{1e3 * at(0.99, [a[3] for a in answers]):.0f} ms; without abuse median "
        f"{1e3 * at(0.5, [a[3] for a in quiet]):.0f} ms, 99 % {1e3 * at(0.99, [a[3] for a in quiet]):.0f} ms\n"
        f"/health: median {1e3 * at(0.5, times):.0f} ms, 99 % {1e3 * at(0.99, times):.0f} ms, worst "
        f"{1e3 * max(times):.0f} ms; without abuse 99 % {1e3 * at(0.99, quiet_health):.0f} ms\n"
        f"abuse: {dict(sorted(statuses.items()))}; memory {more / 2**20:+.1f} MB, descriptors {left:+d}, "
        f"log {log.stat().st_size} bytes"
    )
    assert [a for a in answers if a[1] != 200] == []
    assert [a for a in answers if a[2] != alone[a[0]]] == []
    assert all(status < 500 or status == 503 for status in statuses), statuses
    assert "Traceback" not in log.read_text()
    assert at(0.5, [a[3] for a in answers]) < SLOWER * at(0.5, [a[3] for a in quiet])
    assert left <= 4 and more < 60 * 2**20
