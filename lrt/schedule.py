"""Schedules: lists of passes over position slices. No torch here; schedules can be printed, compared and counted.

Training, prefill and decoding all are such a list, run by one forward against one buffer (docs/method.md#passes). A
`Schedule` is the recipe (`interleaved-2`, `settled-1..3`), `Schedule.passes(length)` the list for a row of that length.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

KINDS = {
    "parallel": "one pass over everything: the plain transformer, or an LRT with zero memory",
    "interleaved": "0:T, then i:T:S for i = 0..S-1 (the paper's interleaved parallel training)",
    "refinement": "0:T, K+1 times (the paper's full-sequence refinement)",
    "chunked": "contiguous chunks of C positions (the paper's weak baseline)",
    "sequential": "one position at a time: the exact recurrence, what decoding computes",
    "settled": "0:T r times without gradient or loss, then 0:T once with both",
}
_SIZED = {"interleaved", "refinement", "chunked", "settled"}
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
        at = self.positions
        if len(at) == 0 or at.start < 0 or at.step < 1:
            raise ValueError(f"a pass over {at} has no positions, or they do not rise from 0; use start:stop:step")
        if self.weight < 0 or (self.weight > 0 and not self.grad):
            raise ValueError(
                f"a pass of weight {self.weight} with grad={self.grad}: a loss needs a gradient and a weight >= 0"
            )

    def __str__(self) -> str:
        at = self.positions
        step = f":{at.step}" if at.step > 1 and len(at) > 1 else ""
        marks = "" if self.grad else " no grad"
        return f"{at.start}:{at[-1] + 1}{step}{marks}{' detached' if self.detach else ''}"


Passes = tuple[Pass, ...]


@dataclass(frozen=True)
class Span:
    """A size that is fixed (low = high) or drawn uniformly per step."""

    low: int
    high: int

    @staticmethod
    def parse(text: str, least: int, what: str) -> Span:
        """Read `4` or `1..3`."""
        found = re.fullmatch(r"(\d+)(?:\.\.(\d+))?", text)
        if not found:
            raise ValueError(f"{what} {text!r} is not a number or a range such as 1..3")
        span = Span(int(found[1]), int(found[2] or found[1]))
        if not least <= span.low <= span.high:
            raise ValueError(f"{what} {text!r} must rise from at least {least}")
        return span

    def __str__(self) -> str:
        return str(self.low) if self.low == self.high else f"{self.low}..{self.high}"

    @property
    def fixed(self) -> bool:
        """Whether there is nothing to draw."""
        return self.low == self.high

    def draw(self, key: str) -> Span:
        """One size, a function of the key alone: the same on every rank and after every resume."""
        size = random.Random(key).randint(self.low, self.high)
        return Span(size, size)


@dataclass(frozen=True)
class Schedule:
    """A family of pass lists, one per row length; parsed from text such as `interleaved-2:weights=0/1` by `parse`."""

    kind: str
    """One of KINDS."""
    size: Span | None = None
    """S, K, C or r; possibly a range drawn per step."""
    settle: Span = Span(0, 0)
    """Full sweeps without gradient or loss before the first pass."""
    weights: tuple[float, ...] = ()
    """Loss weights of the passes with gradient; the last one repeats; empty means all 1."""
    detach: bool = False
    """Cut the gradient between passes."""

    @staticmethod
    def parse(text: str) -> Schedule:
        """Read KIND[-SIZE][:weights=a/b/..][:settle=r][:detach], e.g. `refinement-2:weights=0.1/0.3/0.6`."""
        head, *options = text.strip().split(":")
        kind, _, size = head.partition("-")
        if kind not in KINDS:
            raise ValueError(
                f"unknown schedule {text!r}; choose one of {', '.join(KINDS)}, e.g. interleaved-2 or settled-1..3"
            )
        if bool(size) != (kind in _SIZED):
            remedy = f"write {kind}-2, say" if kind in _SIZED else f"write {kind}"
            raise ValueError(f"schedule {text!r}: {kind} takes {'a' if kind in _SIZED else 'no'} size; {remedy}")
        span = Span.parse(size, 0 if kind == "settled" else 1, f"size of schedule {text!r}") if size else None
        return Schedule._with_options(Schedule(kind, span), options, text)

    @staticmethod
    def _with_options(schedule: Schedule, options: list[str], text: str) -> Schedule:
        for option in options:
            key, _, value = option.partition("=")
            if key == "weights":
                schedule = replace(schedule, weights=_parse_weights(value, text))
            elif key == "settle":
                schedule = replace(schedule, settle=Span.parse(value, 0, f"settle of schedule {text!r}"))
            elif option == "detach":
                schedule = replace(schedule, detach=True)
            else:
                raise ValueError(f"schedule {text!r}: unknown option {option!r}; use weights=a/b, settle=r or detach")
        return schedule

    def __str__(self) -> str:
        parts = [self.kind + (f"-{self.size}" if self.size else "")]
        parts += [f"settle={self.settle}"] if self.settle.high else []
        parts += ["weights=" + "/".join(str(w).removesuffix(".0") for w in self.weights)] if self.weights else []
        return ":".join([*parts, *(["detach"] if self.detach else [])])

    def draw(self, seed: int, step: int) -> Schedule:
        """This step's schedule, its ranges drawn: a function of (seed, step), never of the rank."""
        size = self.size.draw(f"size-{seed}-{step}") if self.size else None
        return replace(self, size=size, settle=self.settle.draw(f"settle-{seed}-{step}"))

    def at_largest(self) -> Schedule:
        """The schedule with every range at its upper end; what `parallel BPB` is measured with."""
        size = Span(self.size.high, self.size.high) if self.size else None
        return replace(self, size=size, settle=Span(self.settle.high, self.settle.high))

    def every_draw(self) -> list[Schedule]:
        """Every schedule that `draw` can give; all are equally likely."""
        sizes = [Span(n, n) for n in range(self.size.low, self.size.high + 1)] if self.size else [None]
        settles = [Span(n, n) for n in range(self.settle.low, self.settle.high + 1)]
        return [replace(self, size=size, settle=settle) for size in sizes for settle in settles]

    def shares(self) -> list[tuple[Schedule, float]]:
        """`every_draw`, each with its probability."""
        draws = self.every_draw()
        return [(drawn, 1 / len(draws)) for drawn in draws]

    def passes(self, length: int) -> Passes:
        """The passes over a row of `length` positions. Ranges must have been drawn."""
        if length < 1:
            raise ValueError(f"a row of {length} positions has no passes; it needs at least 1")
        if not self.settle.fixed or (self.size and not self.size.fixed):
            raise ValueError(f"schedule {self} has a range; call draw(seed, step) or at_largest() first")
        full = range(length)
        slices = _slices(self.kind, self.size.low if self.size else 0, length)
        sweeps = self.settle.low + (self.size.low if self.size and self.kind == "settled" else 0)
        settling = [Pass(full, weight=0.0, grad=False) for _ in range(sweeps)]
        weights = list(self.weights) or [1.0]
        if len(weights) > len(slices):
            raise ValueError(
                f"schedule {self} has {len(weights)} weights for {len(slices)} passes with gradient; give no more"
            )
        weights += [weights[-1]] * (len(slices) - len(weights))
        passes = (*settling, *(Pass(at, w, True, self.detach) for at, w in zip(slices, weights, strict=True)))
        check(passes)
        return passes


