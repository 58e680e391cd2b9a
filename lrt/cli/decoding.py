"""The flags of commands that decode."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from lrt.config.decoding import DEFAULT_MODE, SamplingParams, Weights
from lrt.config.run import Device

if TYPE_CHECKING:
    from lrt.inference.loaded import Loaded


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

    def load(self, run: Path) -> Loaded:
        """A run, its model as these flags have it decode."""
        from lrt.inference.weights import by_columns, with_weights
        from lrt.training.checkpoint import load_model
        from lrt.utils.hardware import resolve_device

        loaded = load_model(run, resolve_device(self.device))
        by_columns(with_weights(loaded.model, self.weights))
        return loaded
