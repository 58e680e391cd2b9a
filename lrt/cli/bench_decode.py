"""`lrt bench decode`: what memory costs per decoded token, and what prefill by sweeps saves."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated

import tyro

from lrt.cli.parse import parse
from lrt.config.benchmarks import DecodingBenchmark


@dataclass(frozen=True)
class BenchDecodeFlags:
    """Latency per token against the same backbone without memory; prefill and scoring against token by token."""

    settings: Annotated[DecodingBenchmark, tyro.conf.arg(name="")] = field(default_factory=DecodingBenchmark)
    json: bool = False
    """End with one JSON object."""


FLAGS = BenchDecodeFlags


def main(args: list[str]) -> int:
    """Run the command; returns the exit code."""
    flags = parse(BenchDecodeFlags, args, "bench decode")

    from lrt.benchmarks.latency import run

    result = run(flags.settings, partial(print, flush=True))
    if flags.json:
        print(json.dumps(result))
    return 0