@dataclass(frozen=True)
class Curriculum:
    """Schedules one after the other, such as plain first and memory late: `parallel@0.5,settled-1..3`."""

    stages: tuple[tuple[Schedule, float], ...]
    """Each schedule with the share of the steps at which it ends; the last ends at 1."""
    steps: int = 1
    """Steps of the whole training."""

    @staticmethod
    def parse(text: str) -> Curriculum:
        """Read SCHEDULE[@SHARE],SCHEDULE[@SHARE],..,SCHEDULE: shares of the steps, rising; one schedule needs none."""
        stages: list[tuple[Schedule, float]] = []
        *early, last = text.split(",")
        for part in early:
            name, _, share = part.partition("@")
            before = stages[-1][1] if stages else 0.0
            end = float(share) if re.fullmatch(r"0?\.\d+", share) else 0.0
            if not before < end < 1:
                raise ValueError(
                    f"stage {part!r} of schedule {text!r} must end at a share of the steps that rises between 0 and 1, "
                    "such as parallel@0.5,settled-1..3"
                )
            stages.append((Schedule.parse(name), end))
        return Curriculum((*stages, (Schedule.parse(last), 1.0)))

    def __str__(self) -> str:
        early = [f"{schedule}@{end:g}" for schedule, end in self.stages[:-1]]
        return ",".join([*early, str(self.stages[-1][0])])

    def at(self, step: int) -> Schedule:
        """The schedule of a step, its ranges not drawn."""
        return next((s for s, end in self.stages if step < end * self.steps), self.stages[-1][0])

    def draw(self, seed: int, step: int) -> Schedule:
        """This step's schedule, its ranges drawn: a function of (seed, step)."""
        return self.at(step).draw(seed, step)

    def at_largest(self) -> Schedule:
        """The last schedule with every range at its upper end; what `parallel BPB` is measured with."""
        return self.stages[-1][0].at_largest()

    def shares(self) -> list[tuple[Schedule, float]]:
        """Every schedule that `draw` can give, with the share of the steps that has it."""
        starts = (0.0, *(end for _, end in self.stages))
        parts = [(s.every_draw(), end - start) for (s, end), start in zip(self.stages, starts, strict=False)]
        return [(drawn, share / len(draws)) for draws, share in parts for drawn in draws]


