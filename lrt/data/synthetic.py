"""Synthetic tasks, drawn as they are needed: state tracking and few-shot learning, with targets of their own.

A task stands where a text source does: `--data.source task:parity` with the bytes tokenizer. Symbols and answers are
byte ids. Targets are answers, not next tokens: a running parity given as the next token would be an input a step later.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import numpy as np
import torch

from lrt.data.loader import Batch, Batches, Loader, RowSource
from lrt.model.shapes import IGNORE

Ids = np.ndarray
Pair = tuple[Ids, Ids]
"""Tokens and targets, int64 [B, T] each."""
PREFIX = "task:"


def parity(random: np.random.Generator, rows: int, length: int) -> Pair:
    """Bits; the answer at every position is the parity of those so far."""
    bits = random.integers(0, 2, (rows, length))
    return bits, np.cumsum(bits, axis=1) % 2


def sums(random: np.random.Generator, rows: int, length: int) -> Pair:
    """Numbers 0..6; the answer is the sum so far modulo 7."""
    numbers = random.integers(0, 7, (rows, length))
    return numbers, np.cumsum(numbers, axis=1) % 7


PERMUTATIONS = list(itertools.permutations(range(5)))
SWAPS = list(itertools.combinations(range(5), 2))


def _after_swaps() -> Ids:
    """Number of the permutation that swap s makes of permutation p, [120, 10]."""
    number = {p: i for i, p in enumerate(PERMUTATIONS)}
    table = np.empty((len(PERMUTATIONS), len(SWAPS)), dtype=np.int64)
    for (i, p), (s, (a, b)) in itertools.product(enumerate(PERMUTATIONS), enumerate(SWAPS)):
        swapped = list(p)
        swapped[a], swapped[b] = p[b], p[a]
        table[i, s] = number[tuple(swapped)]
    return table


def swaps(random: np.random.Generator, rows: int, length: int) -> Pair:
    """Swaps of two of five places; the answer is the permutation so far, one of 120 (the word problem of S5)."""
    drawn, table = random.integers(0, len(SWAPS), (rows, length)), _after_swaps()
    state, states = np.zeros(rows, dtype=np.int64), np.empty((rows, length), dtype=np.int64)
    for t in range(length):
        states[:, t] = state = table[state, drawn[:, t]]
    return drawn, states


def recall(random: np.random.Generator, rows: int, length: int) -> Pair:
    """Associative recall: key, value, key, value, ..; in the second half keys come again; the answer is their value."""
    pairs = length // 4
    if not 1 <= pairs <= 128:
        raise ValueError(f"task recall takes rows of 4 to 515 positions, not {length}; there are 128 keys")
    order = random.random((rows, 128)).argsort(1)[:, :pairs]  # distinct keys
    values = 128 + random.integers(0, 16, (rows, pairs))
    again = random.random((rows, pairs)).argsort(1)
    halves = [order, values], [np.take_along_axis(x, again, 1) for x in (order, values)]
    tokens, targets = _blank(rows, length)
    for start, (keys, told) in zip((0, 2 * pairs), halves, strict=True):
        tokens[:, start : start + 2 * pairs : 2], tokens[:, start + 1 : start + 2 * pairs : 2] = keys, told
    targets[:, 2 * pairs : 4 * pairs : 2] = halves[1][1]
    return tokens, targets


def copying(random: np.random.Generator, rows: int, length: int) -> Pair:
    """A string twice; the answers are the next symbols of its second half."""
    half = length // 2
    string = random.integers(0, 64, (rows, half))
    tokens, targets = _blank(rows, length)
    tokens[:, :half], tokens[:, half : 2 * half] = string, string
    targets[:, half : 2 * half - 1] = string[:, 1:]
    return tokens, targets


def mapping(random: np.random.Generator, rows: int, length: int) -> Pair:
    """x, f(x), x', f(x'), .. with a new f on 8 symbols in each row; scored where x was shown before."""
    shown = length // 2
    x, f = random.integers(0, 8, (rows, shown)), 8 + random.random((rows, 8)).argsort(1)
    y = np.take_along_axis(f, x, 1)
    known = np.stack([(x[:, :t] == x[:, t : t + 1]).any(1) for t in range(shown)], axis=1)
    tokens, targets = _blank(rows, length)
    tokens[:, 0 : 2 * shown : 2], tokens[:, 1 : 2 * shown : 2] = x, y
    targets[:, 0 : 2 * shown : 2] = np.where(known, y, IGNORE)
    return tokens, targets


def _blank(rows: int, length: int) -> Pair:
    return np.zeros((rows, length), dtype=np.int64), np.full((rows, length), IGNORE, dtype=np.int64)


TASKS: dict[str, Callable[[np.random.Generator, int, int], Pair]] = {
    f.__name__: f for f in (parity, sums, swaps, recall, copying, mapping)
}


@final
@dataclass(frozen=True)
class TaskRows:
    """A task as an endless source of rows."""

    name: str
    split: int
    """0: training, 1: validation; their rows are drawn apart."""

    @property
    def hash(self) -> str:
        """What resuming compares."""
        return f"{PREFIX}{self.name}"

    def batch(self, rows: int, length: int, *key: int) -> Batch:
        """`rows` rows, a function of `key` alone: tokens, targets (IGNORE where there is no answer), no starts."""
        tokens, targets = TASKS[self.name](np.random.default_rng([self.split, *key]), rows, length)
        ids, answers = torch.from_numpy(tokens), torch.from_numpy(targets)
        return Batch(ids, answers, torch.zeros_like(ids, dtype=torch.bool))


@final
@dataclass(frozen=True)
class TaskLoader:
    """Batches of a task; the global batch is the same on any number of ranks, each of which takes its share."""

    source: TaskRows
    rows: int
    """Of a global batch."""
    length: int
    seed: int
    rank: int = 0
    world: int = 1

    def batch(self, step: int) -> Batch:
        """This rank's rows of a step."""
        share = self.rows // self.world
        whole = self.source.batch(self.rows, self.length, self.seed, step)
        return Batch(*(x[self.rank * share : (self.rank + 1) * share] for x in whole))


def task_rows(source: str, tokenizer: str) -> tuple[TaskRows, TaskRows]:
    """Training and validation rows of `task:NAME`. ValueError: no such task, or another tokenizer than bytes."""
    name = source.removeprefix(PREFIX)
    if name not in TASKS:
        raise ValueError(f"data.source {source!r}: there is no such task; choose one of {', '.join(TASKS)}")
    if tokenizer != "bytes":
        raise ValueError(f"data.tokenizer is {tokenizer!r}; tasks are written in byte ids: set it to bytes")
    return TaskRows(name, 0), TaskRows(name, 1)


def batches(
    stream: RowSource | TaskRows, *, batch: int, length: int, bos: int, seed: int, rank: int, world: int
) -> Batches:
    """What yields a stream's or a task's batches by step."""
    if isinstance(stream, TaskRows):
        return TaskLoader(stream, batch, length, seed, rank, world)
    return Loader(stream, batch=batch, length=length, bos=bos, seed=seed, rank=rank, world=world)
