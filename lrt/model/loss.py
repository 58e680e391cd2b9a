"""The training objective: a schedule folded into one loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lrt.model.cross_entropy import head_loss, require_targets, unknown_targets
from lrt.model.lrt import LRT
from lrt.model.recurrence import check_known
from lrt.model.run_passes import run_passes
from lrt.model.shapes import IGNORE, StreamBND, TokensBN, check_starts, check_targets, require_ids
from lrt.model.state import Buffer
from lrt.passes import Passes, columns, memory_in_loss, rewriting
from lrt.schedule import Curriculum, Schedule
from lrt.utils.dtensor import is_sharded
from lrt.utils.hardware import widest
from lrt.utils.require import require


class LossOutput(NamedTuple):
    """A step's loss and its parts."""

    loss: Tensor
    """Weighted mean over the passes with loss, in nats; weights normalised to sum to 1. Plus the consistency term."""
    per_pass: Tensor
    """Mean loss of each pass that has one, in order, detached, [P]."""
    consistency: Tensor
    """Mean squared distance between the memory that passes write and the one they read, detached; 0 if nothing was."""
    passes: Passes
    """The passes that were run (the schedule with its ranges drawn)."""


def token_nats(model: LRT, hidden: StreamBND, targets: TokensBN) -> Tensor:
    """Cross-entropy of each position in nats, [B, N], float32 at least; 0 where the target is IGNORE.

    The slow twin of `head_loss`: all logits at once. ValueError: another negative target, or one past the vocabulary;
    on a GPU it costs NaN instead, since an error would wait for it.
    """
    size = model.config.vocab_size
    require_targets(targets, size)
    logits, unknown = model.logits(hidden), unknown_targets(targets, size)
    safe = targets.masked_fill(unknown, IGNORE).flatten()
    nats = F.cross_entropy(logits.flatten(0, 1), safe, ignore_index=IGNORE, reduction="none").view_as(targets)
    return nats.masked_fill(unknown, torch.nan)


def summed_nats(
    model: LRT, hidden: Sequence[StreamBND], targets: Sequence[TokensBN], scales: Tensor
) -> tuple[Tensor, Tensor]:
    """The sum over passes of scale x summed nats, and the summed nats of each pass, detached; `head_loss` says what.

    A head that is a matrix and nothing more is fused with the loss; another one is called, for what it adds.
    """
    weight = model.head_matrix()
    if weight is not None:
        return head_loss(weight, model.config.softcap, hidden, targets, scales)
    sums = torch.stack([token_nats(model, h, own).sum() for h, own in zip(hidden, targets, strict=True)])
    return (sums * scales.to(sums.dtype)).sum(), sums.detach()


class StepPlan(NamedTuple):
    """What a whole optimizer step computes; one call of the loss may see a part of its rows."""

    passes: Passes
    counts: Tensor
    """What its means divide by, float [P + 1]: the number of targets of each pass with loss, then the number of states
    that the consistency term compares; summed over processes."""