def _parse_weights(text: str, schedule: str) -> tuple[float, ...]:
    try:
        weights = tuple(float(part) for part in text.split("/"))
    except ValueError:
        weights = (-1.0,)
    if not all(0 <= w < math.inf for w in weights) or sum(weights) == 0:
        raise ValueError(
            f"schedule {schedule!r}: weights {text!r} must be numbers >= 0, not all 0, such as 0.1/0.3/0.6"
        )
    return weights


def _slices(kind: str, size: int, length: int) -> list[range]:
    full = range(length)
    if kind == "interleaved":
        return [full, *(range(i, length, size) for i in range(min(size, length)))]
    if kind == "refinement":
        return [full] * (size + 1)
    if kind in ("chunked", "sequential"):
        size = size if kind == "chunked" else 1
        return [range(i, min(i + size, length)) for i in range(0, length, size)]
    return [full]


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
        alive = [rest for at in alive for rest in subtract(at, p.positions)]
        if not to_source and any(at.start <= p.positions[-1] for at in alive):
            return False
    return not alive  # what lies there at the end may be continued from


def token_forwards(passes: Iterable[Pass], length: int) -> float:
    """Forwards per token, every pass counted in full."""
    return sum(len(p.positions) for p in passes) / length


def effective_forwards(schedule: Schedule | Curriculum, length: int) -> float:
    """Forwards per token, those without gradient weighted 1/3: the mean over the draws (docs/method.md#conventions)."""

    def cost(passes: Passes) -> float:
        return sum(len(p.positions) * (1.0 if p.grad else NO_GRAD_COST) for p in passes) / length

    return sum(share * cost(s.passes(length)) for s, share in schedule.shares())


def raw_forwards(schedule: Schedule | Curriculum, length: int) -> float:
    """Forwards per token, all weighted 1: the mean over the schedule's draws."""
    return sum(share * token_forwards(s.passes(length), length) for s, share in schedule.shares())


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
