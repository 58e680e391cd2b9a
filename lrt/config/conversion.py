"""What a conversion adds to a model. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

AddedMemory = Literal["keep", "none", "residual", "shared", "layerwise"]
Start = Literal["zero", "small", "copy"]


@dataclass(frozen=True)
class Conversion:
    """What is added to a model on its way, and what its source lacks."""

    memory: AddedMemory = "keep"
    """Memory to add to a model without: residual injection alone, or with shared or layerwise projections too. `keep`:
    what the source has, which for another family is none."""
    memory_source: int | None = None
    """Block (1..L) after which the memory is taken; none means the last one, 0 the token shift."""
    start: Start = "zero"
    """Projections and gamma at 0: the function is unchanged, exactly; `small`: random, `copy`: those of the layer's own
    keys and values, both at `start-scale`, and gamma at it: the function is nearly unchanged."""
    start_scale: float = 0.02
    """Size of the projections under `small` (times 1/sqrt(width)) and `copy` (times the layer's own), and of gamma."""
    tokenizer: Path | None = None
    """Tokenizer folder or tokenizer.json, where the source has none."""
    context: int | None = None
    """Longest sequence of the new run; by default the source's."""
    seed: int = 0
    """Of `small`."""
