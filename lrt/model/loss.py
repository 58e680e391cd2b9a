"""The training objective: a schedule folded into one loss."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lrt.model.cross_entropy import head_loss, require_targets
from lrt.model.run_passes import run_passes
from lrt.model.shapes import IGNORE, StreamBND, TokensBN
from lrt.model.transformer import LRT
from lrt.schedule import Curriculum, Pass, Passes, Schedule
from lrt.utils.dtensor import is_sharded


class LossOutput(NamedTuple):
    """A step's loss and its parts."""

    loss: Tensor
    """Weighted mean over the passes with loss, in nats; weights normalised to sum to 1."""
    per_pass: Tensor
    """Mean loss of each pass that has one, in order, detached, [P]."""
    passes: Passes
    """The passes that were run (the schedule with its ranges drawn)."""


def token_nats(model: LRT, hidden: StreamBND, targets: TokensBN) -> Tensor:
    """Cross-entropy of each position in nats, [B, N], float32 at least; 0 where the target is IGNORE.

    The slow twin of `head_loss`: all logits at once. ValueError: another negative target, or one past the vocabulary.
    """
    require_targets(targets, model.config.vocab_size)
    logits = model.logits(hidden)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="none").view_as(
        targets
    )


class ScheduledLoss(nn.Module):
    """Model and schedule as one module, so that DDP, FSDP and the optimizer see one forward a step."""

    def __init__(self, model: LRT, schedule: Schedule | Curriculum, seed: int = 0):
        super().__init__()
        self.model, self.schedule, self.seed = model, schedule, seed

    def passes(self, step: int, length: int) -> Passes:
        """The passes of optimizer step `step` over rows of `length` positions."""
        return self.schedule.draw(self.seed, step).passes(length)

    def forward(
        self,
        tokens: TokensBN,
        targets: TokensBN,
        starts: Tensor | None = None,
        step: int = 0,
        counts: Tensor | None = None,
    ) -> LossOutput:
        """The schedule's loss on a batch.

        Args:
            tokens, targets: int64 [B, T]; IGNORE in `targets` leaves a position out of every mean.
            starts: boolean [B, T], True where a document starts; by default at the model's BOS token.
            step: optimizer step; ranges in the schedule are drawn as a function of (seed, step).
            counts: per pass with loss, the targets its mean runs over, [P]; give the whole step's when accumulating
                micro-batches or training on several processes (see `targets_per_pass`). By default this batch's.
        """
        passes = self.passes(step, tokens.shape[1])
        starts = self.model.starts(tokens) if starts is None else starts
        counts = (targets_per_pass(targets, passes) if counts is None else counts).clamp(min=1)
        total = sum(p.weight for p in passes)
        hidden, aims, memory_read = [], [], False
        for p, written, buffer in run_passes(self.model, tokens, passes, starts):
            memory_read |= p.weight > 0 and p is not passes[0] and p.positions[-1] > 0
            if p.weight > 0:
                assert written.hidden is not None
                hidden.append(written.hidden)
                aims.append(targets[:, p.positions.start : p.positions.stop : p.positions.step])
            del written, buffer  # or two passes' keys and values would exist where one's do
        weights = torch.tensor([p.weight / total for p in passes if p.weight > 0], dtype=torch.float64)
        scales = weights.to(counts.device, non_blocking=True) / counts
        loss, sums = head_loss(self.model.unembedding, self.model.config.softcap, hidden, aims, scales)
        if not memory_read:  # zero-valued gradients, not missing ones, for parameters that only memory uses
            here = (p for p in self.model.memory_parameters() if not is_sharded(p))  # not given back by FSDP
            loss = loss + sum(0.0 * p.sum() for p in here)
        return LossOutput(loss, sums / counts, passes)


def targets_per_pass(targets: TokensBN, passes: tuple[Pass, ...]) -> Tensor:
    """How many targets each pass with loss counts, float [P]; of several processes, add them up."""
    kept = (targets != IGNORE).sum(0)
    counts = [kept[p.positions.start : p.positions.stop : p.positions.step].sum() for p in passes if p.weight > 0]
    return torch.stack(counts).float()
