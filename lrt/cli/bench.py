"""`lrt bench`: measurements on this machine."""

from __future__ import annotations

import importlib

from lrt.config.model import require

KINDS = ("train", "decode", "serve")


def main(args: list[str]) -> int:
    """Run the command; returns the exit code."""
    require(args[:1] != [] and args[0] in KINDS, f"bench {' '.join(args[:1])}: choose one of {', '.join(KINDS)}")
    return importlib.import_module(f"lrt.cli.bench_{args[0]}").main(args[1:])
