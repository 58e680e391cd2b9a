"""Synthetic tasks, drawn as they are needed: state tracking, recall and few-shot learning, with targets of their own.

A task stands where a text source does: `--data.source task:parity` with the bytes tokenizer. Symbols and answers are
ids. Targets are answers, not next tokens: a running parity given as the next token would be an input a step later.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import numpy as np
import torch

from lrt.config.run import TASK
from lrt.data.loader import Batch, Batches, BatchShape, Loader, RowSource
from lrt.data.mixture import MixedLoader, Mixture
from lrt.data.recall_tasks import copying, induction, mapping, mqar, pointers, recall
from lrt.data.state_tasks import STRINGS, Ids, Pair, asked_once, full_strings, parity, sums, swaps, word_problem
from lrt.data.tokenizer import ByteTokenizer
from lrt.passes import columns

BOS_ID = 256
"""Of the bytes tokenizer; no task uses it as a symbol, since it resets the memory."""


@final
@dataclass(frozen=True)
class TaskKind:
    """How a task's rows are drawn: draw(random, rows, length, *numbers) gives tokens and targets, int64 [B, T]."""

    draw: Callable[..., Pair]
    numbers: tuple[int, ...] = ()
    """Defaults of the numbers that a name may end in, as in `mqar-8-8192`."""
    full: Callable[..., Pair] | None = None
    """Rows whose strings fill them, where `draw` makes strings of all lengths up to that."""
    has_vocabulary: bool = False
    """Whether the last number is how many symbols there are; otherwise they are bytes."""


TASKS: dict[str, TaskKind] = {
    **{f.__name__: TaskKind(f) for f in (parity, sums, swaps, recall, copying, mapping)},
    **{group: TaskKind(word_problem(group)) for group in ("s5", "a5", "a4z5", "z60")},
    **{name: TaskKind(asked_once(*kind), full=full_strings(*kind)) for name, kind in STRINGS.items()},
    "mqar": TaskKind(mqar, (8, 8192), has_vocabulary=True),
    "pointers": TaskKind(pointers, (2,)),
    "induction": TaskKind(induction, (2,)),
}


def task_kind(name: str) -> tuple[TaskKind, tuple[int, ...]]:
    """The task that `NAME`, `NAME-N` or `NAME-N-M` means, and its numbers. ValueError: there is none such."""
    match = re.fullmatch(r"(\w+)((?:-[1-9]\d{0,5})*)", name)
    kind = TASKS.get(match[1]) if match else None
    if match is None or kind is None:
        raise ValueError(f"task {name!r}: there is no such task; choose one of {', '.join(TASKS)}")
    numbers = tuple(int(part) for part in match[2].split("-")[1:])
    if len(numbers) > len(kind.numbers):
        example = "-".join(map(str, (match[1], *kind.numbers)))
        raise ValueError(f"task {name!r} has {len(numbers)} numbers; the most it takes are those of {example}")
    return kind, numbers + kind.numbers[len(numbers) :]


@final
@dataclass(frozen=True)
class TaskRows:
    """A task as an endless source of rows. ValueError: no such task."""

    name: str
    split: int
    """0: training, 1: validation; their rows are drawn apart."""

    def __post_init__(self) -> None:
        task_kind(self.name)

    @property
    def hash(self) -> str:
        """What resuming compares."""
        return f"{TASK}{self.name}"

    @property
    def vocab_size(self) -> int:
        """Ids that symbols and answers may be, BOS among them."""
        kind, numbers = task_kind(self.name)
        return max(BOS_ID, numbers[-1]) + 1 if kind.has_vocabulary else BOS_ID + 1

    def batch(self, rows: int, length: int, *key: int, full: bool = False) -> Batch:
        """`rows` rows, a function of `key` alone: tokens, targets (IGNORE where there is no answer), no starts.

        full: tasks whose strings have any length up to the row's take only those that fill it.
        """
        kind, numbers = task_kind(self.name)
        draw = kind.full if full and kind.full else kind.draw
        pair = draw(np.random.default_rng([self.split, *key]), rows, length, *numbers)
        ids, answers = (torch.from_numpy(_beside_bos(x)) for x in pair)
        return Batch(ids, answers, torch.zeros_like(ids, dtype=torch.bool))

    def takes(self, length: int) -> bool:
        """Whether there are rows of this length."""
        try:
            self.batch(1, length)
        except ValueError:
            return False
        return True


def _beside_bos(symbols: Ids) -> Ids:
    """Symbols as ids: from BOS_ID on one more."""
    return symbols + (symbols >= BOS_ID)


@final
@dataclass(frozen=True)
class TaskLoader:
    """Batches of a task, each drawn as a whole, of which every rank takes its share."""

    source: TaskRows
    shape: BatchShape

    def batch(self, step: int) -> Batch:
        """This rank's rows of a step."""
        shape, own = self.shape, columns(self.shape.rows(0))
        return Batch(*(x[own] for x in self.source.batch(shape.batch, shape.length, shape.seed, step)))


def task_rows(source: str, tokenizer: str) -> tuple[TaskRows, TaskRows]:
    """Training and validation rows of `task:NAME`. ValueError: no such task, or another tokenizer than bytes."""
    name = source.removeprefix(TASK)
    train, val = TaskRows(name, 0), TaskRows(name, 1)
    if tokenizer != "bytes":
        raise ValueError(f"data.tokenizer is {tokenizer!r}; tasks are written in byte ids: set it to bytes")
    return train, val


def task_tokenizer(rows: TaskRows) -> ByteTokenizer:
    """Bytes, and as many more ids without text as the task has symbols."""
    tokenizer = ByteTokenizer()
    tokenizer.widen(rows.vocab_size)
    return tokenizer


def batches(stream: RowSource | Mixture | TaskRows, shape: BatchShape) -> Batches:
    """What yields a stream's, a mixture's or a task's batches by step."""
    if isinstance(stream, TaskRows):
        return TaskLoader(stream, shape)
    return MixedLoader(stream, shape) if isinstance(stream, Mixture) else Loader(stream, shape)
