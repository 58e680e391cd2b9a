"""The command line: `lrt COMMAND ...`. Bad input ends with one line that names culprit and remedy, and exit code 2."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Sequence

COMMANDS = {
    "demo": "train a plain transformer and two LRTs on this machine, write a report",
    "info": "parameters, FLOPs of every schedule, cache bytes of a recipe",
    "schedule": "draw a schedule as text or SVG",
    "tokenize": "turn a text source into token shards",
    "train": "train a recipe on your text, or resume a run",
    "eval": "bits per byte of a run in every mode",
    "sample": "continue a prompt, decoding with memory",
    "chat": "talk to a model; its state is kept between turns",
    "export": "write a run for transformers, or as a Llama or Qwen checkpoint",
    "convert": "import a Llama or Qwen checkpoint, or add memory to a model",
    "serve": "serve a model: an OpenAI-compatible API and a page",
    "sweep": "train a grid of recipe overrides and seeds, resumable",
    "report": "tables and pictures of recorded runs",
    "core": "the CORE score of a run, with memory, from a local evaluation bundle",
    "analyze": "where a run's memory acts, and how far back it reaches",
    "bench": "measure on this machine: bench train, decode, serve",
    "plan": "memory, step time, communication and days of a recipe on a cluster",
}
"""Each command and its line in the overview; the module of its name in this folder is imported only when it runs."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    args = list(sys.argv[1:] if argv is None else argv)
    show_traceback = "--traceback" in args[:1]
    args = args[show_traceback:]
    if not args or args[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    if args[0] == "--version":
        from lrt import __version__

        print(f"lrt {__version__}")
        return 0
    name = args[0]
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(COMMANDS)}"
        print(f"lrt: unknown command {name!r}; {hint}", file=sys.stderr)
        return 2
    return _run(name, args[1:], show_traceback)


def overview() -> str:
    """What `lrt --help` prints."""
    rows = "\n".join(f"  {name:<10} {text}" for name, text in COMMANDS.items())
    return (
        "usage: lrt [--traceback] COMMAND ...\n\nThe Latent Recurrent Transformer: train it in parallel passes, "
        f"decode it exactly with memory.\n\n{rows}\n\nlrt COMMAND --help says more. lrt --version prints the version."
    )


def _run(name: str, args: list[str], show_traceback: bool) -> int:
    try:
        return importlib.import_module(f"lrt.cli.{name}").main(args)
    except BrokenPipeError:  # the reader of our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print(f"lrt {name}: interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        if show_traceback:
            raise
        print(f"lrt {name}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
