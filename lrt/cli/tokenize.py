"""`lrt tokenize`: a text source into token shards."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import tyro

from lrt.cli.parse import parse
from lrt.config.run import DataConfig


@dataclass(frozen=True)
class TokenizeFlags:
    """Turn a text source into token shards, as `lrt train` would; prints the folder."""

    data: Annotated[DataConfig, tyro.conf.arg(name="")] = field(default_factory=DataConfig)


FLAGS = TokenizeFlags


def main(args: list[str]) -> int:
    """Run the command; returns the exit code."""
    flags = parse(TokenizeFlags, args, "tokenize")

    from lrt.data import TaskRows
    from lrt.training.logging import Live
    from lrt.training.trainer import prepare_data

    with Live() as live:
        prepared = prepare_data(flags.data, [live])
    if isinstance(prepared.train, TaskRows) or isinstance(prepared.val, TaskRows):
        raise ValueError(f"{flags.data.source} is drawn as it is needed; give a text")
    train, val = len(prepared.train), len(prepared.val)
    print(
        f"{prepared.folder}: {train:,} training and {val:,} validation tokens, "
        f"vocabulary {prepared.tokenizer.vocab_size}"
    )
    return 0
