"""`lrt tokenize`: a text source into token shards."""

from __future__ import annotations

from dataclasses import dataclass, field

from lrt.cli.parse import parse, tell_unread
from lrt.config.run import DataConfig, RunConfig
from lrt.utils.terminal import show


@dataclass(frozen=True)
class TokenizeFlags:
    """Turn a text source into token shards, as `lrt train` would; prints the folder.

    The flags are those of lrt train; data. may be left out: --source for --data.source.
    """

    data: DataConfig = field(default_factory=DataConfig)
    """What `lrt train` calls so too."""


FLAGS = TokenizeFlags


def _in_full(arg: str) -> str:
    """A flag as `lrt train` has it."""
    short = arg.startswith("--") and not arg.startswith(("--data.", "--help"))
    return f"--data.{arg[2:]}" if short else arg


def main(args: list[str]) -> int:
    """Run the command; returns the exit code."""
    args = [_in_full(arg) for arg in args]
    flags = parse(TokenizeFlags, args, "tokenize")
    tell_unread("tokenize", RunConfig(data=flags.data), args)

    from lrt.data.synthetic import TaskRows
    from lrt.training.logging import Live
    from lrt.training.trainer import prepare_data

    with Live() as live:
        prepared = prepare_data(flags.data, [live])
    if isinstance(prepared.train, TaskRows) or isinstance(prepared.val, TaskRows):
        raise ValueError(f"{flags.data.source} is drawn as it is needed; give a text")
    train, val = len(prepared.train), len(prepared.val)
    show(
        f"{prepared.folder}: {train:,} training and {val:,} validation tokens, "
        f"vocabulary {prepared.tokenizer.vocab_size}"
    )
    return 0
