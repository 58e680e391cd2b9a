"""A small model in a run folder, and a real server for it on a free loopback port."""

from __future__ import annotations

import contextlib
import itertools
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import httpx
import torch

from lrt.config.decoding import NEXT, SamplingParams, Weights
from lrt.config.model import MemoryConfig, ModelConfig
from lrt.config.run import RunConfig, TrainConfig
from lrt.data.tokenizer import Tokenizer, train_bpe
from lrt.inference.generate import generate
from lrt.inference.weights import with_weights
from lrt.model.lrt import LRT
from lrt.serve.keys import ApiKeys, HostNames
from lrt.serve.served import Served
from lrt.serve.server import DrainingServer
from lrt.serve.settings import Settings
from lrt.training import checkpoint

WORDS = "def area(self, width, height):\n    return width * height\n# the quick brown fox jumps over the lazy dog é\n"


def make_run(folder: Path, context: int = 256, tokenizer: Tokenizer | None = None, **memory) -> Path:
    """A run of a random model whose memory matters and whose sweeps settle; nothing is trained."""
    tokenizer = tokenizer or train_bpe([WORDS * 20], 300)
    model = ModelConfig(
        depth=2, width=32, heads=2, context=context, vocab_size=tokenizer.vocab_size, bos=tokenizer.bos,
        memory=MemoryConfig(**memory),
    )  # fmt: skip
    config = RunConfig(name="tiny", model=model, train=TrainConfig(length=32, schedule="settled-1..3"))
    lrt, random = LRT(model, seed=1), torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, p in lrt.named_parameters():
            if p.ndim == 2 and "embedding" not in name:
                p.normal_(0, 0.7 / p.shape[1] ** 0.5 * (6 if "head" in name else 1), generator=random)
    tokenizer.save(folder / "tokenizer")
    checkpoint.save(folder, 1, config, lrt, {}, extra={}, keep=1)
    return folder


class Server:
    """A server in a thread of this process."""

    def __init__(
        self, run: Path, *api_keys: str, hosts: tuple[str, ...] = (), drain: float = 30, device: str = "cpu",
        weights: Weights = "full", **settings,
    ):  # fmt: skip
        self.loaded = checkpoint.load_model(run, device)
        with_weights(self.loaded.model, weights)
        self.served = Served(self.loaded, replace(Settings(), **settings))
        self.served.intake.seconds = 240.0  # a busy machine takes its time
        names = HostNames("127.0.0.1", hosts)
        self.server = DrainingServer(self.served, ApiKeys(api_keys), names, drain)
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self.thread = threading.Thread(target=self.server.run, args=([self.listener],), daemon=True)

    def __enter__(self) -> Server:
        self.thread.start()
        end = time.monotonic() + 240
        while not self.server.started:
            assert time.monotonic() < end and self.thread.is_alive(), "the server did not start"
            time.sleep(0.01)
        host, port = self.listener.getsockname()[:2]
        self.address, self.url = (host, port), f"http://{host}:{port}"
        return self

    def __exit__(self, *_: object) -> None:
        self.server.should_exit = True
        self.thread.join(240)
        assert not self.thread.is_alive()

    def metric(self, name: str) -> float:
        """One of the server's counters."""
        counted = self.served.metrics
        value = counted.registry.get_sample_value(name)
        value = counted.private.get_sample_value(name) if value is None else value
        assert value is not None, name
        return value

    def hold(self, until: threading.Event, after: int = 0) -> None:
        """Every forward but the first `after` waits for this event."""
        begun = itertools.count()

        def wait(*_: object) -> None:
            if next(begun) >= after:
                until.wait(240)

        self.loaded.model.blocks[0].register_forward_pre_hook(wait)

    def wait_idle(self, seconds: float = 240) -> None:
        """Wait until nothing runs or waits."""
        end = time.monotonic() + seconds
        while not self.served.engine.idle:
            assert time.monotonic() < end, "the server does not come to rest"
            time.sleep(0.01)


class Process(NamedTuple):
    """A server in a process of its own."""

    popen: subprocess.Popen
    url: str
    log: Path

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.url.removeprefix("http://").partition(":")
        return host, int(port)


@contextlib.contextmanager
def started(run: Path, log: Path, *flags: str) -> Iterator[Process]:
    """`lrt serve` with these flags, once it has said its address."""
    command = [sys.executable, "-m", "lrt", "serve", str(run), "--port", "0", "--threads", "1", *flags]
    with (
        log.open("w") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process,
    ):
        try:
            assert process.stdout is not None
            yield Process(process, process.stdout.readline().strip().partition(" at ")[2], log)
        finally:
            process.kill()


def post(server: Server, path: str, body, **options) -> httpx.Response:
    return httpx.post(server.url + path, json=body, timeout=60, **options)


def opened(server: Server, text: str) -> list[int]:
    """The tokens of a document that begins with `text`."""
    return [server.loaded.tokenizer.bos, *server.loaded.tokenizer.encode(text)]


def spelled(server: Server, prompt: list[int]) -> str:
    """The eight most probable tokens behind a prompt, decoded by the package itself."""
    law = SamplingParams(max_new_tokens=8, temperature=0, stop=(NEXT,))
    decode = server.loaded.tokenizer.decode_bytes
    steps = generate(server.loaded.model, [prompt], law, mode="exact", decode_bytes=decode)
    return "".join(e.text for step in steps for e in step.emissions)


def raw(server: Server, data: bytes, seconds: float = 60) -> bytes:
    """All that the server answers to these bytes."""
    with socket.create_connection(server.address, timeout=seconds) as s:
        s.sendall(data)
        s.shutdown(socket.SHUT_WR) if data.startswith(b"GET") else None
        parts = []
        with contextlib.suppress(ConnectionError):
            while part := s.recv(65536):
                parts.append(part)
                if b"\r\n\r\n" in b"".join(parts):
                    break
    return b"".join(parts)
