"""Tables of suites: one for each, a column for every run's arm and mode, a row for every task or group of tasks."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

from lrt.experiments.groups import Record, RunGroup, mean_and_deviation
from lrt.utils.tables import Table


class Figure(NamedTuple):
    """A number and its standard error over items."""

    value: float
    error: float


TITLES = {"core": "CORE, centred accuracy", "blimp": "BLiMP, accuracy"}


def suite_tables(groups: Sequence[RunGroup], baseline: str) -> Iterator[tuple[str, Table]]:
    """Headings and tables of groups whose records are of suites."""
    for sweep, suite in dict.fromkeys((g.sweep, g.records[0]["suite"]) for g in groups):
        same = [g for g in groups if (g.sweep, g.records[0]["suite"]) == (sweep, suite)]
        of = " of the normalised text" if any(r.get("lost") for g in same for r in g.records) else ""
        yield f"{sweep}: {TITLES.get(suite, suite)}{of}", _table(same, baseline)


def tables_of(groups: Sequence[RunGroup]) -> list[tuple[str, Table]]:
    """Headings and tables of one suite's groups, whichever it is."""
    if "suite" in groups[0].records[0]:
        return list(suite_tables(groups, groups[0].arm))
    return [(groups[0].sweep, length_table(groups))]


def length_table(groups: Sequence[RunGroup]) -> Table:
    """Accuracy of a synthetic task by length, a row an arm."""
    sizes = sorted({size for g in groups for r in g.records for size in r["accuracy"]}, key=int)
    rows = [
        [g.arm, str(len(g.records)), _cpu(g), *(f"{_at_size(g, n, 'all')} / {_at_size(g, n, 'last')}" for n in sizes)]
        for g in groups
    ]
    return Table(["training", "seeds", "CPU s", *(f"{n} symbols: all / last" for n in sizes)], rows)


def _cpu(g: RunGroup) -> str:
    """CPU seconds of training, which records of sweeps hold."""
    return f"{g.mean(lambda r: r['cpu_seconds']):.0f}" if "cpu_seconds" in g.records[0] else ""


def _at_size(g: RunGroup, size: str, which: str) -> str:
    """Accuracy at a length, over seeds with their deviation, or of one run with its error; empty if unknown."""
    if any(size not in record["accuracy"] for record in g.records):
        return ""
    mean = f"{g.mean(lambda r: r['accuracy'][size][which]):.1%}"
    error = g.records[0]["accuracy"][size].get(f"{which}_error")  # older records have none
    if len(g.records) > 1:
        error = g.deviation(lambda r: r["accuracy"][size][which])
    return mean if error is None else f"{mean} ± {100 * error:.1f}"


def _table(groups: Sequence[RunGroup], baseline: str) -> Table:
    names = dict.fromkeys(name for g in groups for name in _figures(g.records[0]))
    rows = {name: [_cell(g, name) for g in groups] for name in names}
    first, *others = rows
    less = [_less(g, _base(g, groups, baseline), first) for g in groups]
    named = {key for key in ("mode", "train.horizon", "limit") if key != "train.horizon" or _differs(groups, key)}
    differences = [[f"less {baseline}", *less]] if any(less) else []
    body = [[first, *rows[first]], *differences, *([name, *rows[name]] for name in others)]
    count = len(groups[0].records[0]["parts"])
    return Table([f"{count} parts", *(_title(g, named) for g in groups)], body)


def _differs(groups: Sequence[RunGroup], key: str) -> bool:
    return len({g.records[0]["grid"].get(key) for g in groups}) > 1


def _base(g: RunGroup, groups: Sequence[RunGroup], baseline: str) -> RunGroup | None:
    """The baseline's group at the same point; None where there is none, or that is `g`."""
    same = [b for b in groups if b.arm == baseline and b.point == g.point and b is not g]
    return same[0] if same else None


def _title(g: RunGroup, named: Collection[str]) -> str:
    grid = g.records[0]["grid"]
    point = [f"{value} items a part" if key == "limit" else value for key, value in grid.items() if key in named]
    return ", ".join([g.arm, *point, f"{len(g.records)} seed{'s' * (len(g.records) > 1)}"])


def _figures(record: Record) -> dict[str, Figure]:
    """The figures of a suite's record by their row's name, the whole first."""
    overall: dict[str, Any] = record["whole"]
    if record["suite"] == "core":
        parts = {name: Figure(p["centred"], p["centred_error"]) for name, p in record["parts"].items()}
        name = "CORE" if overall["whole"] else f"mean of {len(parts)} tasks"
        return {name: Figure(overall["centred"], overall["centred_error"])} | parts
    groups = {**{f"field {k}": v for k, v in overall["fields"].items()}, **overall["phenomena"]}
    return {"all": Figure(overall["accuracy"], overall["error"])} | {
        name: Figure(part["accuracy"], part["error"]) for name, part in groups.items()
    }


def _cell(g: RunGroup, row: str) -> str:
    figures = [_figures(record).get(row) for record in g.records]
    measured = [figure for figure in figures if figure is not None]
    if len(measured) < len(figures):  # a mean of some seeds would stand under the number of all
        return ""
    spread = statistics.stdev(f.value for f in measured) if len(measured) > 1 else measured[0].error
    return f"{statistics.fmean(f.value for f in measured):.1%} ± {spread:.1%}"


def _less(g: RunGroup, base: RunGroup | None, row: str) -> str:
    """The difference from the baseline: paired by seed, or with the error of two samples where there is one pair."""
    if base is None or any(row not in _figures(r) for x in (g, base) for r in x.records):
        return ""
    pairs = g.paired(base, lambda r: _figures(r)[row].value)
    if not pairs:
        return ""
    mean, deviation = mean_and_deviation(pairs)
    own, other = (_figures(x.records[0])[row].error for x in (g, base))
    return f"{mean:+.1%} ± {deviation if len(pairs) > 1 else (own**2 + other**2) ** 0.5:.1%}"
