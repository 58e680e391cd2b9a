"""Accuracy on synthetic tasks, decoded with memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lrt.data.synthetic import TaskRows
from lrt.model.lrt import LRT
from lrt.model.recurrence import states
from lrt.model.shapes import IGNORE

LENGTHS = (1, 2, 4, 8)
"""Multiples of the trained length."""


@torch.no_grad()
def accuracy(model: LRT, task: TaskRows, length: int, rows: int = 256) -> dict[str, float]:
    """Share of answers right over all scored positions, and at the last one; exact recurrence, token by token."""
    tokens, targets, _ = (x.to(model.device) for x in task.batch(rows, length, length, whole=True))
    hidden = torch.cat([h for _, h, _ in states(model, tokens, mode="exact")], dim=1)
    right, scored = model.logits(hidden).argmax(-1) == targets, targets != IGNORE
    last = int(scored.any(0).nonzero()[-1])
    return {"all": float(right[scored].double().mean()), "last": float(right[:, last][scored[:, last]].double().mean())}


def by_length(model: LRT, task: TaskRows, trained: int, times: Sequence[int] = LENGTHS) -> dict[str, Any]:
    """`accuracy` at multiples of the trained length, by length; lengths that the task does not take are left out."""
    return {str(n * trained): accuracy(model, task, n * trained) for n in times if task.takes(n * trained)}
