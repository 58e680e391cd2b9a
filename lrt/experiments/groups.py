"""Recorded runs grouped by what differs only in the seed: means, deviations, paired differences."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lrt.utils.files import read_jsonl, require_fields

Record = dict[str, Any]
Measure = Callable[[Record], float]


@dataclass(frozen=True)
class RunGroup:
    """Runs of one arm at one point of a grid, one per seed."""

    sweep: str
    point: str
    arm: str
    records: tuple[Record, ...]

    def mean(self, measure: Measure) -> float:
        """Mean over the seeds."""
        return statistics.fmean(measure(r) for r in self.records)

    def deviation(self, measure: Measure) -> float:
        """Standard deviation over the seeds (n - 1); 0 for a single one."""
        return seeds_and_mean([measure(r) for r in self.records])[1]

    def paired(self, other: RunGroup, measure: Measure) -> list[float]:
        """Differences from `other`, one for each seed that both have."""
        theirs = {r["seed"]: measure(r) for r in other.records}
        return [measure(r) - theirs[r["seed"]] for r in self.records if r["seed"] in theirs]


def seeds_and_mean(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation (n - 1) of any number of values; (nan, 0) of none."""
    mean = statistics.fmean(values) if values else float("nan")
    return mean, statistics.stdev(values) if len(values) > 1 else 0.0


def read_groups(files: Sequence[Path]) -> list[RunGroup]:
    """Runs recorded in JSON-lines files, grouped, in the files' order; one that is given twice counts once.

    ValueError: a line that is no record.
    """
    grouped: dict[tuple[str, str, str], list[Record]] = {}
    for file in files:
        for number, record in read_jsonl(file, "records", loose=True):
            _require_record(record, f"{file}:{number}")
            sweep = file.parent.name if file.name == "results.jsonl" else file.stem
            point = ", ".join(f"{name} {value}" for name, value in record["grid"].items())
            group = grouped.setdefault((sweep, point, record["arm"]), [])
            if not any(_same_run(record, other) for other in group):
                group.append(record)
    return [RunGroup(*key, tuple(sorted(records, key=lambda r: r["seed"]))) for key, records in grouped.items()]


def _require_record(record: Record, where: str) -> None:
    kinds = {"whole": dict, "parts": dict, "suite": str} if "suite" in record else {"bpb": dict}
    kinds = {"accuracy": dict} if "bpb" not in record and "accuracy" in record else kinds
    if not {"arm", "grid", "seed", *kinds} <= set(record):
        raise ValueError(f"{where} is not the record of a run; remove the line")
    require_fields(record, {"arm": str, "grid": dict, "seed": int} | kinds, where)


def _same_run(one: Record, other: Record) -> bool:
    """Whether two records of a group are of one run: the same seed and settings."""
    return one["seed"] == other["seed"] and one.get("config") == other.get("config")
