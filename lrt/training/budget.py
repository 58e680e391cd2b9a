"""How long a training is, and what it has spent so far: every pass counted."""

from __future__ import annotations

from dataclasses import dataclass

from lrt.config.run import RunConfig
from lrt.model.flops import passes_flops, scaling_parameters
from lrt.schedule import NO_GRAD_COST, Curriculum, Passes, effective_forwards


@dataclass
class Progress:
    """What has been spent so far; stored in checkpoints."""

    step: int = 0
    tokens: int = 0
    token_forwards: float = 0.0
    """Tokens times passes, all weighted 1."""
    effective_forwards: float = 0.0
    """The same with passes without gradient weighted 1/3."""
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
        self.effective_forwards += forwards * sum(len(p.positions) * (1.0 if p.grad else NO_GRAD_COST) for p in passes)
        self.flops += rows * passes_flops(config.model, passes)
        self.seconds += seconds
        self.cpu_seconds += cpu_seconds


def horizon(config: RunConfig) -> int:
    """Optimizer steps from steps, tokens, R or an effective-compute budget that counts every pass."""
    t = config.train
    kind, number = t.horizon_parts()
    if kind == "steps":
        return max(1, round(number))
    tokens = number if kind == "tokens" else number * scaling_parameters(config.model)
    if kind == "compute":
        tokens /= effective_forwards(Curriculum.parse(t.schedule), t.length) * config.model.loops
    return max(1, round(tokens / (t.batch * t.length)))
