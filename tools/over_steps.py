"""How runs change while they train: decoded bits per byte, contraction, what context gains, the memory's weights.

    python tools/over_steps.py runs/sweeps/seeds_python/*/ --out results/over_steps_python.jsonl
    python tools/over_steps.py results/over_steps_python.jsonl --picture over_steps.png

The runs of a sweep, trained with `train.eval_every`, and for the weights with `train.save_every` and `train.keep`.
Prints a markdown table: a row for each run and evaluation.
"""

from __future__ import annotations

import argparse
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from lrt.experiments.curves import read_run
from lrt.experiments.pages import png
from lrt.experiments.plots import arm_colours, plain_axes
from lrt.model.parameters import Role, role
from lrt.training.checkpoint import checkpoints, open_checkpoint
from lrt.utils.files import read_jsonl, write_jsonl
from lrt.utils.tables import Table

Row = dict[str, Any]
FIGURES = {
    "decoded": "decoded bits per byte",
    "contraction": "contraction (a sweep's factor)",
    "early_less_late": "bits per byte, early less late",
    "matrices": "root mean square of W_K and W_V",
    "gamma": "mean of |gamma|",
}
"""Keys of a row that hold a figure, and what it is."""
EARLY = "8-15"
"""Positions in the row that count as early; the last bin of positions is late."""


def rows_of(path: Path) -> list[Row]:
    """The rows of a file that `--out` has written, or of a run's folder."""
    if path.is_file():
        return [row for _, row in read_jsonl(path, "rows")]
    weights = {found.step: found.weights() for found in map(open_checkpoint, checkpoints(path))}
    arm, _, seed = path.name.rpartition("-seed")
    return [_row(arm, int(seed), event, weights.get(event["step"], {})) for event in read_run(path).evals]


def _row(arm: str, seed: int, event: Row, weights: dict[str, Tensor]) -> Row:
    bpb = event["bpb"]
    by_position = bpb["by_position"]
    return {
        "arm": arm, "seed": seed, "step": event["step"], "decoded": bpb["decoded"], "contraction": bpb["contraction"],
        "early_less_late": by_position[EARLY] - by_position[list(by_position)[-1]],
        "matrices": _power_mean(_of_role(weights, "memory matrix"), 2),
        "gamma": _power_mean(_of_role(weights, "gamma"), 1),
    }  # fmt: skip


def _of_role(weights: dict[str, Tensor], wanted: Role) -> Tensor:
    """All numbers of the recurrent memory's parameters of a role; a token shift's are left out."""
    found = [x.flatten() for name, x in weights.items() if role(name) == wanted and "shift" not in name]
    return torch.cat(found) if found else torch.empty(0)


def _power_mean(x: Tensor, power: int) -> float | None:
    """The root of the mean of |x|^power: 1 is the mean of |x|, 2 the root mean square. None of no numbers."""
    return float(x.double().abs().pow(power).mean() ** (1 / power)) if x.numel() else None


def table(rows: Sequence[Row]) -> Table:
    """A line for each row."""
    cells = [
        [row["arm"], str(row["seed"]), str(row["step"]), *map(_cell, (row[key] for key in FIGURES))] for row in rows
    ]
    return Table(["arm", "seed", "step", *FIGURES.values()], cells)


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def picture(rows: Sequence[Row]) -> Figure:
    """Every figure over the steps: a colour for each arm, a line for each of its seeds."""
    figure = Figure(figsize=(11, 6), layout="constrained")
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    colours = arm_colours([arms])
    runs = dict.fromkeys((row["arm"], row["seed"]) for row in rows)
    grid = figure.subplots(2, 3, sharex=True).flatten()
    for axes, (key, label) in zip(grid, FIGURES.items(), strict=False):
        for arm, seed in runs:
            points = [(r["step"], r[key]) for r in rows if (r["arm"], r["seed"]) == (arm, seed) and r[key] is not None]
            first = seed == min(s for a, s in runs if a == arm)
            axes.plot(*zip(*points, strict=True), color=colours[arm], lw=1.2, label=arm if first else None)
        axes.set_title(label, fontsize=10)
        plain_axes(axes)
    for axes in grid[3:]:
        axes.set_xlabel("step")
    grid[-1].axis("off")
    grid[-1].legend(*grid[0].get_legend_handles_labels(), loc="center", frameon=False)
    return figure


def main() -> None:
    """Read what the command line names; print the table, write what was asked for."""
    parser = argparse.ArgumentParser(description="How runs change over their steps.")
    parser.add_argument(
        "runs", nargs="+", type=Path, help="folders of a sweep's runs, or a file that --out has written"
    )
    parser.add_argument("--out", type=Path, help="write the rows, JSON lines")
    parser.add_argument("--picture", type=Path, help="draw them, PNG")
    asked = parser.parse_args()
    rows = [row for path in asked.runs for row in rows_of(path)]
    print(table(rows).markdown())
    if asked.out:
        write_jsonl(asked.out, rows)
    if asked.picture:
        asked.picture.write_bytes(png(picture(rows)))


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it, without a word
    main()
