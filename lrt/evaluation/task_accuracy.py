"""Accuracy on synthetic tasks by length, decoded with memory."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lrt.data.synthetic import TaskRows
from lrt.evaluation.likelihood import require_finite
from lrt.evaluation.suite import Scorer, Scores, Suite, share
from lrt.model.lrt import LRT
from lrt.model.recurrence import states
from lrt.model.shapes import IGNORE
from lrt.utils.require import require

LENGTHS = (1, 2, 4, 8)
"""Multiples of the trained length."""
ROWS = 256
"""Rows of each length."""


@torch.no_grad()
def accuracy(model: LRT, task: TaskRows, length: int, rows: int = ROWS, mode: str = "exact") -> Scores:
    """Share of answers right over all scored positions, and at the last one, with standard errors.

    Rows are independent, answers within one are not: the error over all answers is that of a ratio of rows' sums.
    """
    tokens, targets, _ = (x.to(model.device) for x in task.batch(rows, length, length, full=True))
    hidden = torch.cat([h for _, h, _ in states(model, tokens, mode=mode)], dim=1)
    best = model.logits(hidden).max(-1)
    require_finite(best.values)
    right, scored = best.indices == targets, targets != IGNORE
    last = int(scored.any(0).nonzero()[-1])
    at_end = share(int(right[:, last][scored[:, last]].sum()), int(scored[:, last].sum()))
    every, error = _ratio((right & scored).sum(1).cpu().double(), scored.sum(1).cpu().double())
    return {"all": every, "last": at_end["accuracy"], "all_error": error, "last_error": at_end["error"], "items": rows}


def _ratio(hits: Tensor, answers: Tensor) -> tuple[float, float]:
    """Sum of the rows' hits over that of their answers, and its standard error, rows independent; [B] each."""
    share_right = float(hits.sum() / answers.sum())
    rows = max(len(hits), 2)
    spread = float((hits - share_right * answers).square().sum()) / (rows * (rows - 1))
    return share_right, math.sqrt(spread) / float(answers.mean())


def by_length(model: LRT, task: TaskRows, trained: int, times: Sequence[int] = LENGTHS) -> dict[str, Any]:
    """`accuracy` at multiples of the trained length, by length; lengths that the task does not take are left out."""
    return {str(n * trained): accuracy(model, task, n * trained) for n in times if task.takes(n * trained)}


def task_suite(name: str, lengths: Sequence[int], vocabulary: int) -> Suite:
    """A synthetic task, a part a length. ValueError: no such task or length, or one of too many symbols."""
    task = TaskRows(name, 1)
    require(
        task.vocab_size <= vocabulary,
        f"task {name} has {task.vocab_size} symbols, the model {vocabulary} tokens; choose one that it was trained on",
    )
    wrong = [n for n in lengths if not task.takes(n)]
    require(bool(lengths) and not wrong, f"task {name} has no rows of {', '.join(map(str, wrong))} positions")
    parts = {str(length): functools.partial(_score_length, task, length) for length in lengths}
    return Suite(name, parts, lambda parts: {}, task.hash)


def _score_length(task: TaskRows, length: int, scorer: Scorer) -> Scores:
    rows = scorer.limit or ROWS
    scores = accuracy(scorer.model, task, length, rows, scorer.mode)
    scorer.progress(rows, rows)
    return scores
