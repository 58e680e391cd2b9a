"""The server's process: the application behind limited connections, and an end that leaves nobody without a word."""

from __future__ import annotations

import asyncio
import gc
import resource
import socket
from typing import final

import uvicorn

from lrt.serve.api import create_app
from lrt.serve.connections import HEADER_BYTES, ConnectionLimits, OpenConnections
from lrt.serve.keys import ApiKeys, HostNames
from lrt.serve.served import Served

OTHER_FILES = 128
"""Descriptors that are kept for other things than connections."""
LAST_WORDS = 2.0
"""Seconds between telling clients that the server ends and ending."""


@final
class DrainingServer(uvicorn.Server):
    """uvicorn's, whose end comes in steps: no new connections; then what runs is told; then what is left is dropped."""

    def __init__(self, served: Served, keys: ApiKeys, hosts: HostNames, drain: float):
        """`drain` is the number of seconds that what runs has left once the end begins."""
        limits = served.settings
        most = min(limits.connections, _descriptors() - OTHER_FILES)
        self.served, self.drain = served, drain
        self.open = OpenConnections(
            ConnectionLimits(
                most, min(limits.connections_per_peer, most), limits.header_seconds, limits.body_seconds,
                2 * limits.max_body + 2**20,
            )
        )  # fmt: skip
        config = uvicorn.Config(
            create_app(served, keys, hosts), http=self.open.protocol(), h11_max_incomplete_event_size=HEADER_BYTES,
            log_level="error", access_log=False, server_header=False, ws="none", lifespan="on",
            timeout_graceful_shutdown=int(drain + LAST_WORDS) + 10,
        )  # fmt: skip
        super().__init__(config)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End, in steps."""
        loop = asyncio.get_running_loop()
        steps = [(self.drain, self._tell), (self.drain + LAST_WORDS, self.open.abort)]
        timers = [loop.call_later(seconds, step) for seconds, step in steps]
        try:
            await super().shutdown(sockets)
        finally:
            for timer in timers:
                timer.cancel()

    def _tell(self) -> None:
        """Answer what runs and what arrives that the server ends."""
        self.served.engine.abort()
        self.served.intake.close()


def run(server: DrainingServer, listener: socket.socket) -> None:
    """Serve until a signal ends it."""
    gc.collect()
    gc.freeze()  # what there is now stays: the collector need not look at it while requests wait
    server.run(sockets=[listener])


def _descriptors() -> int:
    """Most files that this process may open, raised as far as it may be."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = min(hard, max(soft, 65_536)) if hard != resource.RLIM_INFINITY else max(soft, 65_536)
    if wanted > soft:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        except (ValueError, OSError):
            wanted = soft
    return wanted
