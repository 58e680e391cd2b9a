"""A trained model together with what belongs to it: what every use of a run begins with."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lrt.config.run import RunConfig
from lrt.data.tokenizer import Tokenizer
from lrt.model.lrt import LRT


@dataclass(frozen=True)
class Loaded:
    """A trained model with what belongs to it."""

    model: LRT
    tokenizer: Tokenizer
    config: RunConfig
    step: int
    folder: Path
    """The checkpoint's folder."""
    run: Path
    """The run's folder."""
    extra: dict[str, Any] = field(default_factory=dict)
    """What its training stored beside it, such as which tokens it was trained on."""
    stored: str = "float32"
    """Number type of the stored weights; figures of their training were of float32."""
