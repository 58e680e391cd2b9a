"""The loss of a transformers forward: one definition, by counts over the whole step, for every schedule.

A schedule's loss is the weighted mean over its passes (`ScheduledLoss`), each the mean over its own targets. Of a step,
the library tells only how many targets there are in all. So the passes that share the positions of one sweep, strides
or chunks, share its count in proportion to their positions; then every token has one weight, whatever it is padded,
packed or accumulated with. For full rows whose targets all count, it is the core's own number.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.utils.logging import get_logger

from lrt.integrations.hf.documents import DocumentRows
from lrt.integrations.hf.fold import ScoredPass
from lrt.model.loss import summed_nats
from lrt.model.lrt import LRT
from lrt.model.shapes import IGNORE, TokensBN
from lrt.passes import Passes, columns
from lrt.schedule import Schedule
from lrt.utils.hardware import widest
from lrt.utils.require import require

CONTIGUOUS = ("chunked", "sequential")
"""Schedules whose passes follow one another: the longer the row, the more there are."""


UNTOLD = (
    "num_items_in_batch may count first tokens of rows padded on the left, which nothing predicts: the loss is "
    "smaller by their share; pad on the right to train (tokenizer.padding_side = 'right')"
)
logger = get_logger(__name__)


def least_length(schedule: Schedule) -> int:
    """The shortest row in which a drawn schedule has all its passes."""
    size = schedule.size.low if schedule.size else 1
    if schedule.kind in CONTIGUOUS:
        return (len(schedule.weights) - 1) * size + 1 if schedule.weights else 1
    return size if schedule.kind == "interleaved" else 1


def token_weights(schedule: Schedule, passes: Passes) -> list[float]:
    """What a token's nats count in each of the passes, times the number of targets.

    Pass p of weight w counts w / sum of w, over its share of the positions of a row; contiguous passes together count
    as one sweep, in which a weight is relative to the last.
    """
    if schedule.kind in CONTIGUOUS:
        last = schedule.weights[-1] if schedule.weights else 1.0
        require(last > 0, f"the last weight of schedule {schedule} is 0: later chunks would not be trained")
        return [p.weight / last for p in passes]
    least = least_length(schedule)
    total = sum(p.weight for p in passes)
    shares = [len(p.positions) / least for p in schedule.passes(least)]
    return [p.weight / total / share for p, share in zip(passes, shares, strict=True)]


def objective(
    core: LRT, scored: Sequence[tuple[DocumentRows, list[ScoredPass]]], labels: TokensBN, shifted: bool, items: Any
) -> Tensor:
    """The loss in nats a target.

    Args:
        labels: int64 [B, T]; `shifted` ones stand where they are to be predicted, else one place later.
        items: targets of the whole step; None: of this batch.

    Raises:
        ValueError: labels that are not one whole number a token, or no number of targets.
    """
    batch, width = scored[0][0].batch, scored[0][0].columns
    shape = (
        f"labels of shape {list(labels.shape)} for tokens of [{batch}, {width}]; give one a token, {IGNORE} for none"
    )
    require(labels.shape == (batch, width), shape)
    integral = not labels.is_floating_point() and labels.dtype is not torch.bool
    require(integral, f"labels are {labels.dtype}; give whole numbers, as int64")
    labels = labels.long()
    hidden, own_targets, weights, counted = [], [], [], torch.zeros_like(labels[0, 0])
    for rows, passes in scored:
        targets = rows.targets(labels, shifted)
        counted = counted + (targets != IGNORE).sum()
        longest = max(p.positions[-1] + 1 for p in passes)
        targets = F.pad(targets, (0, longest - targets.shape[1]), value=IGNORE)
        for p in passes:
            hidden.append(p.hidden)
            own_targets.append(targets[:, columns(p.positions)])
            weights.append(p.weight)
    if items is None:
        items = counted
    elif not shifted and any(rows.origin is not None for rows, _ in scored):
        items = _without_first_tokens(items, counted, labels)
    count = _count(items, counted)
    scales = torch.tensor(weights, dtype=torch.float64, device="cpu")
    scales = scales.to(labels.device, widest(labels.device), non_blocking=True) / count
    return summed_nats(core, hidden, own_targets, scales)[0]


def _without_first_tokens(items: Any, counted: Tensor, labels: TokensBN) -> Any:
    """The number of targets of the whole step; `counted`, this batch's own, where the step is this batch.

    The library's Trainer counts every label but those of the first column: those of first tokens behind padding too,
    which nothing predicts. Of one batch we know better; of several it is said once.
    """
    by_library, items = labels[:, 1:].ne(IGNORE).sum(), torch.as_tensor(items, device=labels.device)
    if bool(by_library > counted) and bool((items != by_library).any()):
        logger.warning_once(UNTOLD)
    return torch.where(items == by_library, counted, items)


def _count(items: Any, counted: Any) -> Tensor:
    """What the loss is a mean over, at least 1. ValueError: no such number; on a GPU its value is not looked at."""
    count = torch.as_tensor(items, device=counted.device)
    require(count.numel() == 1, f"num_items_in_batch holds {count.numel()} numbers; give one, of the whole step")
    if count.device.type == "cpu":
        least = min(1, int(counted))
        require(
            bool(count >= least), f"num_items_in_batch is {count.item()} for {int(counted)} targets in this batch alone"
        )
    return count.reshape(()).clamp(min=1)
