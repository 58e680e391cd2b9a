"""A pass over a slice of positions, and what a list of passes comes to: validity, exactness, cost. No torch here."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

NO_GRAD_COST = 1 / 3
"""Cost of a token forward without gradient, in forwards with one (forward 1 part, backward 2)."""


@dataclass(frozen=True)
class Pass:
    """One forward over some positions of a row, against what earlier passes have left in the buffer."""

    positions: range
    """The slice start:stop:step."""
    weight: float = 1.0
    """Weight of its loss, the mean over its own positions; 0 means no loss and no head."""
    grad: bool = True
    """Whether it is recorded for the backward pass; one without gradient can carry no loss."""
    detach: bool = False
    """Whether what it reads from the buffer (memory, keys, values) is cut from the gradient."""

    def __post_init__(self) -> None:
        positions = self.positions
        if not isinstance(positions, range):
            raise ValueError(f"a pass over {positions!r:.60}: give a range of positions, such as range(0, 32, 2)")
        if len(positions) == 0 or positions.start < 0 or positions.step < 1:
            raise ValueError(
                f"a pass over {positions} has no positions, or they do not rise from 0; use start:stop:step"
            )
        if self.weight < 0 or (self.weight > 0 and not self.grad):
            raise ValueError(
                f"a pass of weight {self.weight} with grad={self.grad}: a loss needs a gradient and a weight >= 0"
            )

    def __str__(self) -> str:
        positions = self.positions
        step = f":{positions.step}" if positions.step > 1 and len(positions) > 1 else ""
        marks = "" if self.grad else " no grad"
        return f"{positions.start}:{positions[-1] + 1}{step}{marks}{' detached' if self.detach else ''}"


def no_grad_pass(positions: range) -> Pass:
    """A pass without gradient or loss."""
    return Pass(positions, weight=0.0, grad=False)


Passes = tuple[Pass, ...]


def columns(positions: range) -> slice:
    """`positions`, start:stop:step, as an index of a tensor's axis."""
    return slice(positions.start, positions.stop, positions.step)


def memory_in_loss(passes: Sequence[Pass]) -> bool:
    """Whether some pass with loss reads what an earlier pass wrote: then memory parameters have a gradient."""
    return any(p.weight > 0 and p.positions[-1] > 0 for p in passes[1:])


def check(passes: Iterable[Pass]) -> None:
    """Raise ValueError for a pass whose earlier keys were never written, neither before it nor by itself."""
    front = 0  # every position below it has been written: a valid pass leaves no hole behind it
    for number, p in enumerate(passes):
        holes = subtract(range(front, p.positions[-1] + 1), p.positions)
        if holes:
            raise ValueError(
                f"pass {number} over {p} attends to position {holes[0].start}, which no pass has written yet"
            )
        front = max(front, p.positions[-1] + 1)


def exact_prefix(passes: Iterable[Pass], length: int, prefix: int = 0) -> int:
    """Longest prefix whose last-written states equal the sequential ones for every input and every weight.

    A position becomes exact when it is visited after its predecessor has become exact, all earlier ones being exact by
    then; so each pass makes at most one more position exact, and it is the first one that is not yet. `prefix`
    positions are exact before the first pass.
    """
    for p in passes:
        prefix += prefix < length and prefix in p.positions
    return prefix


def memory_only(passes: Sequence[Pass]) -> list[bool]:
    """For each pass: whether it serves only to make memory, so that it may stop at the source block.

    So it is when it has no loss, and later passes recompute its keys and values before any that runs to the top
    attends to them.
    """
    only: list[bool] = []  # of the passes from i + 1 on
    for i in reversed(range(len(passes))):
        later = zip(passes[i + 1 :], only, strict=True)
        only.insert(0, passes[i].weight == 0 and _unread(passes[i].positions, later))
    return only


def _unread(written: range, later: Iterable[tuple[Pass, bool]]) -> bool:
    alive = [written]
    for p, to_source in later:
        alive = [part for positions in alive for part in subtract(positions, p.positions)]
        if not to_source and any(positions.start <= p.positions[-1] for positions in alive):
            return False
    return not alive  # what lies there at the end may be continued from


def token_forwards(passes: Iterable[Pass], length: int) -> float:
    """Forwards per token, every pass counted in full."""
    return sum(len(p.positions) for p in passes) / length


def rewriting(passes: Passes) -> list[bool]:
    """For each pass: whether it has a loss and all its states replace ones that earlier passes wrote."""
    return [p.weight > 0 and written for p, written in zip(passes, _written_before(passes), strict=True)]


def repeated(passes: Passes) -> list[bool]:
    """For each pass: whether it has no gradient and earlier passes have been at all its positions.

    What no memory reaches is the same there, and not computed again.
    """
    return [not p.grad and written for p, written in zip(passes, _written_before(passes), strict=True)]


def _written_before(passes: Passes) -> list[bool]:
    """For each pass: whether earlier ones have written all its positions."""
    fronts = [0, *accumulate((p.positions[-1] + 1 for p in passes), max)]  # every position below is written
    return [p.positions[-1] < front for p, front in zip(passes, fronts, strict=False)]


def effective_cost(passes: Passes, source: float = 1.0, below: float = 0.0) -> float:
    """Token forwards of `passes`, each weighted by what it costs.

    One without gradient counts a third; one that stops at the source block counts the share `source` of the blocks. The
    share `below` of them, which no memory reaches, is left out where a pass is `repeated`.
    """
    cost = 0.0
    for p, stops, again in zip(passes, memory_only(passes), repeated(passes), strict=True):
        blocks = (source if stops else 1.0) - (below if again else 0.0)
        cost += len(p.positions) * (1.0 if p.grad else NO_GRAD_COST) * blocks
    return cost


def intersect(a: range, b: range) -> range:
    """Positions of `a` that are in `b` too; both rise."""
    step, stop = math.lcm(a.step, b.step), min(a.stop, b.stop)
    skipped = max(0, -((a.start - b.start) // a.step))  # elements of a that lie before b
    start = next((t for t in a[skipped : skipped + step // a.step] if t in b), stop)
    return range(start, max(start, stop), step)


def subtract(a: range, b: range) -> list[range]:
    """Positions of `a` not in `b`, as few rising slices: what stays of a segment when a pass rewrites part of it."""
    common = intersect(a, b)
    if not len(common):
        return [a] if len(a) else []
    stride = common.step // a.step if len(common) > 1 else 1
    first, last = a.index(common[0]), a.index(common[-1])
    low, high = max(0, first - stride + 1), last + stride  # whole strides around what is taken out
    phases = [a[i:high:stride] for i in range(low, low + stride) if (i - first) % stride]
    return [part for part in (a[:low], *phases, a[high:]) if len(part)]
