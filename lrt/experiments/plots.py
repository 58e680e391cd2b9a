"""Pictures of groups of recorded runs: the median of the seeds, in a band from the least to the most of them.

Every arm has its colour in all pictures.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from lrt.experiments.groups import RunGroup, mean_and_deviation

Colours = Mapping[str, str]
"""By arm."""
GREY = "#6b7280"
OTHERS = (
    "#d9822b", "#2f6fde", "#1f9d61", "#a855f7", "#dc2626", "#0891b2", "#854d0e", "#db2777", "#65a30d", "#312e81",
)  # fmt: skip
KNOWN = {"plain": GREY, "shift": OTHERS[0], "lrt": OTHERS[1], "LRT": OTHERS[1], "paper": OTHERS[2],
         "the paper's": OTHERS[2]}  # fmt: skip
"""Arms that most reports have: the same colour in all of them."""
MOST_ARMS = len(OTHERS)
"""Arms that can be told apart by colour."""
COST: dict[str, Callable[[dict[str, Any]], float]] = {
    "effective compute, token forwards\nper scaling parameter": lambda r: (
        r["effective_compute"] / r["scaling_parameters"]
    ),
    "CPU seconds of training": lambda r: r["cpu_seconds"],
    "R, tokens per scaling parameter": lambda r: r["tokens"] / r["scaling_parameters"],
}


def arm_colours(pictures: Iterable[Iterable[str]]) -> dict[str, str]:
    """A colour for each arm, the same in all of these pictures; plain is grey, and those of KNOWN have theirs.

    Arms that share a picture differ; of more than MOST_ARMS as few as can be are alike.
    """
    together = [list(dict.fromkeys(names)) for names in pictures]
    colours = {name: KNOWN[name] for names in together for name in names if name in KNOWN}
    for names in sorted(together, key=lambda names: len(names) > MOST_ARMS):
        for name in names:
            colours.setdefault(name, _free_colour([seen for seen in together if name in seen], colours))
    return colours


def _free_colour(pictures: Sequence[Sequence[str]], colours: Colours) -> str:
    """For one more arm of these pictures: free in all uncrowded ones, then rarest, then of no arm in KNOWN."""
    taken = {colours.get(name) for names in pictures if len(names) <= MOST_ARMS for name in names}
    used = Counter(colours.get(name) for names in pictures for name in names)
    free = [colour for colour in OTHERS if colour not in taken] or OTHERS
    return min(free, key=lambda colour: (used[colour], colour in KNOWN.values()))


def decoded(record: dict[str, Any]) -> float:
    """The number that counts."""
    return record["bpb"]["decoded"]


def budgets(groups: Sequence[RunGroup], colours: Colours) -> Figure:
    """Decoded BPB against three measures of cost, a line per arm."""
    figure = Figure(figsize=(9.2, 4.4), layout="constrained")
    arms = list(dict.fromkeys(g.arm for g in groups))
    for axes, (label, cost) in zip(figure.subplots(1, 3, sharey=True), COST.items(), strict=True):
        for arm in arms:
            points = sorted((g for g in groups if g.arm == arm), key=lambda g: g.mean(cost))
            x = [statistics.median(map(cost, g.records)) for g in points]
            _band(axes, x, [[decoded(r) for r in g.records] for g in points], arm, colours)
        axes.set_xlabel(label)
        axes.set_xscale("log")
        low, high = axes.get_xlim()
        decades = LogLocator(subs=(1, 2, 5) if high < 200 * low else (1,))
        axes.xaxis.set_major_locator(decades if high > 5 * low else MaxNLocator(4))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axes.xaxis.set_minor_locator(NullLocator())
        plain_axes(axes)
    figure.axes[0].set_ylabel("decoded bits per byte, lower is better")
    _legend(figure)
    return figure


def bars(groups: Sequence[RunGroup], baseline: RunGroup, colours: Colours) -> Figure:
    """Decoded BPB of every arm less that of the baseline, by seed: bars for means, dots for seeds."""
    figure = Figure(figsize=(8, 0.9 + 0.42 * len(groups)), layout="constrained")
    axes = figure.subplots()
    for place, g in enumerate(reversed(groups)):
        each = g.paired(baseline, decoded)
        mean, deviation = mean_and_deviation(each)
        axes.barh(place, mean, xerr=deviation or None, color=colours[g.arm], alpha=0.75)
        axes.plot(each, [place] * len(each), "k.", ms=4)
    axes.set_yticks(range(len(groups)), [g.arm for g in reversed(groups)])
    axes.axvline(0, color="#444", lw=1)
    axes.set_xlabel(f"left is better: decoded bits per byte less those of {baseline.arm}")
    plain_axes(axes)
    return figure


def positions(groups: Sequence[RunGroup], colours: Colours) -> Figure:
    """Decoded BPB by the target's position in the row."""
    titles = "position in the row", "decoded bits per byte, lower is better"
    return _lines(groups, lambda r: _without_lone_end(r["bpb_by_position"]), colours, titles)


