"""`lrt bench serve`: throughput of the server."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional

from lrt.benchmarks.server_load import LoadBenchmark, lines, measure
from lrt.cli.parse import parse
from lrt.utils.terminal import show


@dataclass(frozen=True)
class BenchServeFlags:
    """Measure a served model: tokens per second, and time to the first token, by number of clients."""

    run: Positional[Path]
    """Run folder of the model to serve."""
    settings: Annotated[LoadBenchmark, tyro.conf.arg(name="")] = field(default_factory=LoadBenchmark)
    json: bool = False
    """End with one JSON object."""


FLAGS = BenchServeFlags


def main(args: list[str]) -> int:
    """Run the command; returns the exit code."""
    flags = parse(BenchServeFlags, args, "bench serve")
    result = measure(flags.run, flags.settings)
    show("\n".join(lines(result)))
    if flags.json:
        print(json.dumps(result))
    return 0
