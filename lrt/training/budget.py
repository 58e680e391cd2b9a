"""How long a training is, and what it has spent so far: every pass counted."""

from __future__ import annotations

from dataclasses import dataclass, replace

from lrt.config.model import MEMORY_OFF, ModelConfig
from lrt.config.run import RunConfig
from lrt.model.flops import passes_flops, scaling_parameters, train_flops_per_token
from lrt.passes import Passes, effective_cost
from lrt.schedule import Curriculum, Schedule, effective_forwards


@dataclass
class Progress:
    """What has been spent so far; stored in checkpoints."""

    step: int = 0
    tokens: int = 0
    token_forwards: float = 0.0
    """Tokens times passes, all weighted 1."""
    effective_forwards: float = 0.0
    """The same weighted by cost: passes without gradient count 1/3, and every pass the share of the blocks it runs."""
    flops: float = 0.0
    seconds: float = 0.0
    """Spent training; evaluation, samples and checkpoints not counted."""
    cpu_seconds: float = 0.0
    """CPU time of this process in them, all threads: what to compare where other work shares the machine."""
    skipped: int = 0
    """Steps whose loss or gradient was not finite; they changed nothing."""

    def count(self, config: RunConfig, passes: Passes, seconds: float, cpu_seconds: float) -> None:
        """Add one step over `passes`."""
        rows = config.train.batch
        forwards = rows * config.model.loops
        self.step += 1
        self.tokens += rows * config.train.length
        self.token_forwards += forwards * sum(len(p.positions) for p in passes)
        self.effective_forwards += forwards * effective_cost(passes, *block_shares(config.model))
        self.flops += rows * passes_flops(config.model, passes)
        self.seconds += seconds
        self.cpu_seconds += cpu_seconds


def block_shares(model: ModelConfig) -> tuple[float, float]:
    """Shares of the blocks: those up to the source block, and those that no memory reaches."""
    return model.source / model.layers, model.blocks_below / model.layers


def horizon(config: RunConfig) -> int:
    """Optimizer steps from what may be spent: steps, tokens, R, effective compute, FLOPs, or a plain model's FLOPs.

    What a step costs is the mean over the schedule's draws.
    """
    t, model = config.train, config.model
    kind, number = t.horizon_parts()
    if kind == "steps":
        return max(1, round(number))
    schedule = Curriculum.parse(t.schedule)
    tokens = number if kind in ("tokens", "flops") else number * scaling_parameters(model)
    if kind == "compute":
        tokens /= effective_forwards(schedule, t.length, *block_shares(model)) * model.loops
    elif kind == "flops_of_plain":
        plain = replace(model, memory=MEMORY_OFF, loops=1)
        tokens *= train_flops_per_token(plain, Schedule.parse("parallel"), t.length)
    if kind in ("flops", "flops_of_plain"):
        tokens /= train_flops_per_token(model, schedule, t.length)
    return max(1, round(tokens / (t.batch * t.length)))
