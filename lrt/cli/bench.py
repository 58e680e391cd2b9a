"""`lrt bench`: measurements on this machine."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import tyro
from tyro.conf import Positional

from lrt.cli.parse import parse
from lrt.config.benchmarks import DecodingBenchmark, LoadBenchmark, StepBenchmark
from lrt.utils.require import require
from lrt.utils.terminal import show

KINDS = {
    "train": "a training step of every schedule against the plain transformer's",
    "decode": "milliseconds per token, with memory and without; prefill; scoring",
    "serve": "tokens per second and time to the first token, by number of clients",
}


@dataclass(frozen=True)
class BenchTrainFlags:
    """Time training steps of every schedule against the plain transformer's."""

    settings: Annotated[StepBenchmark, tyro.conf.arg(name="")] = field(default_factory=StepBenchmark)
    json: bool = False
    """End with one JSON object on a line of its own."""

    def measure(self) -> dict[str, Any]:
        """Measure and show it."""
        from lrt.benchmarks.training_step import lines, measure

        result = measure(self.settings)
        show("\n".join(lines(result)))
        return result


@dataclass(frozen=True)
class BenchDecodeFlags:
    """Latency per token against the same backbone without memory; prefill and scoring against token by token."""

    settings: Annotated[DecodingBenchmark, tyro.conf.arg(name="")] = field(default_factory=DecodingBenchmark)
    json: bool = False
    """End with one JSON object."""

    def measure(self) -> dict[str, Any]:
        """Measure and show it, line by line."""
        from lrt.benchmarks.latency import run

        return run(self.settings, partial(print, flush=True))


@dataclass(frozen=True)
class BenchServeFlags:
    """Measure a served model: tokens per second, and time to the first token, by number of clients."""

    run: Positional[Path]
    """Run folder of the model to serve."""
    settings: Annotated[LoadBenchmark, tyro.conf.arg(name="")] = field(default_factory=LoadBenchmark)
    json: bool = False
    """End with one JSON object."""

    def measure(self) -> dict[str, Any]:
        """Measure and show it."""
        from lrt.benchmarks.server_load import lines, measure

        result = measure(self.run, self.settings)
        show("\n".join(lines(result)))
        return result


FLAGS = {"train": BenchTrainFlags, "decode": BenchDecodeFlags, "serve": BenchServeFlags}


def main(args: list[str]) -> int:
    """Run the command; returns the exit code."""
    if args[:1] in (["-h"], ["--help"], ["--help-all"]):
        rows = "\n".join(f"  {kind:<8} {text}" for kind, text in KINDS.items())
        show(f"usage: lrt bench KIND ...\n\nMeasure on this machine.\n\n{rows}\n\nlrt help bench KIND says more.")
        return 0
    require(args[:1] != [], f"say what to measure: {', '.join(KINDS)}, such as lrt bench train")
    require(args[0] in KINDS, f"there is no {args[0]!r} to measure; choose one of {', '.join(KINDS)}")
    flags = parse(FLAGS[args[0]], args[1:], f"bench {args[0]}")
    result = flags.measure()
    if flags.json:
        print(json.dumps(result))
    return 0
