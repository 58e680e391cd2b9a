"""Throughput and time to first token of the server, against one request at a time.

The server is a process of its own, the clients are another one, both on loopback. Closed loop: every client asks again
as soon as it has its answer. Open loop: requests arrive at random (Poisson), at a share of the rate that the closed
loop reached, whether or not the server keeps up.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import multiprocessing
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median
from typing import IO, Any, NamedTuple

from lrt.config.benchmarks import LoadBenchmark
from lrt.utils.require import require

PROMPTS = (
    "def area(self, width, height):\n", "class Reader:\n    def __init__(self", "import os\nimport sys\n\n",
    "    for key, value in items", "# Return the", "try:\n    import", "    def test_", "    if not isinstance(",
)  # fmt: skip
DEADLINE = 3600
"""Seconds that an answer may take here: one that takes long is measured, not given up."""
ROW = ("shared", "prompt", "clients")
"""What rows are ordered by, after the loop."""


class Load(NamedTuple):
    """What a measurement asks of the server."""

    clients: int
    stream: bool = False
    rate: float | None = None
    """Requests per second of an open loop; None: the loop is closed."""
    prompt: int = 0
    """Tokens of each prompt; 0: the texts of `PROMPTS`."""
    shared: int = 0
    """Tokens that stand before each."""

    @property
    def loop(self) -> str:
        """closed or open."""
        return "closed" if self.rate is None else "open"

    def body(self, number: int, tokens: int, words: Sequence[int]) -> dict[str, Any]:
        """Request `number`, for `tokens` tokens; prompts of a length are parts of `words`, no two of the same."""
        prompt: Any = PROMPTS[number % len(PROMPTS)]
        if self.prompt:
            start = self.shared + number * 97 % (len(words) - self.shared - self.prompt)
            prompt = [*words[: self.shared], *words[start : start + self.prompt]]
        usage = {"stream_options": {"include_usage": True}} if self.stream else {}
        sampling = {"max_tokens": tokens, "temperature": 0.8, "seed": number}
        return {"prompt": prompt, "stream": self.stream} | sampling | usage


class RequestTiming(NamedTuple):
    """One request as its client saw it."""

    first: float
    """Seconds to the first part of the answer: of a stream its first token, else all of it."""
    total: float
    tokens: int


def measure(folder: Path, settings: LoadBenchmark) -> dict[str, Any]:
    """All cells; the result is plain data."""
    flags = ["--port", "0", "--rows", str(max(settings.clients)), "--keep-mb", str(settings.keep_mb)]
    flags += ["--deadline", str(DEADLINE)]
    words = _words(folder, settings)
    with (
        tempfile.TemporaryFile("w+", errors="replace") as log,
        subprocess.Popen(
            [sys.executable, "-m", "lrt", "serve", str(folder), *flags], stdout=subprocess.PIPE, stderr=log, text=True
        ) as server,
        ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool,
    ):
        try:
            host, port = _address(server, log)
            clients = Clients(host, port, settings.tokens, words)
            run = lambda load, seconds: pool.submit(_in_process, clients, load, seconds).result()  # noqa: E731
            run(Load(max(settings.clients)), min(3.0, settings.seconds))  # warm up
            rows = _rounds(settings, run)
        finally:
            server.terminate()
            sys.stderr.write(_rest(log))
    return {"run": str(folder), "tokens": settings.tokens, "seconds": settings.seconds, "rounds": settings.rounds,
            "load": settings.load, "keep_mb": settings.keep_mb, "cores": os.cpu_count(), "rows": rows}  # fmt: skip


def _address(server: subprocess.Popen[str], log: IO[str]) -> tuple[str, int]:
    """Where a server listens, once it does. ValueError: what it says instead, which is in its log no more."""
    assert server.stdout is not None
    announced = server.stdout.readline()
    if " at http://" not in announced:
        server.wait()
        *before, last = _rest(log).splitlines() or ["the server ended without a word"]
        sys.stderr.writelines(line + "\n" for line in before)
        raise ValueError(last.removeprefix("lrt serve: "))
    host, _, port = announced.strip().rpartition("//")[2].rpartition(":")
    return host, int(port)


def _rest(log: IO[str]) -> str:
    """What a server has written so far; it is taken out of the log."""
    log.seek(0)
    text = log.read()
    log.seek(0)
    log.truncate()
    return text


def _words(folder: Path, settings: LoadBenchmark) -> tuple[int, ...]:
    """Tokens of a text that every machine has, the manual of Python's help(). ValueError: prompts do not fit."""
    if not settings.prompts:
        return ()
    from pydoc_data.topics import topics

    from lrt.training.checkpoint import load_model

    loaded = load_model(folder)
    needed, context = max(settings.prompts) + max(settings.shared) + settings.tokens, loaded.config.model.context
    require(needed <= context, f"--prompts, --shared and --tokens come to {needed}; the context is {context} tokens")
    words = tuple(loaded.tokenizer.encode("\n".join(topics[name] for name in sorted(topics))))
    require(needed < len(words), f"--prompts and --shared come to {needed} tokens; the text here has {len(words)}")
    return words


