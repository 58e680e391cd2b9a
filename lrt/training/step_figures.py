"""The figures of a training's steps since it last spoke."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from lrt.model.loss import LossOutput

SHOWN = 8
"""Passes whose slices are named."""


class StepFigures:
    """Losses of the steps since the last report. Every mean is over the same steps: those that were not skipped."""

    def __init__(self):
        self.outputs: list[LossOutput] = []
        self.seconds = 0.0

    def add(self, out: LossOutput, seconds: float) -> None:
        """Take in one step; its loss is nan if it was skipped."""
        self.outputs.append(out)
        self.seconds += seconds

    @property
    def steps(self) -> int:
        """Steps taken in."""
        return len(self.outputs)

    def means(self) -> dict[str, Any]:
        """`loss`, `consistency`, `per_pass` and the `passes` they belong to.

        Where steps differ in their passes, pass k is averaged over the steps that have one.
        """
        rows = [torch.cat((o.loss[None], o.consistency[None], o.per_pass)) for o in self.outputs]
        rows = [row.masked_fill(~row[0].isfinite(), torch.nan) for row in rows]
        table = pad_sequence(rows, batch_first=True, padding_value=torch.nan)
        loss, consistency, *per_pass = table.nanmean(0).tolist()
        longest = max(self.outputs, key=lambda o: len(o.passes))
        names = [str(p) for p in longest.passes][:SHOWN]
        return {"loss": loss, "consistency": consistency, "per_pass": per_pass, "passes": names}
