"""`lrt serve`: load a model, open a port, answer until told to stop."""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from lrt.cli.parse import parse
from lrt.config.decoding import Weights
from lrt.config.run import Device
from lrt.serve.settings import Settings
from lrt.utils.require import require, require_at_least

SWITCH_INTERVAL = 5e-4
"""Seconds a thread may hold the interpreter while the other waits: the step must not wait 5 ms for the web side."""


@dataclass(frozen=True)
class ServeFlags:
    """Serve a model: OpenAI-compatible API, a page to write and inspect at /, Prometheus metrics (docs/serving.md)."""

    run: tyro.conf.Positional[Path]
    """Run folder, or one of its checkpoints."""
    host: str = "127.0.0.1"
    """Address to listen at; by default only this machine can connect."""
    port: int = 8000
    """Port; 0 takes any free one."""
    name: str | None = None
    """Name of the model in the API; by default the run's."""
    api_key: tuple[str, ...] = ()
    """Ask for one of these keys as a bearer token; LRT_API_KEY (keys apart by spaces) does the same, unseen by `ps`."""
    allowed_host: tuple[str, ...] = ()
    """Names that browsers may call the server by, beside those of this machine and --host; * allows all."""
    drain: float = 30.0
    """Seconds that running answers have left after SIGTERM."""
    threads: int | None = None
    """Threads of a step; by default one core less than there are, which is the web side's."""
    weights: Weights = "full"
    """Large matrices as they are, or in 8 bits: faster steps; docs/decoding.md says what it costs."""
    compile: bool = False
    """Compile the step; it takes a minute or so, once."""
    device: Device = "auto"
    """cpu, cuda, mps (untested) or auto."""
    settings: Annotated[Settings, tyro.conf.arg(name="")] = field(default_factory=Settings)


FLAGS = ServeFlags


def main(args: list[str]) -> int:
    """Run the server until SIGINT or SIGTERM."""
    flags = parse(ServeFlags, args, "serve")
    require(0 <= flags.drain < 86_400, f"--drain is {flags.drain}; give at least 0 seconds, at most a day")
    require_at_least(1, threads=flags.threads)
    require(bool(flags.host.strip()), "--host is empty, which would listen at every address; write 0.0.0.0 for that")
    require(0 <= flags.port < 2**16, f"--port is {flags.port}; give 0 to 65535")
    keys = _keys(flags.api_key)
    try:
        from lrt.serve.keys import ApiKeys, HostNames
        from lrt.serve.served import Served
        from lrt.serve.server import DrainingServer, run
    except ModuleNotFoundError as error:
        raise ValueError(f"{error.name} is not installed; install latent-recurrent-transformer[serve]") from None
    import torch

    from lrt.inference.prefill import compiled, next_logits
    from lrt.inference.weights import with_weights
    from lrt.training.checkpoint import load_model
    from lrt.utils.hardware import resolve_device

    api_keys = ApiKeys(keys)
    torch.set_num_threads(flags.threads or max(1, (os.cpu_count() or 2) - 1))
    sys.setswitchinterval(SWITCH_INTERVAL)
    loaded = load_model(flags.run, resolve_device(flags.device))
    with_weights(loaded.model, flags.weights)
    served = Served(loaded, flags.settings, flags.name, compiled() if flags.compile else next_logits)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    with _listen(flags.host, flags.port) as listener:
        host, port = listener.getsockname()[:2]
        print(f"{served.name} at http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
        run(DrainingServer(served, api_keys, HostNames(flags.host, flags.allowed_host), flags.drain), listener)
    return 0


def _keys(flags: Sequence[str]) -> list[str]:
    """The keys of the command line and of LRT_API_KEY. ValueError: the variable is set, and empty."""
    variable = os.environ.get("LRT_API_KEY")
    require(variable is None or bool(variable.split()), "LRT_API_KEY is empty; give a key, or unset it")
    return [*flags, *(variable or "").split()]


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        raise ValueError(f"cannot listen at {host} port {port} ({error.strerror}): choose another --port") from None
