"""The flags of commands that decode."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import tyro

from lrt.config.decoding import DEFAULT_MODE, SamplingParams, Weights
from lrt.config.run import Device


@dataclass(frozen=True)
class DecodingFlags:
    """How text is drawn; shared by `sample` and `chat`."""

    sampling: Annotated[SamplingParams, tyro.conf.arg(name="")] = field(
        default_factory=lambda: SamplingParams(temperature=0.8)
    )
    prefill: str = DEFAULT_MODE
    """How the prompt is taken in: exact, jacobi or interleaved-G."""
    drafts: int = 0
    """Most tokens guessed ahead where the text repeats itself, and checked together; the text stays the same."""
    weights: Weights = "full"
    """Large matrices as they are, or in 8 bits: faster steps; docs/decoding.md says what it costs."""
    device: Device = "auto"
    """cpu, cuda, mps (untested) or auto."""