def _rounds(settings: LoadBenchmark, run: Callable[[Load, float], dict[str, float]]) -> list[dict[str, Any]]:
    cells: dict[Load, list[dict[str, float]]] = {}
    long = [Load(c, True, None, n, s) for n in settings.prompts for s in settings.shared for c in settings.clients]
    short = [Load(c, stream) for stream in (False, True) for c in settings.clients]
    for _ in range(settings.rounds):
        for load in long or short:
            closed = run(load, settings.seconds)
            cells.setdefault(load, []).append(closed)
            if not long:
                rate = settings.load * closed["tokens_per_second"] / settings.tokens
                again = run(load._replace(rate=rate), settings.seconds)
                cells.setdefault(load._replace(rate=-1.0), []).append(again)
    rows = []
    for load, rounds in cells.items():
        base = cells[load._replace(clients=settings.clients[0], rate=None)]
        ratios = [f["tokens_per_second"] / b["tokens_per_second"] for f, b in zip(rounds, base, strict=True)]
        figures = {key: median(f[key] for f in rounds) for key in rounds[0]}
        about = {"clients": load.clients, "stream": load.stream, "loop": load.loop, "ratio": median(ratios)}
        rows.append(about | ({"prompt": load.prompt, "shared": load.shared} if long else {}) | figures)
    return rows


class Clients(NamedTuple):
    """Who asks, and for what."""

    host: str
    port: int
    tokens: int
    """Of every answer."""
    words: Sequence[int] = ()
    """What prompts of a length are made of."""


def _in_process(clients: Clients, load: Load, seconds: float) -> dict[str, float]:
    """One measurement, in the clients' process. Requests under way at the end count with the tokens they have made."""
    return asyncio.run(_measure(clients, load, seconds))


async def _measure(clients: Clients, load: Load, seconds: float) -> dict[str, float]:
    done: list[RequestTiming] = []
    begin, chance, numbers = time.perf_counter(), random.Random(0), itertools.count(1)

    def one() -> Coroutine[Any, Any, RequestTiming]:
        return ask(clients.host, clients.port, load.body(next(numbers), clients.tokens, clients.words))

    async def client() -> None:
        while time.perf_counter() - begin < seconds:
            done.append(await one())

    async def arrivals(rate: float) -> None:
        under_way = set()
        while time.perf_counter() - begin < seconds:
            await asyncio.sleep(chance.expovariate(rate))
            under_way.add(asyncio.create_task(one()))
        done.extend(await asyncio.gather(*under_way))

    closed = asyncio.gather(*(client() for _ in range(load.clients))) if load.rate is None else None
    await (arrivals(load.rate or 1.0) if closed is None else closed)
    took, firsts = time.perf_counter() - begin, sorted(t.first for t in done)
    return {
        "tokens_per_second": sum(t.tokens for t in done) / took, "requests": len(done), "seconds": took,
        "first_ms": 1e3 * median(firsts), "first_p95_ms": 1e3 * firsts[int(0.95 * len(firsts))],
        "answer_ms": 1e3 * median(t.total for t in done),
    }  # fmt: skip


async def ask(host: str, port: int, fields: dict[str, Any]) -> RequestTiming:
    """One request over a connection of its own; the leanest client there is, since it shares the machine."""
    body = json.dumps(fields).encode()
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
    long = any("prompt" in row for row in result["rows"])
    names = f"{'clients':>7} {'loop':<7}{'stream':<7}" + (f"{'prompt':>7}{'shared':>7}" if long else "")
    out.append(names + f"{'tokens/s':>9}{'x one':>7}{'first ms':>10}{'95 %':>8}{'answer ms':>11}")
    for r in sorted(result["rows"], key=lambda r: (r["loop"], r["stream"], *(r[k] for k in ROW if k in r))):
        out.append(
            f"{r['clients']:>7} {r['loop']:<7}{'yes' if r['stream'] else 'no':<7}"
            + (f"{r['prompt']:>7}{r['shared']:>7}" if long else "")
            + f"{r['tokens_per_second']:>9.0f}{r['ratio']:>7.2f}{r['first_ms']:>10.1f}{r['first_p95_ms']:>8.1f}"
            + f"{r['answer_ms']:>11.1f}"
        )
    return out
