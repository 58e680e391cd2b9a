"""Recorded runs grouped by what differs only in the seed: means, deviations, paired differences."""

from __future__ import annotations

import contextlib
import re
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lrt.utils.dotted import leaves
from lrt.utils.files import read_jsonl, require_fields

ALIKE = (
    "data.source", "data.tokenizer", "data.vocab_size", "data.validation", "data.validation_source", "data.max_bytes",
    "train.schedule", "train.consistency", "train.batch", "train.length", "train.horizon", "train.dtype",
)  # fmt: skip
"""Settings beside the model's and the optimizer's that runs of one arm share."""
Record = dict[str, Any]
Measure = Callable[[Record], float]


@dataclass(frozen=True)
class RunGroup:
    """Runs of one arm at one point of a grid, one per seed."""

    sweep: str
    point: str
    arm: str
    records: tuple[Record, ...]

    @property
    def source(self) -> float | None:
        """The block that the memory reads, or its share of the depth; 0: a token shift. None: no memory, or unknown."""
        return self.records[0].get("source")

    def mean(self, measure: Measure) -> float:
        """Mean over the seeds."""
        return statistics.fmean(measure(r) for r in self.records)

    def deviation(self, measure: Measure) -> float:
        """Standard deviation over the seeds (n - 1); 0 for a single one."""
        return mean_and_deviation([measure(r) for r in self.records])[1]

    def paired(self, other: RunGroup, measure: Measure) -> list[float]:
        """Differences from `other`, one for each seed that both have."""
        theirs = {r["seed"]: measure(r) for r in other.records}
        return [measure(r) - theirs[r["seed"]] for r in self.records if r["seed"] in theirs]


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation (n - 1) of any number of values; (nan, 0) of none."""
    mean = statistics.fmean(values) if values else float("nan")
    return mean, statistics.stdev(values) if len(values) > 1 else 0.0


@contextlib.contextmanager
def of_right_kinds(where: object) -> Iterator[None]:
    """Within it a figure that a record lacks, or that is no number, is a ValueError that says so of `where`."""
    try:
        yield
    except (KeyError, TypeError, IndexError, AttributeError, ArithmeticError) as error:
        raise ValueError(
            f"a record in {where} lacks a figure, or holds another kind of value ({type(error).__name__}: {error}); "
            "remove its line, or record the run again"
        ) from None


def read_groups(files: Sequence[Path]) -> list[RunGroup]:
    """Runs recorded in JSON-lines files, grouped; one that is given twice counts once.

    Sweeps and arms come in the files' order, the points of a sweep's grid by their numbers.

    ValueError: a line that is no record, or whose run differs in more than the seed from others of its arm.
    """
    grouped: dict[tuple[str, str, str], list[Record]] = {}
    for file in files:
        for number, record in read_jsonl(file, "records", loose=True):
            _require_record(record, f"{file}:{number}")
            sweep = file.parent.name if file.name == "results.jsonl" else file.stem
            point = ", ".join(f"{name} {value}" for name, value in record["grid"].items())
            group = grouped.setdefault((sweep, point, record["arm"]), [])
            if not any(_same_run(record, other) for other in group):
                _require_alike(record, group, f"{file}:{number}")
                group.append(record)
    groups = [RunGroup(*key, tuple(sorted(records, key=lambda r: r["seed"]))) for key, records in grouped.items()]
    sweeps = list(dict.fromkeys(g.sweep for g in groups))
    return sorted(groups, key=lambda g: (sweeps.index(g.sweep), _by_numbers(g.point)))


def _by_numbers(text: str) -> list[tuple[float, str]]:
    """A key that sorts `compute=5` before `compute=10`."""
    parts = re.split(r"(\d+(?:\.\d+)?)", text)
    return [(float(part), "") if k % 2 else (-1.0, part) for k, part in enumerate(parts)]


def _require_record(record: Record, where: str) -> None:
    kinds = {"whole": dict, "parts": dict, "suite": str} if "suite" in record else {"bpb": dict}
    kinds = {"accuracy": dict} if "bpb" not in record and "accuracy" in record else kinds
    if not {"arm", "grid", "seed", *kinds} <= set(record):
        raise ValueError(f"{where} is not the record of a run; remove the line")
    require_fields(record, {"arm": str, "grid": dict, "seed": int} | kinds, where)


def _require_alike(record: Record, group: Sequence[Record], where: str) -> None:
    """ValueError: the record's run is not one more seed of the arm's others, so that no mean may be taken.

    Settings that one of two records does not know are passed over: they are of different versions.
    """
    settings = _settings(record)
    for other in group:
        theirs = _settings(other)
        differ = sorted(name for name, value in settings.items() if theirs.get(name, value) != value)
        if differ or record["seed"] == other["seed"]:
            conflict = f"differs in {', '.join(differ[:3])}" if differ else "is of the same seed as another"
            raise ValueError(
                f"{where}: this run of arm {record['arm']!r} {conflict}; rename its arm, or report on one file alone"
            )


def _settings(record: Record) -> dict[str, Any]:
    """What a run computes, by dotted names: model, optimizer, and of data and training what changes the weights."""
    config = record.get("config")
    named = leaves(config) if isinstance(config, dict) else ()
    return {name: value for name, value in named if name.startswith(("model.", "optim.")) or name in ALIKE}


def _same_run(one: Record, other: Record) -> bool:
    """Whether two records of a group are of one run: the same seed, settings and figures."""
    return all(one.get(name) == other.get(name) for name in ("seed", "config", "step", "bpb", "accuracy", "whole"))
