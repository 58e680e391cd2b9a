"""`lrt bench train`: the cost of a training step of every schedule."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Annotated

import tyro

from lrt.cli.parse import parse
from lrt.config.benchmarks import StepBenchmark
from lrt.utils.terminal import show


@dataclass(frozen=True)
class BenchTrainFlags:
    """Time training steps of every schedule against the plain transformer's."""

    settings: Annotated[StepBenchmark, tyro.conf.arg(name="")] = field(default_factory=StepBenchmark)
    json: bool = False
    """End with one JSON object on a line of its own."""


FLAGS = BenchTrainFlags


def main(args: list[str]) -> int:
    """Run the command; returns the exit code."""
    flags = parse(BenchTrainFlags, args, "bench train")

    from lrt.benchmarks.training_step import lines, measure

    result = measure(flags.settings)
    show("\n".join(lines(result)))
    if flags.json:
        print(json.dumps(result))
    return 0
