"""The drawn pictures of the documentation: python tools/pictures.py docs/img

The idea of the model, and the schedules that docs/how_it_works.md explains. The same code gives the same files.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from lrt.experiments import draw
from lrt.schedule import Schedule

SCHEDULES = ("parallel", "sequential", "interleaved-2", "interleaved-4", "refinement-2", "settled-2")
TOKENS = ("It", "was", "the", "best")
BLOCKS, SOURCE = 4, 3
GREY, DARK, MEMORY, SOURCE_FILL = "#d7dae0", "#4b5563", "#d9822b", "#f3d3b0"
WIDE, HIGH, STEP, FLOOR = 1.32, 0.62, 2.3, 0.95
"""Sizes in the drawing's own units: a block, and the distances between columns and blocks."""


def left_of(column: int) -> float:
    return column * STEP


def bottom_of(block: int) -> float:
    """Block 0 is the embedding, BLOCKS + 1 the head."""
    return block * FLOOR


def box(axes: Axes, column: int, block: int, text: str, fill: str) -> None:
    corner = (left_of(column), bottom_of(block))
    axes.add_patch(FancyBboxPatch(corner, WIDE, HIGH, boxstyle="round,pad=0,rounding_size=0.12", fc=fill, ec=DARK))
    axes.text(corner[0] + WIDE / 2, corner[1] + HIGH / 2, text, ha="center", va="center", fontsize=9)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str, **style) -> None:
    axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": colour, "lw": 1.3, **style})


def column(axes: Axes, number: int, token: str) -> None:
    """One token: embedding, blocks, head, and the residual stream that climbs through them."""
    box(axes, number, 0, f"“{token}”", "white")
    for block in range(1, BLOCKS + 1):
        box(axes, number, block, f"block {block}", SOURCE_FILL if block == SOURCE else GREY)
    box(axes, number, BLOCKS + 1, "next token", "white")
    middle = left_of(number) + WIDE / 2
    for block in range(BLOCKS + 1):
        arrow(axes, (middle, bottom_of(block) + HIGH), (middle, bottom_of(block + 1)), DARK)


def memory(axes: Axes, number: int) -> None:
    """From the source block of one column into every block of the next."""
    start = (left_of(number) + WIDE, bottom_of(SOURCE) + HIGH / 2)
    rail = left_of(number) + WIDE + (STEP - WIDE) * 0.5
    axes.plot([start[0], rail], [start[1]] * 2, color=MEMORY, lw=2.2)
    heights = [bottom_of(block) + HIGH / 2 for block in range(1, BLOCKS + 1)]
    axes.plot([rail, rail], [heights[0], heights[-1]], color=MEMORY, lw=2.2)
    for height in heights:
        arrow(axes, (rail, height), (left_of(number + 1), height), MEMORY, lw=2.0, shrinkA=0, shrinkB=0)


def idea() -> Figure:
    """Four tokens side by side; the source block's state goes one token to the right."""
    figure = Figure(figsize=(5.6, 4.6), layout="constrained")
    axes = figure.subplots()
    for number, token in enumerate(TOKENS):
        column(axes, number, token)
        if number + 1 < len(TOKENS):
            memory(axes, number)
    top = bottom_of(BLOCKS + 1) + HIGH
    axes.set(xlim=(-0.3, left_of(len(TOKENS) - 1) + WIDE + 0.3), ylim=(-1.75, top + 0.25), aspect="equal")
    axes.axis("off")
    axes.text(
        0,
        -0.3,
        "orange: the memory, one vector; it leaves block 3\nand enters all blocks of the next token",
        fontsize=10,
        va="top",
    )
    axes.text(0, -1.25, "not drawn: attention, as in every transformer", fontsize=10, va="top", color=DARK)
    return figure


def main(folder: Path) -> None:
    """Draw everything into `folder`."""
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "idea"}):
        idea().savefig(folder / "idea.svg", metadata={"Date": None})
    for name in SCHEDULES:
        draw.save(Schedule.parse(name), 16, folder / f"schedule-{name}.svg")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