def _without_lone_end(by_position: dict[str, float]) -> dict[str, float]:
    """Without a last bin of one position, which older records have: beside wide ones it is noise."""
    last = next(reversed(by_position), "")
    return {k: x for k, x in by_position.items() if k != last or "-" in k or len(by_position) < 3}


def convergence(groups: Sequence[RunGroup], colours: Colours) -> Figure:
    """Largest relative change of any memory vector in each Jacobi sweep from zero memory."""
    swept = [g for g in groups if g.records[0]["sweep_residuals"]]
    moves = any(x > 0 for g in swept for r in g.records for x in r["sweep_residuals"])
    titles = "sweep", "largest relative change of the memory"
    figure = _lines(swept, lambda r: {str(k): x for k, x in enumerate(r["sweep_residuals"], 1)}, colours, titles)
    figure.axes[0].set_yscale("log" if moves else "linear")  # which a memory that does not move has no place on
    return figure


def lengths(groups: Sequence[RunGroup], colours: Colours) -> Figure:
    """Accuracy of synthetic tasks by length, decoded with memory."""
    titles = "length; the first is the one trained with", "share of answers right, higher is better"
    figure = _lines(groups, lambda r: {n: shares["all"] for n, shares in r["accuracy"].items()}, colours, titles)
    figure.axes[0].set_ylim(0, 1.03)
    return figure


def _lines(
    groups: Sequence[RunGroup],
    values: Callable[[dict[str, Any]], dict[str, float]],
    colours: Colours,
    titles: tuple[str, str],
) -> Figure:
    """A line per arm through labelled values; labels that only some records have are left out."""
    figure = Figure(figsize=(7.2, 4.8), layout="constrained")
    axes = figure.subplots()
    records = [values(r) for g in groups for r in g.records]
    labels = [label for label in records[0] if all(label in r for r in records)]
    for g in groups:
        _band(axes, labels, [[values(r)[label] for r in g.records] for label in labels], g.arm, colours)
    axes.set_xlabel(titles[0])
    axes.set_ylabel(titles[1])
    plain_axes(axes)
    _legend(figure)
    return figure


def _band(axes: Any, x: Sequence[Any], seeds: Sequence[Sequence[float]], arm: str, colours: Colours) -> None:
    """The median at every x, and a band around it where there are several seeds."""
    axes.plot(x, [statistics.median(ys) for ys in seeds], "o-", ms=4, color=colours[arm], label=arm)
    if any(len(ys) > 1 for ys in seeds):
        axes.fill_between(x, [min(ys) for ys in seeds], [max(ys) for ys in seeds], color=colours[arm], alpha=0.15, lw=0)


def _legend(figure: Figure) -> None:
    """Above the picture, so that it covers no line; in as many columns as there is room for."""
    handles, names = figure.axes[0].get_legend_handles_labels()
    letters = max(map(len, names), default=1) + 6
    columns = max(1, min(len(names), int(figure.get_figwidth() * 12 / letters)))
    figure.legend(handles, names, loc="outside upper left", ncols=columns, frameon=False, fontsize=9)


def plain_axes(axes: Any) -> None:
    """A faint grid, no frame above and on the right."""
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
