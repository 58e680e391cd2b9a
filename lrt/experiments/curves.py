"""Curves of single runs, read back from their metrics.jsonl: loss and bits per byte along the training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from lrt.experiments.plots import arm_colours, plain_axes
from lrt.utils.files import read_jsonl

AXES = {
    "tokens": "tokens seen",
    "effective_forwards": "effective compute (token forwards)",
    "seconds": "training seconds",
}
SMOOTH = 0.8


@dataclass(frozen=True)
class Recorded:
    """A run read back from its folder's metrics.jsonl."""

    name: str
    train: list[dict[str, Any]]
    evals: list[dict[str, Any]]


def read_run(folder: Path) -> Recorded:
    """The events of a run; a missing or damaged file raises ValueError naming the line."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(f"{path} does not exist; give the folder of a run")
    events = [event for _, event in read_jsonl(path, "metrics", loose=True, torn=True)]
    kinds = {kind: [e for e in events if e.get("kind") == kind] for kind in ("train", "eval")}
    return Recorded(folder.name, kinds["train"], kinds["eval"])


def curves(runs: Sequence[Recorded]) -> Figure:
    """Training loss (above) and decoded validation BPB (below) of every run on the three axes."""
    figure = Figure(figsize=(9.2, 6), layout="constrained")
    grid, colours = figure.subplots(2, 3, sharex="col", sharey="row"), arm_colours([[run.name for run in runs]])
    for column, (key, label) in enumerate(AXES.items()):
        for run in runs:
            loss, bpb, colour = grid[0][column], grid[1][column], colours[run.name]
            loss.plot(
                [e[key] for e in run.train], _smooth([e["loss"] for e in run.train]), color=colour, label=run.name
            )
            x = [e[key] for e in run.evals]
            bpb.plot(x, [e["bpb"]["decoded"] for e in run.evals], "o-", ms=3.5, color=colour, label=run.name)
            bpb.plot(x, [e["bpb"]["zero_memory"] for e in run.evals], ":", lw=1, color=colour)
        grid[1][column].set_xlabel(label)
        grid[1][column].xaxis.set_major_formatter(EngFormatter(sep=""))
        grid[1][column].xaxis.set_major_locator(MaxNLocator(5))
        for axes in grid[:, column]:
            plain_axes(axes)
    _limit(grid[0][0], [_smooth([e["loss"] for e in run.train]) for run in runs])
    _limit(grid[1][0], [[e["bpb"]["decoded"] for e in run.evals] for run in runs])
    grid[0][0].set_ylabel("training loss, nats per token\n(weighted mean over the passes)")
    grid[1][0].set_ylabel("validation bits per byte\ndecoded (solid), zero memory (dotted)")
    grid[1][0].legend(frameon=False, fontsize=8)
    return figure


def _smooth(values: Sequence[float]) -> list[float]:
    """Each value a fifth of itself, and the rest what came before."""
    return list(accumulate(values, lambda before, value: SMOOTH * before + (1 - SMOOTH) * value))


def _limit(axes: Any, series: Sequence[Sequence[float]]) -> None:
    """Show where the curves settle rather than where they begin; what lies above runs out of the frame."""
    ordered = sorted(y for ys in series for y in ys)
    if ordered:
        low = ordered[0]
        high = max(ordered[int(0.85 * (len(ordered) - 1))], *(ys[-1] for ys in series if ys))
        axes.set_ylim(low - 0.08 * (high - low) - 1e-3, high + 0.2 * (high - low) + 1e-3)
