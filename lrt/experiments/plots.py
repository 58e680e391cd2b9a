"""Pictures of groups of recorded runs. Dots are single seeds, lines and bars their mean, whiskers one deviation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from lrt.experiments.groups import RunGroup, seeds_and_mean
from lrt.experiments.pages import COLOURS

COST: dict[str, Callable[[dict[str, Any]], float]] = {
    "effective compute, token forwards per scaling parameter": lambda r: (
        r["effective_compute"] / r["scaling_parameters"]
    ),
    "CPU seconds of training": lambda r: r["cpu_seconds"],
    "R, tokens per scaling parameter": lambda r: r["tokens"] / r["scaling_parameters"],
}


def decoded(record: dict[str, Any]) -> float:
    """The number that counts."""
    return record["bpb"]["decoded"]


def budgets(groups: Sequence[RunGroup]) -> Figure:
    """Decoded BPB against three measures of cost, a line per arm."""
    figure = Figure(figsize=(13, 4.4), layout="constrained")
    arms = list(dict.fromkeys(g.arm for g in groups))[: len(COLOURS)]
    for axes, (label, cost) in zip(figure.subplots(1, 3, sharey=True), COST.items(), strict=True):
        for arm, colour in zip(arms, COLOURS, strict=False):
            points = sorted((g for g in groups if g.arm == arm), key=lambda g: g.mean(cost))
            x, y = [g.mean(cost) for g in points], [g.mean(decoded) for g in points]
            axes.errorbar(x, y, [g.deviation(decoded) for g in points], color=colour, marker="o", ms=4, label=arm)
            for g in points:
                axes.plot([cost(r) for r in g.records], [decoded(r) for r in g.records], ".", ms=3, color=colour)
        axes.set_xlabel(label)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axes.xaxis.set_minor_locator(NullLocator())
        _plain_axes(axes)
    figure.axes[0].set_ylabel("decoded bits per byte")
    figure.axes[0].legend(frameon=False, fontsize=8)
    return figure


def bars(groups: Sequence[RunGroup], baseline: RunGroup) -> Figure:
    """Decoded BPB of every arm less that of the baseline, seed by seed where both have it."""
    figure = Figure(figsize=(9, 0.6 + 0.42 * len(groups)), layout="constrained")
    axes = figure.subplots()
    for place, g in enumerate(reversed(groups)):
        each = g.paired(baseline, decoded)
        mean, deviation = seeds_and_mean(each)
        axes.barh(place, mean, xerr=deviation or None, color=COLOURS[2] if mean < 0 else COLOURS[1], alpha=0.75)
        axes.plot(each, [place] * len(each), "k.", ms=4)
    axes.set_yticks(range(len(groups)), [g.arm for g in reversed(groups)])
    axes.axvline(0, color="#444", lw=1)
    axes.set_xlabel(f"decoded bits per byte less those of: {baseline.arm}")
    _plain_axes(axes)
    return figure


def positions(groups: Sequence[RunGroup]) -> Figure:
    """Decoded BPB by the target's position in the row."""
    figure = _lines(groups, lambda r: r["bpb_by_position"])
    figure.axes[0].set_xlabel("position in the row")
    figure.axes[0].set_ylabel("decoded bits per byte")
    return figure


def convergence(groups: Sequence[RunGroup]) -> Figure:
    """Largest relative change of any memory vector in each Jacobi sweep from zero memory."""
    figure = Figure(figsize=(8, 4.4), layout="constrained")
    axes = figure.subplots()
    for g, colour in zip(groups, COLOURS, strict=False):
        for record in g.records if g.records[0]["sweep_residuals"] else ():
            first = record is g.records[0]
            sweeps = range(1, len(record["sweep_residuals"]) + 1)
            axes.plot(sweeps, record["sweep_residuals"], "o-", ms=3, color=colour, label=g.arm if first else None)
    axes.set_yscale("log")
    axes.set_xlabel("sweep")
    axes.set_ylabel("largest relative change of the memory")
    axes.legend(frameon=False, fontsize=8)
    _plain_axes(axes)
    return figure


def lengths(groups: Sequence[RunGroup]) -> Figure:
    """Accuracy of synthetic tasks by length, decoded with memory."""
    figure = _lines(groups, lambda r: {length: found["all"] for length, found in r["accuracy"].items()})
    figure.axes[0].set_xlabel("length; the first is the one trained with")
    figure.axes[0].set_ylabel("share of answers right")
    figure.axes[0].set_ylim(0, 1.03)
    return figure


def _lines(groups: Sequence[RunGroup], values: Callable[[dict[str, Any]], dict[str, float]]) -> Figure:
    """A line per arm through the seeds' means of labelled values."""
    figure = Figure(figsize=(8, 4.4), layout="constrained")
    axes = figure.subplots()
    for g, colour in zip(groups, COLOURS, strict=False):
        labels = list(values(g.records[0]))
        means = [g.mean(lambda r, label=label: values(r)[label]) for label in labels]
        axes.plot(labels, means, "o-", ms=4, color=colour, label=g.arm)
    axes.legend(frameon=False, fontsize=8)
    _plain_axes(axes)
    return figure


def _plain_axes(axes: Any) -> None:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
