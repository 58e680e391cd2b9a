"""`lrt bench`: measurements on this machine."""

from __future__ import annotations

import importlib

from lrt.config.model import require
from lrt.utils.terminal import show

KINDS = {
    "train": "a training step of every schedule against the plain transformer's",
    "decode": "milliseconds per token, with memory and without; prefill; scoring",
    "serve": "tokens per second and time to the first token, by number of clients",
}


def main(args: list[str]) -> int:
    """Run the command; returns the exit code."""
    if args[:1] in (["-h"], ["--help"], ["--help-all"]):
        rows = "\n".join(f"  {kind:<8} {text}" for kind, text in KINDS.items())
        show(f"usage: lrt bench KIND ...\n\nMeasure on this machine.\n\n{rows}\n\nlrt help bench KIND says more.")
        return 0
    require(args[:1] != [], f"say what to measure: {', '.join(KINDS)}, such as lrt bench train")
    require(args[0] in KINDS, f"there is no {args[0]!r} to measure; choose one of {', '.join(KINDS)}")
    return importlib.import_module(f"lrt.cli.bench_{args[0]}").main(args[1:])
