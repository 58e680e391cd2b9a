"""Several sources in given shares: every row of a batch is drawn from one of them, as often as its weight says."""

from __future__ import annotations

import hashlib
import math
import os
import re
from functools import cached_property
from typing import NamedTuple, final

import numpy as np

from lrt.data.loader import Batch, BatchShape, Loader, Row, as_batch
from lrt.data.shards import TokenStream
from lrt.utils.files import expand_home

PERIOD = 1000
"""Rows in which every source has its share, to the row."""
WEIGHTED = re.compile(r"(?P<name>.+)@(?P<weight>[0-9.eE+-]+)")


class Weighted(NamedTuple):
    """A source, and its share of the rows."""

    name: str
    weight: float


def read_mixture(source: str) -> list[Weighted]:
    """The sources of `books/*.parquet@0.7,code/@0.3` with their shares, which sum to 1; one source that has no weight.

    ValueError: weights on some of them alone, or no numbers above 0.
    """
    if "@" not in source or os.path.exists(expand_home(source)):
        return [Weighted(source, 1.0)]
    parts = [part.strip() for part in source.split(",")]
    matches = [WEIGHTED.fullmatch(part) for part in parts]
    if not any(matches):
        return [Weighted(source, 1.0)]
    for part, match in zip(parts, matches, strict=True):
        if match is None or not _number(match["weight"]) > 0:
            raise ValueError(f"the source {part!r} has no weight above 0: write each as SOURCE@WEIGHT: code/@0.3")
    weighted = [(match["name"], _number(match["weight"])) for match in matches if match is not None]
    total = sum(weight for _, weight in weighted)
    if total == math.inf:
        raise ValueError(f"{source}: the weights are too large to be added up: write shares such as 0.7 and 0.3")
    if len({name for name, _ in weighted}) < len(weighted):
        raise ValueError(f"{source}: a source is named twice: add up its weights")
    if small := [name for name, weight in weighted if round(PERIOD * weight / total) < 1]:
        raise ValueError(f"{small[0]}: its weight is less than 1 in {PERIOD} of all: raise it, or leave it out")
    return [Weighted(name, weight / total) for name, weight in weighted]


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        return 0.0
    return value if value < float("inf") else 0.0


@final
class Mixture:
    """The same split of several sources, in shares; `hash` and `answers` as those of a stream."""

    def __init__(self, streams: list[TokenStream], weights: list[float]) -> None:
        self.streams, self.weights = streams, weights
        facts = "".join(f"{stream.hash} {weight!r}\n" for stream, weight in zip(streams, weights, strict=True))
        self.hash, self.answers = hashlib.sha256(facts.encode()).hexdigest(), any(s.answers for s in streams)

    def __len__(self) -> int:
        return sum(map(len, self.streams))

    @cached_property
    def turns(self) -> np.ndarray:
        """Which source each row of a period is from, int64 [PERIOD]: always the one furthest behind its share."""
        had, shares, turns = np.zeros(len(self.weights)), np.array(self.weights), []
        for done in range(1, PERIOD + 1):
            turns.append(int(np.argmax(shares * done - had)))
            had[turns[-1]] += 1
        return np.array(turns)

    def most_rows(self, length: int) -> int:
        """Rows of `length` that can be taken, in the given shares, before one comes again; at least one."""
        rows = [(len(stream) - 1) // length for stream in self.streams]
        return max(1, int(min(n / weight for n, weight in zip(rows, self.weights, strict=True))))


@final
class MixedLoader:
    """Batches of a mixture. Row g is a function of the seed and g alone; each source has epochs of its own."""

    def __init__(self, mixture: Mixture, shape: BatchShape) -> None:
        self._loaders = [Loader(stream, shape) for stream in mixture.streams]
        self._shape, self._turns = shape, mixture.turns
        each = self._turns[:, None] == np.arange(len(self._loaders))
        self._counts, self._before = each.sum(0), each.cumsum(0) - each

    def batch(self, step: int) -> Batch:
        """This rank's rows of a step."""
        return as_batch(map(self.row, self._shape.rows(step)), self._shape.bos)

    def row(self, g: int) -> Row:
        """Row `g` of all ranks' endless sequence."""
        period, place = divmod(g, PERIOD)
        i = int(self._turns[place])
        return self._loaders[i].row(period * int(self._counts[i]) + int(self._before[place, i]))
