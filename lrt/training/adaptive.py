"""Adaptive settling: sweeps chosen from the residual of the memory, which every step yields for nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lrt.schedule import Curriculum, Schedule
from lrt.span import Span
from lrt.utils.require import require


@dataclass(frozen=True)
class Settling:
    """Where the choice of sweeps stands: a function of the residuals so far, equal on all processes.

    Stored in checkpoints, so that a resumed run chooses as an uninterrupted one does.
    """

    schedule: str = ""
    """The adaptive schedule that this belongs to; in a curriculum each begins anew."""
    wanted: int = 0
    """Sweeps that the residual asks for."""
    steps: int = 0
    spent: int = 0
    """Sweeps of those steps."""

    def draw(self, plan: Curriculum, seed: int, step: int) -> Schedule:
        """The schedule of `step`: what is chosen is a function of the state, what is drawn of (seed, step)."""
        schedule = plan.at(step)
        if schedule.adaptive is None:
            return schedule.draw(seed, step)
        return schedule.sized(self._of(schedule).choose(schedule.adaptive)).draw(seed, step)

    def follow(self, plan: Curriculum, step: int, residual: Callable[[], float]) -> Settling:
        """Where it stands after `step`, whose residual is asked for only where the schedule adapts."""
        schedule = plan.at(step)
        if schedule.adaptive is None:
            return self
        return self._of(schedule).after(schedule.adaptive, residual())

    def _of(self, schedule: Schedule) -> Settling:
        """This, or the beginning, if it belongs to another schedule."""
        if self.schedule == str(schedule):
            return self
        return Settling(str(schedule), schedule.adaptive.low if schedule.adaptive else 0)

    def choose(self, span: Span) -> int:
        """This step's sweeps: what is wanted, where the budget holds it, else the least."""
        holds = self.spent + self.wanted <= span.most * (self.steps + 1) + 1e-9
        return self.wanted if holds else span.low

    def after(self, span: Span, residual: float) -> Settling:
        """Where it stands after a step: one sweep more is wanted above the tolerance, one less below.

        residual: root mean square of the memory's relative change in the step's last sweep.
        """
        assert span.tolerance is not None
        change = -1 if residual <= span.tolerance else 1  # more, too, where it is not a number
        wanted = min(max(self.wanted + change, span.low), span.high)
        return Settling(self.schedule, wanted, self.steps + 1, self.spent + self.choose(span))


def restored(saved: Any, plan: Curriculum, where: str) -> Settling:
    """What a checkpoint holds; ValueError where an adaptive schedule finds nothing of its own there."""
    if all(schedule.adaptive is None for schedule, _ in plan.stages):
        return Settling()
    kinds = {"schedule": str, "wanted": int, "steps": int, "spent": int}
    fine = isinstance(saved, dict) and {name: type(x) for name, x in saved.items()} == kinds
    require(fine, f"{where} does not say how many sweeps its schedule had come to; resume an earlier checkpoint")
    return Settling(**saved)
