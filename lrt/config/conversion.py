"""What a conversion adds to a model. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lrt.utils.require import require, require_seed

AddedMemory = Literal["keep", "none", "residual", "shared", "layerwise", "recirculation"]
Start = Literal["zero", "small", "copy"]


@dataclass(frozen=True)
class Conversion:
    """What is added to a model on its way, and what its source lacks."""

    memory: AddedMemory = "keep"
    """Memory to add to a model without: residual injection alone, or with shared or layerwise projections too. `keep`:
    what the source has, which for another family is none. `recirculation` needs no training: the input of one early
    block becomes a mixture of itself and the previous token's late state, brought to its length."""
    memory_source: int | None = None
    """Block (1..L) after which the memory is taken; none means the last one, and of `recirculation` half the depth; 0
    the token shift."""
    memory_block: int | None = None
    """Of `recirculation`: the block (1..L) whose input takes the memory in; none means a quarter of the depth."""
    share: float = 0.1
    """Of `recirculation`: the memory's share of that mixture, between 0 and 1."""
    mixture: Literal["share", "matched"] = "share"
    """Of `recirculation`: whether the stream gives up that share of itself, or the memory is added to all of it."""
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

    def __post_init__(self) -> None:
        self._require_read()
        untrained = self.memory == "recirculation"
        of_untrained = {"memory-block": self.memory_block is not None, "share": self.share != 0.1}
        of_untrained |= {"mixture": self.mixture != "share"}
        misplaced = [f"--{name}" for name, is_set in of_untrained.items() if is_set and not untrained]
        require(not misplaced, f"{', '.join(misplaced)} belongs to --memory recirculation; add that, or leave it out")
        require(0 < self.share < 1, f"--share is {self.share}; give a number between 0 and 1, such as 0.1")
        require_seed("--seed", self.seed)
        scale, context = self.start_scale, self.context
        require(0 < scale <= 1, f"--start-scale is {scale}; give a number above 0 and at most 1, such as 0.02")
        require(context is None or context >= 1, f"--context is {context}; give at least 1 token, or leave it out")
        settled = not untrained or self.start == "zero"
        require(settled, "--start belongs to memory that will be trained; with recirculation, leave it out")

    def _require_read(self) -> None:
        """ValueError: an option that nothing looks at, and that would be dropped in silence."""
        kept = self.memory in ("keep", "none")
        for flag, is_set, is_read, needs in (
            ("memory-source", self.memory_source is not None, not kept, "--memory residual, shared, layerwise, ..."),
            ("start", self.start != "zero", not kept, "--memory residual, shared or layerwise"),
            ("start-scale", self.start_scale != 0.02, self.start != "zero", "--start small or copy"),
            ("seed", self.seed != 0, self.start == "small", "--start small"),
        ):
            require(is_read or not is_set, f"--{flag} belongs to {needs}; add that, or leave --{flag} out")
