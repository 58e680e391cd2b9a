"""The command line: `lrt COMMAND ...`. Bad input ends with one line that names culprit and remedy, and exit code 2."""

from __future__ import annotations

import difflib
import importlib
import io
import os
import sys
from collections.abc import Callable, Sequence

COMMANDS = {
    "demo": "train four small models on this machine, compare them in a report",
    "info": "parameters, FLOPs and cache bytes of a recipe or a run",
    "schedule": "draw a schedule as text or as a picture",
    "tokenize": "turn a text source into token shards",
    "train": "train a recipe on your text, or resume a run",
    "eval": "score a run: bits per byte, or a suite (core, blimp, parity, ..)",
    "sample": "continue a prompt, decoding with memory",
    "chat": "talk to a model; its state is kept between turns",
    "export": "write a run for transformers, or as a Llama or Qwen checkpoint",
    "convert": "import a Llama or Qwen checkpoint, or add memory to a model",
    "serve": "serve a model: an OpenAI-compatible API and a page",
    "sweep": "train a grid of recipe overrides and seeds, resumable",
    "report": "tables and pictures of recorded runs",
    "core": "the CORE score of a run: eval --suite core in fewer words",
    "analyze": "where a run's memory acts, and how far back it reaches",
    "bench": "measure on this machine: bench train, decode, serve",
    "plan": "memory, step time and days of a recipe on a cluster",
    "completion": "completion of commands and flags for bash, zsh or fish",
}
"""Each command and its line in the overview; the module of its name in this folder is imported only when it runs."""
HELP = ("-h", "--help", "help")
NO_MEMORY = (
    "out of memory", "allocate memory", "not enough memory", "Storage size calculation overflowed", "bad_alloc",
    "failed to map segment",
)  # fmt: skip
"""What torch says where there is none, on any device, and the system of a library that does not fit."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. SystemExit(0): its help was printed."""
    args = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):  # what they cannot spell becomes a question mark, not a traceback
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    show_traceback = "--traceback" in args[:1]
    args = args[show_traceback:]
    if args[1:] and args[0] in HELP:
        args = [*args[1:], "--help"]
    name = args[0] if args else "--help"
    if name in HELP:
        return _run("lrt", lambda: _print(overview()), show_traceback)
    if name == "--version":
        return _run("lrt", lambda: _print(f"lrt {importlib.import_module('lrt').__version__}"), show_traceback)
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, (*COMMANDS, "--help", "--version"), 1)
        hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(COMMANDS)}"
        return _fail("lrt", f"unknown command {name!r}; {hint}")
    if not _has_folder():
        return _fail(f"lrt {name}", "the current folder was removed; change to one that is there")
    return _run(f"lrt {name}", lambda: _command(name, args[1:]), show_traceback)


def _command(name: str, args: list[str]) -> int:
    from lrt.utils.told_once import each_told_once

    with each_told_once("lrt.data.sources"):
        return importlib.import_module(f"lrt.cli.{name}").main(args)


def _has_folder() -> bool:
    """Whether the current folder is there: without it libraries fail in ways of their own."""
    try:
        os.getcwd()
    except OSError:
        return False
    return True


def overview() -> str:
    """What `lrt --help` prints."""
    rows = "\n".join(f"  {name:<10} {text}" for name, text in COMMANDS.items())
    return (
        "usage: lrt [--traceback] COMMAND ...\n"
        f"Train, measure and serve language models that hand a memory from token to token.\n\n{rows}\n\n"
        "lrt help COMMAND says more. lrt --version prints the version."
    )


def _print(text: str) -> int:
    from lrt.utils.terminal import show

    show(text)
    return 0


def _run(label: str, work: Callable[[], int], show_traceback: bool) -> int:
    """The exit code of `work`, or of what ended it, told in one line."""
    try:
        code = work()
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader of our output has gone
        _discard_output()
        return 0
    except KeyboardInterrupt:
        return _fail(label, "interrupted", 130)
    except (ValueError, OSError, MemoryError, RuntimeError, ImportError) as error:
        if show_traceback or (isinstance(error, RuntimeError | ImportError) and not _is_of_memory(error)):
            raise
        return _fail(label, _reason(error))


def _is_of_memory(error: Exception) -> bool:
    """Whether an error says that there is not enough memory, as Python or torch does on any device."""
    return isinstance(error, MemoryError) or any(part in str(error) for part in NO_MEMORY)


def _reason(error: Exception) -> object:
    """What the system says of a file, with the file first and a remedy; of other errors, the error."""
    if isinstance(error, ImportError):
        return "not enough memory to load what it needs; raise the limit of this shell (ulimit -v) to 2 GB or more"
    if isinstance(error, (MemoryError, RuntimeError)):
        return "not enough memory; use fewer rows, a shorter length, or a smaller model"
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}; choose another path, or mend what is there"
    if isinstance(error, OSError) and error.strerror:  # the system names no file where a write fails
        return f"something could not be written ({error.strerror}); free space, or write elsewhere"
    return error


def _fail(label: str, error: object, code: int = 2) -> int:
    """Print one line of at most 300 printable characters, whatever the error quotes."""
    from lrt.utils.files import one_line
    from lrt.utils.terminal import show

    try:
        show(one_line(f"{label}: {error}"), sys.stderr)
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:  # a full disk behind one of them: the exit code says the rest
        _discard_output()
    return code


def _discard_output() -> None:
    """Let the interpreter's last flush go nowhere, so that it does not fail again."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            os.dup2(nowhere, stream.fileno())
