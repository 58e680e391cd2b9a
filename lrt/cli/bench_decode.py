"""`lrt bench decode`: what memory costs per decoded token."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from lrt.cli.parse import parse


@dataclass(frozen=True, kw_only=True)
class BenchDecode:
    """Latency per token against the same backbone without memory; prefill and scoring against token by token."""

    recipe: str = "d12"
    """Model of the latency figures; its weights are random, which latency does not mind."""
    checkpoint: Path | None = None
    """Run folder of the trained model whose prefill and scoring are measured; without one they are left out."""
    batches: tuple[int, ...] = (1, 8, 32)
    """Rows of the latency figures."""
    contexts: tuple[int, ...] = (128, 512, 1024, 2048, 4096)
    """Tokens already in the cache, filled synthetically."""
    lengths: tuple[int, ...] = (256, 1024)
    """Prompt lengths."""
    steps: int = 15
    """Timed pairs per latency figure; the median is reported."""
    compile: bool = True
    """Compile the step."""
    peer: bool = False
    """Also time `generate` of transformers' own nanochat model beside the backbone without memory."""
    device: str = "auto"
    """cpu, cuda or auto."""
    json: bool = False
    """End with one JSON object."""


def main(args: list[str]) -> int:
    """Run the command; returns the exit code."""
    from lrt.benchmarks.latency import run

    flags = parse(BenchDecode, args, "bench decode")
    chosen = {name: value for name, value in vars(flags).items() if name != "json"}
    result = run(**chosen, tell=partial(print, flush=True))
    if flags.json:
        print(json.dumps(result))
    return 0
