"""A schedule drawn: passes down, positions across, the exact prefix marked; as text, and as a picture by matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lrt.passes import Pass, exact_prefix, memory_only, token_forwards
from lrt.schedule import Curriculum, Schedule, effective_forwards, raw_forwards

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LOSS, GRADIENT, SETTLING, ABSENT = "█", "▓", "░", "·"
LEGEND = {LOSS: "gradient and loss", GRADIENT: "gradient, no loss", SETTLING: "no gradient (settles the memory)"}
COLOURS = {ABSENT: "#f3f4f6", LOSS: "#2f6fde", GRADIENT: "#9dbcf2", SETTLING: "#b8bcc4"}
PREFIX = "#d9822b"
MOST = 40
"""Passes drawn; the rest are counted."""
FORMATS = ("svg", "png", "pdf")


def figures(schedule: Schedule, length: int) -> str:
    """One line of what the schedule costs and gives."""
    passes = schedule.passes(length)
    return (
        f"{len(passes)} pass{'es' * (len(passes) > 1)}, {token_forwards(passes, length):.2f} token forwards, "
        f"{effective_forwards(schedule, length):.2f} effective at most, exact prefix {exact_prefix(passes, length)}"
    )


def draws(plan: Curriculum, length: int) -> str:
    """One line on what a step costs in the mean, and how often each schedule is drawn; empty if there is only one."""
    shares = plan.shares()
    if len(shares) == 1:
        return ""
    often = ", ".join(f"{drawn} {share:.0%}" for drawn, share in shares[:MOST])
    means = f"{raw_forwards(plan, length):.2f} token forwards, {effective_forwards(plan, length):.2f} effective"
    adapts = any(schedule.adaptive for schedule, _ in plan.stages)
    which = "mean of the draws" + (", if every budget is used up" if adapts else "")
    return f"{which}: {means} at most ({often}{', ..' if len(shares) > MOST else ''})"


def mark(p: Pass, position: int) -> str:
    """How `p` treats a position."""
    if position not in p.positions:
        return ABSENT
    return LOSS if p.weight > 0 else GRADIENT if p.grad else SETTLING


ASCII = str.maketrans({LOSS: "#", GRADIENT: "+", SETTLING: "-", ABSENT: "."})


def as_text(schedule: Schedule, length: int) -> str:
    """The drawing for a terminal; `.translate(ASCII)` for one that spells nothing else."""
    passes = schedule.passes(length)
    early = memory_only(passes)
    width = max(len("positions"), *(len(str(p)) for p in passes))
    tens = "".join(str(t // 10 % 10) if t % 10 == 0 else " " for t in range(length))
    lines = [
        f"{schedule} over {length} positions: {figures(schedule, length)}",
        "",
        f"{'pass':>4}  {'positions':<{width}}  {tens}".rstrip(),
    ]
    lines.append(" " * (8 + width) + "".join(str(t % 10) for t in range(length)))
    for i, p in enumerate(passes[:MOST]):
        row = "".join(mark(p, t) for t in range(length))
        lines.append(f"{i:>4}  {p!s:<{width}}  {row}{'  stops at the source block' if early[i] else ''}")
    if len(passes) > MOST:
        lines.append(f"      ... and {len(passes) - MOST} more")
    lines.append(f"{'exact':>4} {'':<{width}}  {'^' * exact_prefix(passes, length)}")
    used = {mark(p, p.positions[0]) for p in passes}
    return "\n".join([*lines, "", "  ".join(f"{sign} {text}" for sign, text in LEGEND.items() if sign in used)])


def save(schedule: Schedule, length: int, out: Path) -> None:
    """Write the picture to `out`, in the format of its name; ValueError for a name that ends in none of FORMATS."""
    import matplotlib

    if out.suffix[1:].lower() not in FORMATS:
        raise ValueError(f"{out} does not say which format; let it end in {', '.join('.' + x for x in FORMATS)}")
    fixed: dict[Any, str] = {
        "svg.fonttype": "none",
        "svg.hashsalt": str(schedule),
    }  # the same schedule gives the same file
    dated = {"png": {"Software": None}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}[out.suffix[1:].lower()]
    with matplotlib.rc_context(fixed):
        picture(schedule, length).savefig(out, dpi=150, metadata=dated)


def picture(schedule: Schedule, length: int) -> Figure:
    """The drawing as a figure: a row per pass, a column per position."""
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure

    passes = schedule.passes(length)
    shown, signs = passes[:MOST], list(COLOURS)
    cells = [[signs.index(mark(p, t)) for t in range(length)] for p in shown]
    side = min(0.22, 14 / length)  # of a cell, in inches
    figure = Figure(figsize=(2.0 + side * max(length, 16), 1.9 + 0.24 * len(shown)), layout="constrained")
    axes = figure.subplots()
    colours = ListedColormap([COLOURS[sign] for sign in signs])
    axes.pcolormesh(cells, cmap=colours, vmin=-0.5, vmax=len(signs) - 0.5, edgecolors="white", linewidth=6 * side)
    axes.plot([0.05, exact_prefix(passes, length) - 0.05], [len(shown) + 0.3] * 2, color=PREFIX, linewidth=3)
    axes.set(xlim=(0, length), ylim=(len(shown) + 0.6, 0))
    title = f"{schedule} over {length} positions\n{figures(schedule, length)}"
    figure.suptitle(title, x=0.02, ha="left", fontsize=9.5)
    _label(axes, [_named(i, p, early) for i, (p, early) in enumerate(zip(shown, memory_only(passes), strict=False))])
    _legend(figure, {mark(p, p.positions[0]) for p in passes}, len(passes) - len(shown))
    return figure


def _named(number: int, p: Pass, stops_early: bool) -> str:
    return f"pass {number}: {p}{', blocks 1..s' if stops_early else ''}"


def _label(axes: Axes, rows: list[str]) -> None:
    """Positions above, passes beside; no frame."""
    length = int(axes.get_xlim()[1])
    every = 1 if length <= 32 else 8 if length <= 128 else 32
    axes.set_xticks([t + 0.5 for t in range(0, length, every)], [str(t) for t in range(0, length, every)], fontsize=8.5)
    axes.set_yticks([i + 0.5 for i in range(len(rows))], rows, fontsize=9.5)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _legend(figure: Figure, used: set[str], left_out: int) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Patch | Line2D] = [Patch(color=COLOURS[sign], label=LEGEND[sign]) for sign in LEGEND if sign in used]
    handles.append(Line2D([], [], color=PREFIX, linewidth=3, label="exact prefix"))
    title = f"and {left_out} more passes" if left_out else None
    figure.legend(handles=handles, loc="outside lower left", ncols=2, fontsize=9, frameon=False, title=title)
