"""`lrt completion`: a script that teaches a shell the commands, flags and choices."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from functools import reduce
from operator import or_
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import Positional

from lrt.cli.parse import parse


@dataclass(frozen=True)
class HelpFlags:
    """`lrt help COMMAND`: for the completion alone, since it takes no flags."""


@dataclass(frozen=True)
class CompletionFlags:
    """Print a shell's completion script.

    For one session of bash: eval "$(lrt completion bash)"

    For all of them, write it where the shell looks:

    bash  ~/.local/share/bash-completion/completions/lrt

    zsh   _lrt, in a folder of $fpath

    fish  ~/.config/fish/completions/lrt.fish
    """

    shell: Positional[Literal["bash", "zsh", "fish"]]
    """bash, zsh or fish."""


FLAGS = CompletionFlags


def main(args: list[str]) -> int:
    """Run the command; returns the exit code."""
    shell = parse(CompletionFlags, args, "completion").shell
    try:
        tyro.cli(all_commands(), prog="lrt", args=["--tyro-print-completion", shell])
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def all_commands() -> Any:
    """The flags of every command as one type, a command each."""
    from lrt.cli.main import COMMANDS

    return _one_of({name: _flags(name) for name in COMMANDS} | {"help": _one_of(dict.fromkeys(COMMANDS, HelpFlags))})


def _flags(command: str) -> Any:
    flags = importlib.import_module(f"lrt.cli.{command}").FLAGS
    return _one_of(flags) if isinstance(flags, dict) else flags


def _one_of(types: dict[str, Any]) -> Any:
    named = [Annotated[kind, tyro.conf.subcommand(name, prefix_name=False)] for name, kind in types.items()]
    return reduce(or_, named)
