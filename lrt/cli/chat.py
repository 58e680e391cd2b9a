"""`lrt chat`: talk to a model."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional

from lrt.cli.decoding import DecodingFlags
from lrt.cli.parse import parse
from lrt.config.decoding import SamplingParams
from lrt.config.model import require


@dataclass(frozen=True)
class ChatFlags:
    """Talk to a model. Its state is kept between turns, so that nothing is taken in twice.

    A model that was trained on plain text continues the conversation as text: a turn is USER: ... BOT: ...
    """

    run: Positional[Path]
    """Run folder, or one of its checkpoints."""
    template: str = "USER: {}\nBOT:"
    """What a turn becomes; {} is what you type. Use {} alone to talk in raw text."""
    decoding: Annotated[DecodingFlags, tyro.conf.arg(name="")] = field(
        default_factory=lambda: DecodingFlags(SamplingParams(temperature=0.8, stop=("\nUSER:",)))
    )


FLAGS = ChatFlags


def main(args: list[str]) -> int:
    """Run the command; returns the exit code."""
    flags = parse(ChatFlags, args, "chat")
    require("{}" in flags.template, f"--template {flags.template!r} has no place for your text; put {{}} into it")

    from lrt.inference.chat import Conversation
    from lrt.training.checkpoint import load_model
    from lrt.utils.hardware import resolve_device

    loaded = load_model(flags.run, resolve_device(flags.decoding.device))
    talk = Conversation(loaded.model, loaded.tokenizer, flags.decoding.prefill)
    print("Type a line; /new forgets, end of input (Ctrl-D) leaves.", file=sys.stderr)
    for line in iter(_ask, None):
        if line.strip() == "/new":
            talk = Conversation(loaded.model, loaded.tokenizer, flags.decoding.prefill)
            continue
        for text in talk.say(flags.template.replace("{}", line), flags.decoding.sampling):
            print(text, end="", flush=True)
        print()
    return 0


def _ask() -> str | None:
    try:
        return input("> " if sys.stdin.isatty() else "")
    except EOFError:
        return None
