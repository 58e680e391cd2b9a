"""`lrt sample`: continue a prompt."""

from __future__ import annotations

import itertools
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional

from lrt.cli.decoding import DecodingFlags
from lrt.cli.parse import parse
from lrt.utils.require import require_at_least, require_at_most
from lrt.utils.terminal import WordByWord

MOST_SAMPLES = 100_000


@dataclass(frozen=True)
class SampleFlags:
    """Continue a prompt, decoding with memory; the text streams to standard output."""

    run: Positional[Path]
    """Run folder, or one of its checkpoints."""
    prompt: str = ""
    """The beginning of the document; `-` reads it from standard input."""
    samples: int = 1
    """Continuations, with seeds counting up."""
    decoding: Annotated[DecodingFlags, tyro.conf.arg(name="")] = field(default_factory=DecodingFlags)


FLAGS = SampleFlags


def main(args: list[str]) -> int:
    """Run the command; returns the exit code."""
    flags = parse(SampleFlags, args, "sample")
    require_at_least(1, samples=flags.samples)
    require_at_most(MOST_SAMPLES, samples=flags.samples)

    from lrt.inference.chat import complete

    sampling, mode = flags.decoding.sampling, flags.decoding.prefill
    loaded = flags.decoding.load(flags.run)
    prompt = sys.stdin.read() if flags.prompt == "-" else flags.prompt
    for i in range(flags.samples):
        print(f"--- seed {sampling.seed + i}\n" if flags.samples > 1 else "", end="")
        once = replace(sampling, seed=sampling.seed + i)
        pieces = complete(loaded.model, loaded.tokenizer, prompt, once, mode=mode, drafts=flags.decoding.drafts)
        first = prompt + next(pieces, "")  # the prompt has been taken in by then: it may be refused
        with WordByWord(sys.stdout) as screen:
            for text in itertools.chain([first], pieces):
                screen.write(text)
    return 0
