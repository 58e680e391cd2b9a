"""Throughput and time to first token of the server, against one request at a time.

The server is a process of its own, the clients are another one, both on loopback. Closed loop: every client asks again
as soon as it has its answer. Open loop: requests arrive at random (Poisson), at a share of the rate that the closed
loop reached, whether or not the server keeps up.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import random
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from lrt.config.model import require

PROMPTS = (
    "def area(self, width, height):\n", "class Reader:\n    def __init__(self", "import os\nimport sys\n\n",
    "    for key, value in items", "# Return the", "try:\n    import", "    def test_", "    if not isinstance(",
)  # fmt: skip
START_SECONDS = 300


@dataclass(frozen=True, kw_only=True)
class LoadBenchmark:
    """Measure a served model: tokens per second, and time to the first token, by number of clients."""

    clients: tuple[int, ...] = (1, 8, 32)
    """Clients at the same time; the ratios are against the first number."""
    tokens: int = 64
    """Tokens of every answer."""
    seconds: float = 10.0
    """Length of every measurement."""
    load: float = 0.7
    """Arrival rate of the open loop, as a share of the closed loop's."""
    rounds: int = 1
    """Rounds over all numbers of clients, in turns; the median of each figure is reported."""

    def __post_init__(self) -> None:
        require(bool(self.clients) and min(self.clients) >= 1, f"--clients are {self.clients}; give numbers from 1 on")
        require(self.seconds > 0 and self.tokens >= 1 and self.rounds >= 1, "give positive seconds, tokens and rounds")
        require(self.load > 0, f"--load is {self.load}; give a positive share")


class RequestTiming(NamedTuple):
    """One request as its client saw it."""

    first: float
    """Seconds to the first part of the answer: of a stream its first token, else all of it."""
    total: float
    tokens: int


def measure(folder: Path, settings: LoadBenchmark) -> dict[str, Any]:
    """All cells; the result is plain data."""
    command = [sys.executable, "-m", "lrt", "serve", str(folder), "--port", "0", "--rows", str(max(settings.clients))]
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server,
        ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool,
    ):
        try:
            assert server.stdout is not None
            announced = server.stdout.readline()
            require(" at http://" in announced, f"the server of {folder} did not start: see what it says above")
            host, _, port = announced.strip().rpartition("//")[2].partition(":")
            run = lambda *cell: pool.submit(_cell, host, int(port), settings.tokens, *cell).result()  # noqa: E731
            run(max(settings.clients), min(3.0, settings.seconds), False, None)  # warm up
            rows = _rounds(settings, run)
        finally:
            server.terminate()
    return {"run": str(folder), "tokens": settings.tokens, "seconds": settings.seconds, "rounds": settings.rounds,
            "load": settings.load, "cores": os.cpu_count(), "rows": rows}  # fmt: skip


def _rounds(settings: LoadBenchmark, run: Any) -> list[dict[str, Any]]:
    cells: dict[tuple[int, bool, str], list[dict[str, float]]] = {}
    for _ in range(settings.rounds):
        for stream in (False, True):
            for clients in settings.clients:
                closed = run(clients, settings.seconds, stream, None)
                cells.setdefault((clients, stream, "closed"), []).append(closed)
                rate = settings.load * closed["tokens_per_second"] / settings.tokens
                cells.setdefault((clients, stream, "open"), []).append(run(clients, settings.seconds, stream, rate))
    rows = []
    for (clients, stream, loop), rounds in cells.items():
        base = cells[settings.clients[0], stream, "closed"]
        ratios = [f["tokens_per_second"] / b["tokens_per_second"] for f, b in zip(rounds, base, strict=True)]
        figures = {key: median(f[key] for f in rounds) for key in rounds[0]}
        rows.append({"clients": clients, "stream": stream, "loop": loop, "ratio": median(ratios)} | figures)
    return rows


def _cell(host: str, port: int, tokens: int, clients: int, seconds: float, stream: bool, rate: float | None):
    """One measurement, in the clients' process. Requests under way at the end count with the tokens they have made."""
    return asyncio.run(_measure(host, port, tokens, clients, seconds, stream, rate))


async def _measure(
    host: str, port: int, tokens: int, clients: int, seconds: float, stream: bool, rate: float | None
) -> dict[str, float]:
    done: list[RequestTiming] = []
    begin, chance, number = time.perf_counter(), random.Random(0), 0

    async def client() -> None:
        nonlocal number
        while time.perf_counter() - begin < seconds:
            number += 1
            done.append(await ask(host, port, number, tokens, stream))

    async def arrivals(rate: float) -> None:
        nonlocal number
        under_way = set()
        while time.perf_counter() - begin < seconds:
            await asyncio.sleep(chance.expovariate(rate))
            number += 1
            under_way.add(asyncio.create_task(ask(host, port, number, tokens, stream)))
        done.extend(await asyncio.gather(*under_way))

    await (asyncio.gather(*(client() for _ in range(clients))) if rate is None else arrivals(rate))
    took, firsts = time.perf_counter() - begin, sorted(t.first for t in done)
    return {
        "tokens_per_second": sum(t.tokens for t in done) / took, "requests": len(done), "seconds": took,
        "first_ms": 1e3 * median(firsts), "first_p95_ms": 1e3 * firsts[int(0.95 * len(firsts))],
        "answer_ms": 1e3 * median(t.total for t in done),
    }  # fmt: skip


async def ask(host: str, port: int, number: int, tokens: int, stream: bool) -> RequestTiming:
    """One request over a connection of its own; the leanest client there is, since it shares the machine."""
    body = json.dumps({
        "prompt": PROMPTS[number % len(PROMPTS)], "max_tokens": tokens, "temperature": 0.8, "seed": number,
        "stream": stream, **({"stream_options": {"include_usage": True}} if stream else {}),
    }).encode()  # fmt: skip
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
    begin = time.perf_counter()
    reader, writer = await asyncio.open_connection(host, port)
    writer.write(head.encode() + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    try:
        status = await reader.readline()
        await reader.readuntil(b"\r\n\r\n")
        if b" 200 " not in status:
            raise ValueError(f"the server answers {status.decode().strip()}: see its log")
        first, parts = 0.0, []
        while part := await reader.read(65536):
            first = first or time.perf_counter() - begin
            parts.append(part)
    finally:
        writer.close()
    made = b"".join(parts).rpartition(b'"completion_tokens":')[2]
    return RequestTiming(first, time.perf_counter() - begin, int(made[: made.index(b",")]))


def lines(result: dict[str, Any]) -> list[str]:
    """The result as a table for people."""
    out = ["{run}: answers of {tokens} tokens, {cores} cores, {seconds:g} s a cell".format(**result)]
    names = f"{'clients':>7} {'loop':<7}{'stream':<7}{'tokens/s':>9}{'x one':>7}"
    out.append(names + f"{'first ms':>10}{'95 %':>8}{'answer ms':>11}")
    for r in sorted(result["rows"], key=lambda r: (r["loop"], r["stream"], r["clients"])):
        out.append(
            f"{r['clients']:>7} {r['loop']:<7}{'yes' if r['stream'] else 'no':<7}{r['tokens_per_second']:>9.0f}"
            f"{r['ratio']:>7.2f}{r['first_ms']:>10.1f}{r['first_p95_ms']:>8.1f}{r['answer_ms']:>11.1f}"
        )
    return out
