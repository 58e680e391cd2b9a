"""How the difference between two arms moves with the width of the model: a straight line through paired seeds.

    python tools/width_fit.py --less plain --horizon flops_of_plain=10 results/equal_flops_books*.jsonl

Prints a markdown table, a row for each arm that was trained at two widths or more. d(width) = a + b log2(width) is
fitted by least squares to the differences in decoded bits per byte, one for each width and seed. Intervals are 95 %
by Student's t. They hold if the line does, which three widths cannot show.
"""

from __future__ import annotations

import argparse
import math
import signal
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import stats

from lrt.experiments.groups import RunGroup, read_groups
from lrt.experiments.plots import decoded


class Line(NamedTuple):
    """A straight line through differences over log2 of the width."""

    widths: tuple[int, ...]
    """Widths that were measured, one for each difference."""
    differences: tuple[float, ...]

    def slope(self) -> tuple[float, float]:
        """Bits per byte per doubling, and half of the 95 % interval."""
        away, _ = self._centred()
        return self._slope(), self._half() / math.sqrt(float(away @ away))

    def at(self, width: int) -> tuple[float, float]:
        """The mean difference at a width, and half of the 95 % interval of that mean."""
        away, middle = self._centred()
        further = math.log2(width) - middle
        spread = math.sqrt(1 / len(away) + further**2 / float(away @ away))
        return float(np.mean(self.differences)) + self._slope() * further, self._half() * spread

    def _centred(self) -> tuple[np.ndarray, float]:
        """log2 of the widths less their mean, and that mean."""
        x = np.log2(self.widths)
        return x - x.mean(), float(x.mean())

    def _slope(self) -> float:
        away, _ = self._centred()
        return float(away @ np.array(self.differences)) / float(away @ away)

    def _half(self) -> float:
        """Deviation about the line, times Student's quantile."""
        (away, _), freedom = self._centred(), len(self.widths) - 2
        rest = np.array(self.differences) - np.mean(self.differences) - self._slope() * away
        return float(stats.t.ppf(0.975, freedom)) * math.sqrt(float(rest @ rest) / freedom)


def lines(groups: Iterable[RunGroup], less: str, horizon: str, depth: int) -> dict[str, Line]:
    """The line of every arm less the arm `less`, of runs of that horizon and depth."""
    points: dict[str, list[tuple[int, float]]] = {}
    chosen = [g for g in groups if g.records[0]["config"]["train"]["horizon"] == horizon]
    chosen = [g for g in chosen if g.records[0]["config"]["model"]["depth"] == depth]
    rivals = {(g.sweep, g.point): g for g in chosen if g.arm == less}
    for group in chosen:
        rival = rivals.get((group.sweep, group.point))
        if group.arm != less and rival is not None:
            width = group.records[0]["config"]["model"]["width"]
            points.setdefault(group.arm, []).extend((width, d) for d in group.paired(rival, decoded))
    return {arm: Line(*zip(*sorted(pairs), strict=True)) for arm, pairs in points.items() if _enough(pairs)}


def _enough(pairs: Sequence[tuple[int, float]]) -> bool:
    """Whether a line has a slope and a residual."""
    return len({width for width, _ in pairs}) > 1 and len(pairs) > 2


def table(fitted: dict[str, Line], less: str, beyond: Sequence[int]) -> str:
    """The lines as a markdown table, with what they say at the widths `beyond`."""
    head = ["arm", "widths", "differences", f"less {less}, per doubling", *(f"at {width}" for width in beyond)]
    rows = [head, ["---"] * len(head)]
    for arm, line in fitted.items():
        values = [line.slope(), *(line.at(width) for width in beyond)]
        measured = ", ".join(map(str, sorted(set(line.widths))))
        rows.append([arm, measured, str(len(line.widths)), *(f"{v:+.3f} ± {half:.3f}" for v, half in values)])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def main() -> None:
    """Read the records that the command line names and print the table."""
    parser = argparse.ArgumentParser(description="Differences between arms over the width.")
    parser.add_argument("files", nargs="+", type=Path, help="records of sweeps, JSON lines")
    parser.add_argument("--less", default="plain", help="the arm that the others are compared with")
    parser.add_argument("--horizon", default="flops_of_plain=10", help="runs of this training budget")
    parser.add_argument("--depth", type=int, default=3, help="runs of this depth")
    parser.add_argument("--at", nargs="*", type=int, default=[256, 512], help="widths to extend the line to")
    asked = parser.parse_args()
    print(table(lines(read_groups(asked.files), asked.less, asked.horizon, asked.depth), asked.less, asked.at))


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it, without a word
    main()
