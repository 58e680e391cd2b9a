"""`lrt demo`: four arms trained here and now, and compared."""

from __future__ import annotations

from lrt.cli.parse import parse
from lrt.config.experiments import DemoConfig
from lrt.utils.terminal import show

FLAGS = DemoConfig


def main(args: list[str]) -> int:
    """Run the command; returns the exit code."""
    flags = parse(DemoConfig, args, "demo")

    from lrt.experiments.demo import run_demo

    show(run_demo(flags))
    return 0
