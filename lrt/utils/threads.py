"""How many CPU threads a computation should have: measured, since more are slower for small tensors."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

MOST_POSITIONS = 1024
"""Positions of the sample of work; larger tensors only profit more from threads."""
ROUNDS = 15
PATIENCE = 1.0
"""Seconds after which no further round begins."""
LEAST_GAIN = 0.95
"""More threads are taken if they need at most this share of one thread's time: they also cost others theirs."""


class ThreadChoice(NamedTuple):
    """A number of threads, and why."""

    threads: int
    why: str


def choose_threads(width: int, positions: int) -> ThreadChoice:
    """One thread or all of torch's, whichever does an MLP's forward and backward faster here and now.

    width: of the model. positions: of one forward, rows times length.
    """
    most = torch.get_num_threads()
    if most == 1:
        return ThreadChoice(1, "torch has no more")
    one, all_of_them = _medians(_mlp_step(width, min(positions, MOST_POSITIONS)), (1, most))
    if all_of_them <= LEAST_GAIN * one:
        return ThreadChoice(most, f"{one / all_of_them:.1f} times as fast as one, measured now")
    return ThreadChoice(1, f"{most} take {all_of_them / one:.1f} times as long, measured now")


@contextmanager
def threads(count: int) -> Iterator[None]:
    """torch computes with so many threads inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _mlp_step(width: int, positions: int) -> Callable[[], None]:
    up, down = (torch.full(shape, 1 / width, requires_grad=True) for shape in ((width, 4 * width), (4 * width, width)))
    x = torch.ones(positions, width)

    def step() -> None:
        torch.autograd.grad(((x @ up).relu().square() @ down).sum(), (up, down))

    return step


def _medians(work: Callable[[], None], counts: tuple[int, int]) -> tuple[float, float]:
    """Median seconds of `work` with each number of threads, in turns; the first round only warms up."""
    spent: dict[int, list[float]] = {count: [] for count in counts}
    begun = time.perf_counter()
    for _ in range(ROUNDS + 1):
        for count in counts:
            with threads(count):
                start = time.perf_counter()
                work()
                spent[count].append(time.perf_counter() - start)
        if len(spent[counts[0]]) >= 3 and time.perf_counter() - begun > PATIENCE:
            break
    first, second = (statistics.median(spent[count][1:]) for count in counts)
    return first, second
