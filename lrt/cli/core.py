"""`lrt core`: `lrt eval --suite core` in fewer words."""

from __future__ import annotations

from lrt.cli import eval as evaluation

FLAGS = evaluation.EvalFlags


def main(args: list[str]) -> int:
    """Run the command; returns the exit code."""
    return evaluation.main([*args, "--suite", "core"], "core")
