"""What the experiments of the package take. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lrt.utils.require import require, require_seed


@dataclass(frozen=True)
class DemoConfig:
    """Train four arms at equal training FLOPs, print one table and a verdict, write report.html and report.json."""

    out: Path = Path("runs/demo")
    """Folder of the report; each arm's run is a folder in it."""
    compute: float | None = None
    """Training FLOPs, as tokens per scaling parameter that the plain model sees for them; by default the recipe's."""
    source: str = "python"
    """Text to train on: `python` is the standard library's sources; see `lrt train --help`."""
    seed: int = 0
    """Seed of all arms."""

    def __post_init__(self) -> None:
        require(self.compute is None or self.compute > 0, f"--compute is {self.compute}; it must be positive")
        require_seed("--seed", self.seed)
