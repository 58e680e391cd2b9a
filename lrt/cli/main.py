"""The command line: `lrt COMMAND ...`. Bad input ends with one line that names culprit and remedy, and exit code 2."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import io
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")


class Command(NamedTuple):
    """A command: where its function is, imported only when it runs, and its line in the overview."""

    where: str
    """`module:function`; it takes the arguments and returns the exit code."""
    text: str


COMMANDS = {
    "demo": Command("lrt.cli.commands:demo", "train a plain transformer and two LRTs on this machine, write a report"),
    "info": Command("lrt.cli.commands:info", "parameters, FLOPs of every schedule, cache bytes of a recipe"),
    "schedule": Command("lrt.cli.commands:schedule", "draw a schedule as text or SVG"),
    "tokenize": Command("lrt.cli.commands:tokenize", "turn a text source into token shards"),
    "train": Command("lrt.cli.commands:train", "train a recipe on your text, or resume a run"),
    "eval": Command("lrt.cli.commands:evaluate", "bits per byte of a run in every mode"),
    "sample": Command("lrt.cli.commands:sample", "continue a prompt, decoding with memory"),
    "chat": Command("lrt.cli.commands:chat", "talk to a model; its state is kept between turns"),
    "export": Command(
        "lrt.integrations.hf.export:main", "write a run for transformers, or as a Llama or Qwen checkpoint"
    ),
    "convert": Command("lrt.integrations.convert:main", "import a Llama or Qwen checkpoint, or add memory to a model"),
    "serve": Command("lrt.serve.command:main", "serve a model: an OpenAI-compatible API and a page"),
    "sweep": Command("lrt.experiments.sweep:main", "train a grid of recipe overrides and seeds, resumable"),
    "report": Command("lrt.experiments.report:main", "tables and pictures of recorded runs"),
    "core": Command("lrt.evaluation.core:main", "the CORE score of a run, with memory, from a local evaluation bundle"),
    "analyze": Command("lrt.evaluation.memory_analysis:main", "where a run's memory acts, and how far back it reaches"),
    "bench": Command("lrt.cli.commands:bench", "measure on this machine: bench train, decode, serve"),
    "plan": Command("lrt.benchmarks.plan:main", "memory, step time, communication and days of a recipe on a cluster"),
}


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
    rows = "\n".join(f"  {name:<10} {command.text}" for name, command in COMMANDS.items())
    return (
        "usage: lrt [--traceback] COMMAND ...\n\nThe Latent Recurrent Transformer: train it in parallel passes, "
        f"decode it exactly with memory.\n\n{rows}\n\nlrt COMMAND --help says more. lrt --version prints the version."
    )


def _run(name: str, args: list[str], show_traceback: bool) -> int:
    module, _, function = COMMANDS[name].where.partition(":")
    try:
        return getattr(importlib.import_module(module), function)(args)
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


def parse(what: Callable[..., T], args: list[str], command: str, **options: Any) -> T:
    """Read flags into a dataclass or function arguments with tyro; a wrong one becomes one line (ValueError)."""
    import tyro

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(what, args=args, prog=f"lrt {command}", **options)
    except SystemExit as end:
        if not end.code:
            raise
        raise ValueError(f"{_first_line(said.getvalue())}; see lrt {command} --help") from None


def _first_line(box: str) -> str:
    """The message in tyro's box, without title and frame (drawn or ASCII), plus the flag it suggests."""
    plain = [line.strip("│╭╮╰╯ ") for line in box.splitlines()[1:]]
    parts: list[list[str]] = [[]]
    for line in plain:
        if set(line) <= set("─- "):
            parts += [[]] if parts[-1] else []
        else:
            parts[-1].append(line)
    message = re.sub(r"^Error parsing [\w.]+: (?=\w+\.\w+ )", "", " ".join(parts[0]).strip().rstrip("."))
    near = [part[1].split()[0] for part in parts if len(part) > 1 and part[0].startswith("Perhaps you meant")]
    return message + (f"; did you mean {near[0]}?" if near else "")
