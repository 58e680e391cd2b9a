"""`lrt convert`: another family's checkpoint, an exported folder or a run as a run to train on."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional

from lrt.cli.parse import parse
from lrt.config.conversion import Conversion
from lrt.utils.terminal import command_name, show


@dataclass(frozen=True)
class ConvertFlags:
    """Import a checkpoint of another family, an exported folder or a run as a run, adding memory on the way."""

    source: Positional[Path]
    """Folder with config.json, safetensors and tokenizer (Llama, Mistral, Qwen2, Qwen3, an exported LRT), or a run."""
    out: Path
    """Folder of the new run."""
    conversion: Annotated[Conversion, tyro.conf.arg(name="")] = field(default_factory=Conversion)


FLAGS = ConvertFlags


def main(args: list[str]) -> int:
    """Run the command; returns the exit code."""
    flags = parse(ConvertFlags, args, "convert")

    from lrt.integrations.convert import convert

    config = convert(flags.source, flags.out, flags.conversion)
    on = "with" if config.memory.on else "without"
    show(f"{flags.out}: {config.depth} blocks of width {config.d}, vocabulary {config.vocab_size}, {on} memory")
    if flags.conversion.memory == "recirculation":
        show(f"score it with and without that memory (decoded, zero memory): {command_name()} eval {flags.out}")
    show(f"continue it with: {command_name()} train --init-from {flags.out} --data.source YOUR_TEXT --out NEW_RUN")
    return 0
