"""`lrt demo`: three arms trained here and now, and compared."""

from __future__ import annotations

from lrt.cli.parse import parse


def main(args: list[str]) -> int:
    """Run the command; returns the exit code."""
    from lrt.experiments.demo import Demo, run_demo

    print(run_demo(parse(Demo, args, "demo")))
    return 0
