"""Connections with limits: uvicorn's own HTTP protocol, which by itself lets a silent or endless client stay for ever.

A request's headers and body have a time and a size; connections are counted, in all and by peer. Where there are too
many, the one that has kept the server waiting longest makes room for the newest: who speaks at once is served.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from functools import partial
from typing import Any, NamedTuple, final

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEADER_BYTES = 16_384
"""Most bytes of a request's headers."""
FREE_PARTS, PART_BYTES = 256, 64
"""Parts that any body may come in, and bytes that each further one must bring on average: each holds the loop."""
GRACE = 1.0
"""Seconds that the application has to answer for a body that is late, before its connection is dropped."""
NO_HTTP = "this is not an HTTP request, its headers are too long, or its body is not what they say"
CLOSING_SECONDS = 10.0
"""How long a client may take to read the end of an answer."""


class ConnectionLimits(NamedTuple):
    """What connections may take."""

    total: int
    """Most of them."""
    per_peer: int
    """Most of them from one address."""
    header_seconds: float
    body_seconds: float
    request_bytes: int
    """Most bytes that a request may send; those beyond what the application takes are thrown away."""


@final
class OpenConnections:
    """The connections of a server."""

    def __init__(self, limits: ConnectionLimits):
        self.limits = limits
        self.dropped = 0
        """Connections that have had to make room, or have taken too long."""
        self._peers: dict[LimitedConnection, str] = {}
        self._count: Counter[str] = Counter()
        self._waiting: dict[LimitedConnection, None] = {}
        """Those whose request has not arrived in full, the longest waiting first."""

    def protocol(self) -> Any:
        """What uvicorn makes its connections with."""
        return partial(LimitedConnection, self)

    def __len__(self) -> int:
        return len(self._peers)

    def admit(self, new: LimitedConnection, peer: str) -> bool:
        """Take in a connection, if need be in another one's place; False where nobody can make room."""
        if self._count[peer] >= self.limits.per_peer:
            crowd = peer
        elif len(self._peers) >= self.limits.total:
            crowd = max((self._peers[c] for c in self._waiting), key=self._count.__getitem__, default="")
        else:
            crowd = None
        if crowd is not None:
            longest = next((c for c in self._waiting if self._peers[c] == crowd), None)
            if longest is None:
                return False
            self.drop(longest)
        self._peers[new] = peer
        self._count[peer] += 1
        return True

    def waits(self, connection: LimitedConnection) -> None:
        """The server waits for this one's next request, or for the rest of one."""
        if connection in self._peers:
            self._waiting.setdefault(connection)

    def served(self, connection: LimitedConnection) -> None:
        """Its request has arrived."""
        self._waiting.pop(connection, None)

    def forget(self, connection: LimitedConnection) -> None:
        """It counts no more."""
        peer = self._peers.pop(connection, None)
        self._waiting.pop(connection, None)
        if peer is not None:
            self._count[peer] -= 1
            if not self._count[peer]:
                del self._count[peer]

    def drop(self, connection: LimitedConnection) -> None:
        """End it without a word."""
        self.dropped += 1
        self.forget(connection)
        connection.transport.abort()

    def abort(self) -> None:
        """Drop all that are left."""
        for connection in list(self._peers):
            self.drop(connection)


@final
class CountedParts(h11.Connection):
    """HTTP as h11 reads it, but for bodies in very many very small parts."""

    _parts = _bytes = 0

    def next_event(self) -> Any:
        """The next event. h11.RemoteProtocolError: what has come is wrong, or comes in crumbs."""
        event = super().next_event()
        if isinstance(event, h11.Data):
            self._parts, self._bytes = self._parts + 1, self._bytes + len(event.data)
            if self._parts > FREE_PARTS + self._bytes // PART_BYTES:
                raise h11.RemoteProtocolError("the body comes in too many small parts")
        elif isinstance(event, h11.Request):
            self._parts = self._bytes = 0
            size = len(event.target) + sum(len(name) + len(value) + 4 for name, value in event.headers)
            if size > HEADER_BYTES:  # which h11 looks at only where they come in several pieces
                raise h11.RemoteProtocolError("the headers are too long")
        return event


@final
class LimitedConnection(H11Protocol):
    """One connection: uvicorn's, with times for headers and body. What is wrong with a request is not logged."""

    def __init__(self, everyone: OpenConnections, **options: Any):
        super().__init__(**options)
        self.conn = CountedParts(h11.SERVER, HEADER_BYTES)
        self._everyone, self._limits = everyone, everyone.limits
        self._timer: asyncio.TimerHandle | None = None
        self._phase = ""
        self._taken = 0
        """Bytes since the last request ended."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Count it, and wait for a request."""
        super().connection_made(transport)
        if not self._everyone.admit(self, self.client[0] if self.client else ""):
            transport.write(_plain(503, "too many connections; try again"))
            transport.close()
            return
        self._enter("headers")

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget it."""
        self._enter("")
        self._everyone.forget(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take in what has come, within limits."""
        self._taken += len(data)
        if self._taken > self._limits.request_bytes:
            self._everyone.drop(self)
            return
        if self.conn.their_state is h11.IDLE and not self.conn.trailing_data[0]:
            data = data.lstrip(b"\r\n")  # RFC 9112, section 2.2: old clients end a body with an empty line
            if not data:  # which the parser would take for the end
                return
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        """Wait for the rest of a request whose answer came early, or for the next one."""
        self._taken = 0
        super().on_response_complete()
        self._watch()

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP ends the connection; where the application is at work, it hears that its client is gone."""
        answering = self.cycle is not None and not self.cycle.response_complete
        if not (answering and self.cycle.response_started) and not self.transport.is_closing():
            self.transport.write(_plain(400, NO_HTTP))
        if answering:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self._close()

    def timeout_keep_alive_handler(self) -> None:
        """Nothing more has come: end an idle connection."""
        self._close()

    def shutdown(self) -> None:
        """The server ends: so does this connection, now or after its answer."""
        if self.cycle is None or self.cycle.response_complete:
            self._close()
        else:
            self.cycle.keep_alive = False

    def _close(self) -> None:
        self.transport.close()
        self._watch()

    def _watch(self) -> None:
        """Follow the request: headers, body, or all of it has arrived."""
        theirs = self.conn.their_state
        if self.transport.is_closing():  # which takes until the client has read what was sent
            self._enter("closing")
        elif theirs is h11.IDLE:
            self._enter("headers" if self.conn.trailing_data[0] or self._phase == "headers" else "idle")
        elif theirs is h11.SEND_BODY:
            self._enter("body")
        else:
            self._enter("answer")

    def _enter(self, phase: str) -> None:
        if phase == self._phase:
            return
        self._phase = phase
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        seconds = {
            "idle": float(self.timeout_keep_alive), "headers": self._limits.header_seconds,
            "body": self._limits.body_seconds + GRACE, "closing": CLOSING_SECONDS,
        }.get(phase)  # fmt: skip
        if seconds is None:
            self._everyone.served(self)
        else:
            self._everyone.waits(self)
            self._timer = self.loop.call_later(seconds, self._everyone.drop, self)


def _plain(status: int, message: str) -> bytes:
    """An answer outside HTTP's order of events, in the shape of the API's errors."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    body = f'{{"error":{{"message":"{message}","type":"{kind}","param":null,"code":null}}}}'
    return (
        f"HTTP/1.1 {status} {'Service Unavailable' if status == 503 else 'Bad Request'}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n{body}"
    ).encode()
