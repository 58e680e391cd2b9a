"""A report in words: which arm is best, by how much, and whether the seeds agree on it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from lrt.evaluation.score_names import signed
from lrt.experiments.groups import RunGroup, mean_and_deviation
from lrt.experiments.plots import decoded

NO_DIFFERENCE = 0.03
"""Bits per byte by which single seeds of the same arm differ."""
MOST_COMMANDS = 3


def report_verdict(groups: Sequence[RunGroup], baseline: str) -> list[str]:
    """A sentence or two for every point of every sweep."""
    points = dict.fromkeys((g.sweep, g.point) for g in groups)
    members = {p: [g for g in groups if (g.sweep, g.point) == p] for p in points}
    return [f"{', '.join(filter(None, p))}: {_of_point(arms, baseline)}" for p, arms in members.items()]


def _of_point(arms: list[RunGroup], baseline: str) -> str:
    base = baseline_of(arms, baseline)
    return _of_task(arms, base) if "accuracy" in arms[0].records[0] else _of_text(arms, base)


def baseline_of(arms: Sequence[RunGroup], name: str) -> RunGroup:
    """The arm of that name, or the first."""
    return next((g for g in arms if g.arm == name), arms[0])


def _of_text(arms: list[RunGroup], base: RunGroup) -> str:
    ordered = sorted(arms, key=lambda g: g.mean(decoded))
    best = ordered[0]
    of = " of the normalised text" if any(r.get("normalised") for g in arms for r in g.records) else ""
    text = f"{_called(best)} decodes best, {best.mean(decoded):.3f} bits per byte{of} ({_seeds(len(best.records))})."
    if best is not base:
        text += f" It is {_difference(best, base)}."
    elif len(arms) > 1:
        text += f" The next, {_called(ordered[1])}, is {_difference(ordered[1], base)}."
    return text + _beside_shift(ordered, base)


def _beside_shift(ordered: Sequence[RunGroup], base: RunGroup) -> str:
    """The best recurrent arm against the token shift, where both were run: what the recurrence alone buys."""
    shift = next((g for g in ordered if g.source == 0), base)
    recurrent = next((g for g in ordered if g.source), base)
    if base in (shift, recurrent):  # then the sentences before have said it, or there is nothing to say
        return ""
    return f" The best with a recurrence, {_called(recurrent)}, is {_difference(recurrent, shift)}."


def _difference(arm: RunGroup, base: RunGroup) -> str:
    each = arm.paired(base, decoded)
    if not each:
        return f"of other seeds than {_called(base)}, so not compared"
    mean, deviation = mean_and_deviation(each)
    text = signed(mean, 3) + (f" ± {deviation:.3f}" if len(each) > 1 else "") + f" from {_called(base)}"
    if len(each) == 1:
        return f"{text}: one seed, and seeds differ by {NO_DIFFERENCE}"
    agree = all(x < 0 for x in each) or all(x > 0 for x in each)
    if agree and abs(mean) > deviation:
        return f"{text}, all {len(each)} seeds of one sign"
    return f"{text}: no difference beyond the seeds' spread"


def _of_task(arms: list[RunGroup], base: RunGroup) -> str:
    common = set.intersection(*(set(r["accuracy"]) for g in arms for r in g.records))
    if not common:
        return "the arms were asked at different lengths: nothing to compare"
    length = max(common, key=int)

    def share(g: RunGroup) -> float:
        return g.mean(lambda r: r["accuracy"][length]["all"])

    best = max(arms, key=share)
    text = f"at length {length}, the longest, {_called(best)} answers most: {share(best):.1%} right"
    return f"{text} ({_seeds(len(best.records))})" + (
        f"; {_called(base)} {share(base):.1%}" if best is not base else ""
    )


def _called(g: RunGroup) -> str:
    """An arm's name; in quotes where a comma within would be read as the sentence's."""
    return f"“{g.arm}”" if "," in g.arm else g.arm


def _seeds(count: int) -> str:
    return f"{count} seeds" if count > 1 else "one seed"


def next_commands(files: Sequence[Path], groups: Sequence[RunGroup], baseline: str) -> list[str]:
    """What to do with the report next, ready to copy."""
    records = shlex.join(map(str, files))
    others = [g.arm for g in groups if g.arm != baseline_of(groups, baseline).arm]
    compare = [f"lrt report {records} --baseline {shlex.quote(others[0])}"] if others else []
    sweeps = [Path("sweeps") / f"{name}.toml" for name in dict.fromkeys(g.sweep for g in groups)]
    return [*compare, *(f"lrt sweep {file} --jobs 2" for file in sweeps if file.is_file())][:MOST_COMMANDS]
