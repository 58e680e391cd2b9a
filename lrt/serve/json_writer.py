"""JSON of answers, written so that the event loop goes on: large ones in a thread of their own, and in pieces.

The encoder holds the interpreter until it is done. So it never gets more than a small part of an answer at a time.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, final

LARGE = 2000
"""Values from which an answer is written in the thread."""
TOGETHER = 1000
"""Values of a list that the encoder gets at a time."""


def json_bytes(value: Any) -> bytes:
    """Plain data as JSON in ASCII, which no reader splits into other lines. ValueError: a number is not finite."""
    return "".join(_pieces(value)).encode()


def event_bytes(value: Any) -> bytes:
    """Plain data as a server-sent event."""
    return b"data: " + json_bytes(value) + b"\n\n"


def _pieces(value: Any) -> Iterator[str]:
    """The text in pieces of which none takes long."""
    if isinstance(value, dict):
        if not any(isinstance(part, (dict, list)) for part in value.values()):
            yield _dumped(value)
            return
        for i, (name, part) in enumerate(value.items()):
            yield ("," if i else "{") + json.dumps(name) + ":"
            yield from _pieces(part)
        yield "}"
    elif isinstance(value, list) and value:
        nested = any(isinstance(part, (dict, list)) for part in value)
        groups = value if nested else [value[i : i + TOGETHER] for i in range(0, len(value), TOGETHER)]
        for i, group in enumerate(groups):
            yield "," if i else "["
            if nested:
                yield from _pieces(group)
            else:
                yield _dumped(group)[1:-1]
        yield "]"
    else:
        yield _dumped(value)


def _dumped(value: Any) -> str:
    return json.dumps(value, allow_nan=False, separators=(",", ":"))


@final
class AnswerWriter:
    """Writes a server's answers."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="lrt-answers")

    async def write(self, make: Callable[[], Any], values: int, form: Callable[[Any], bytes] = json_bytes) -> bytes:
        """What `make` gives, which has about so many values; large answers are made and written in the thread."""
        if values <= LARGE:
            return form(make())
        return await asyncio.get_running_loop().run_in_executor(self._thread, lambda: form(make()))

    def end(self) -> None:
        """End the thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)