class ScheduledLoss(nn.Module):
    """Model and schedule as one module, so that DDP, FSDP and the optimizer see one forward a step.

    With `consistency` c the loss has the term c mean |m_t - m'_t|^2 / D: m_t is the state that a pass with loss writes,
    m'_t the one in the buffer, from earlier passes, which it replaces. Only m_t is trained: it is pulled towards what
    was read, so that the map from memory to memory contracts. States have mean square 1, so this is their relative
    squared change. Counted are states that some position reads: not a row's or a document's last.
    """

    def __init__(self, model: LRT, schedule: Schedule | Curriculum | str, seed: int = 0, consistency: float = 0.0):
        super().__init__()
        self.schedule = Curriculum.parse(schedule) if isinstance(schedule, str) else schedule
        self.model, self.seed, self.consistency = model, seed, consistency
        named = isinstance(self.schedule, Schedule | Curriculum)
        require(named, f"the schedule is a {type(schedule).__name__}; give its name, such as settled-1..3")
        require(0 <= consistency < math.inf, f"consistency is {consistency}; it must be at least 0")

    def passes(self, step: int, length: int) -> Passes:
        """The passes of optimizer step `step` over rows of `length` positions."""
        return self.schedule.draw(self.seed, step).passes(length)

    def forward(
        self,
        tokens: TokensBN,
        targets: TokensBN,
        starts: Tensor | None = None,
        step: int = 0,
        plan: StepPlan | None = None,
    ) -> LossOutput:
        """The schedule's loss on a batch.

        Args:
            tokens: int64 [B, T].
            targets: int64 [B, T]; IGNORE leaves a position out of every mean.
            starts: boolean [B, T], True where a document starts; by default at the model's BOS token.
            step: optimizer step; ranges in the schedule are drawn as a function of (seed, step).
            plan: the step's, which this batch may be a part of (a micro-batch, or one process's rows); by default the
                passes of `step`, their means over this batch.

        Raises:
            ValueError: tokens that are not whole numbers [B, T], targets or starts that do not fit them; on a CPU also
                a token or a target that the model does not have.
        """
        require_ids("tokens", tokens)
        check_known(self.model, tokens)
        check_targets(tokens, targets)
        check_starts(tokens, starts)
        targets = targets.long()
        starts = self.model.starts(tokens) if starts is None else starts
        if plan is None:
            plan = step_plan(targets, starts, self.passes(step, tokens.shape[1]))
        passes, counts = plan.passes, plan.counts.clamp(min=1)
        parts = self._run(tokens, targets, starts, passes)
        total = sum(p.weight for p in passes)
        weights = torch.tensor([p.weight / total for p in passes if p.weight > 0], dtype=torch.float64)
        scales = weights.to(counts.device, widest(counts.device), non_blocking=True) / counts[:-1]
        loss, sums = summed_nats(self.model, parts.hidden, parts.targets, scales)
        distance = parts.distance / counts[-1]
        if self.consistency:
            loss = loss + self.consistency * distance
        if not memory_in_loss(passes):  # zero-valued gradients, not missing ones, for parameters that only memory uses
            local = (p for p in self.model.memory_parameters() if not is_sharded(p))  # not given back by FSDP
            loss = loss + sum(0.0 * p.sum() for p in local)
        return LossOutput(loss, sums / counts[:-1], distance.detach(), passes)

    def _run(self, tokens: TokensBN, targets: TokensBN, starts: Tensor | None, passes: Passes) -> _Parts:
        compared = rewriting(passes) if self.model.config.memory.recurrent else [False] * len(passes)
        read = states_read(targets, starts) if any(compared) else None
        hidden, own_targets = [], []
        before, distance = None, torch.zeros((), device=targets.device)
        for i, (p, written, buffer) in enumerate(run_passes(self.model, tokens, passes, starts)):
            own = columns(p.positions)
            if p.weight > 0:
                assert written.hidden is not None
                hidden.append(written.hidden)
                own_targets.append(targets[:, own])
            if before is not None and read is not None:
                distance = distance + _distance(written.memory, before, read[:, own])
            before = _states(buffer, passes[i + 1].positions) if any(compared[i + 1 : i + 2]) else None
            del written, buffer  # or two passes' keys and values would exist where one's do
        return _Parts(hidden, own_targets, distance)


class _Parts(NamedTuple):
    """What the passes with loss have left."""

    hidden: list[StreamBND]
    targets: list[TokensBN]
    distance: Tensor
    """Summed over the states compared."""


def _states(buffer: Buffer, positions: range) -> StreamBND | None:
    """m_t for every t of `positions`, cut from the gradient."""
    read = buffer.memory(range(positions.start + 1, positions.stop + 1, positions.step))
    return None if read is None else read.detach()


def states_read(targets: TokensBN, starts: Tensor | None) -> Tensor:
    """Where the memory that a position writes is read by the next one; boolean [B, T]."""
    read = torch.ones_like(targets, dtype=torch.bool)
    read[:, -1] = False
    if starts is not None:
        read[:, :-1] &= ~starts[:, 1:]
    return read


def _distance(written: StreamBND, before: StreamBND, read: Tensor) -> Tensor:
    """Mean squared distance over the channels, summed over the states that are read."""
    kind = torch.promote_types(written.dtype, torch.float32)
    return ((written.to(kind) - before.to(kind)).square().mean(-1) * read).sum()


def step_plan(targets: TokensBN, starts: Tensor | None, passes: Passes) -> StepPlan:
    """The plan of a step over all of `targets`, int64 [B, T]; `starts` as in `ScheduledLoss.forward`."""
    counted, read = (targets != IGNORE).sum(0, keepdim=True), states_read(targets, starts).sum(0, keepdim=True)
    counts = [counted[:, columns(p.positions)].sum() for p in passes if p.weight > 0]
    compared = [p.positions for p, rewrites in zip(passes, rewriting(passes), strict=True) if rewrites]
    states = [read[:, columns(positions)].sum() for positions in compared]
    return StepPlan(passes, torch.stack([*counts, sum(states, torch.zeros_like(counts[0]))]).float())
