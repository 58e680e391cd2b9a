"""A crowd that leaves, hangs and sends nonsense: nobody else may notice, and the server comes to rest as it began."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import random
import time

import psutil
import pytest
from serving import Server, make_run

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
CLIENTS = 32
HEAD = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
NONSENSE = [
    b"garbage\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00",
    b"GET /v1/completions HTTP/9.9\r\n\r\n",
    (HEAD + "Content-Length: 9\r\n\r\nnot json!").encode(),
    (HEAD + 'Content-Length: 21\r\n\r\n{"prompt": [1, "two"]}').encode(),
    (HEAD + "Content-Length: 99999999\r\n\r\n").encode() + b" " * 1_200_000,
    (HEAD + 'Content-Length: 35\r\n\r\n{"prompt": "a", "max_tokens": 1e999}').encode(),
]


def bodies(count: int) -> list[dict]:
    return [
        {"prompt": f"{i} the quick brown fox " * (1 + 5 * (i % 4 == 0)), "max_tokens": 1 + i % 29, "seed": i,
         "temperature": (0.0, 1.0)[i % 2], "stream": i % 3 == 0}
        for i in range(count)
    ]  # fmt: skip


async def send(server: Server, data: bytes):
    reader, writer = await asyncio.open_connection(*server.address)
    writer.write(data)
    return reader, writer


async def closed(writer) -> None:
    """Drop a connection."""
    writer.transport.abort()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()


def request(body: dict) -> bytes:
    data = json.dumps(body).encode()
    return HEAD.encode() + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(data) + data


async def ask(server: Server, body: dict) -> tuple[int, str]:
    """Status and text of one whole answer."""
    reader, writer = await send(server, request(body))
    head, _, rest = (await reader.read()).partition(b"\r\n\r\n")
    await closed(writer)
    status = int(head.split()[1])
    if status != 200:
        return status, rest.decode()
    if not body["stream"]:
        return status, json.loads(rest)["choices"][0]["text"]
    chunks = [x for x in rest.decode().split("data: ") if x[:1] == "{"]  # between the sizes of a chunked body
    found = [json.JSONDecoder().raw_decode(x)[0]["choices"][0] for x in chunks]
    assert found[-1]["finish_reason"]
    assert "[DONE]" in rest.decode()
    return status, "".join(c["text"] for c in found)


async def misbehave(server: Server, chance: random.Random, hung: list) -> int | None:
    """Leave in the middle, hang, or send nonsense; the status of what is answered."""
    what = chance.choice(["leave", "hang", "stall", "nonsense", "nonsense"])
    if what == "nonsense":
        reader, writer = await send(server, chance.choice(NONSENSE))
        if not chance.randrange(2):
            writer.write_eof()
        try:
            line = await asyncio.wait_for(reader.readline(), 5)
        except (asyncio.TimeoutError, ConnectionError):
            line = b""
        await closed(writer)
        return int(line.split()[1]) if len(line.split()) > 1 else None
    body = {"prompt": "leave", "max_tokens": 200, "temperature": 1, "seed": 1, "stream": bool(chance.randrange(2))}
    data = request(body)
    reader, writer = await send(server, data[: len(data) // 2] if what == "stall" else data)
    if what == "leave":
        await asyncio.sleep(chance.random() * 0.05)
        await closed(writer)
    else:  # reads nothing, or sends nothing more
        hung.append(writer)
        if len(hung) > CLIENTS:
            await closed(hung.pop(0))
    return None


async def crowd(server: Server, asked: list[dict], seconds: float):
    """What every well-behaved request was answered, and the statuses that the others saw."""
    answers, statuses, hung = [], [], []
    end = time.monotonic() + seconds

    async def client(number: int) -> None:
        chance = random.Random(number)
        while time.monotonic() < end:
            if chance.random() < 0.35:
                statuses.append(await misbehave(server, chance, hung))
            else:
                i = chance.randrange(len(asked))
                answers.append((i, await ask(server, asked[i])))

    await asyncio.gather(*(client(n) for n in range(CLIENTS)))
    for writer in hung:
        await closed(writer)
    return answers, statuses


def memory() -> int:
    gc.collect()
    return psutil.Process().memory_info().rss


@pytest.mark.parametrize("seconds", [1, pytest.param(60, marks=pytest.mark.slow)])
def test_nobody_notices_those_who_leave_hang_and_send_nonsense(tmp_path, seconds):
    asked = bodies(24)
    with Server(make_run(tmp_path / "tiny"), queue=256, keep_mb=4, deadline=300) as server:
        alone = [asyncio.run(ask(server, body)) for body in asked]
        asyncio.run(crowd(server, asked, seconds / 5))  # what is kept and pooled has been taken by now
        server.wait_idle()
        before = memory()
        answers, statuses = asyncio.run(crowd(server, asked, seconds))
        server.wait_idle()
        after = memory()
        wrong = [(i, got, alone[i]) for i, got in answers if got != alone[i]]
        assert wrong == []
        assert answers
        assert all(status is None or 400 <= status < 500 for status in statuses), set(statuses)
        assert server.metric("lrt_rows_running") == server.metric("lrt_waiting") == 0
        assert server.metric("lrt_cancelled_total") > 0
        assert server.metric("lrt_kept_bytes") <= 4 * 2**20
        if seconds == 60:
            assert len(answers) > 75
            assert after - before < 40 * 2**20, f"{(after - before) / 2**20:.1f} MB more after {len(answers)} answers"
        print(f"{len(answers)} answers, {len(statuses)} misbehaving, memory {(after - before) / 2**20:+.1f} MB")
