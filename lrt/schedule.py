"""Schedules: lists of passes over position slices. No torch here; schedules can be printed, compared and counted.

Training, prefill and decoding all are such a list, run by one forward against one buffer (docs/method.md#passes). A
`Schedule` is the recipe (`interleaved-2`, `settled-1..3`), `Schedule.passes(length)` the list for a row of that length.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace

from lrt.passes import (
    NO_GRAD_COST,
    Pass,
    Passes,
    check,
    effective_cost,
    exact_prefix,
    intersect,
    memory_only,
    no_grad_pass,
    rewriting,
    subtract,
    token_forwards,
)
from lrt.span import MOST_SIZES, NONE, SPAN_OPTIONS, Span, numbers, slashed

__all__ = [
    "KINDS", "NO_GRAD_COST", "Curriculum", "Pass", "Passes", "Schedule", "Span", "check", "effective_forwards",
    "exact_prefix", "intersect", "memory_only", "raw_forwards", "subtract", "token_forwards",
]  # fmt: skip
"""What users import from here, passes included; within the package these come from their own modules."""

KINDS = {
    "parallel": "one pass over everything: the plain transformer, or an LRT with zero memory",
    "interleaved": "0:T, then i:T:S for i = 0..S-1 (the paper's interleaved parallel training)",
    "refinement": "0:T, K+1 times (the paper's full-sequence refinement)",
    "chunked": "contiguous chunks of C positions (the paper's weak baseline)",
    "sequential": "one position at a time: the exact recurrence, what decoding computes",
    "settled": "0:T r times without gradient or loss, then 0:T once with both",
    "hop": "0:T r times without gradient or loss, then 0:T with gradient but no loss, then 0:T with both",
}
_SIZED = {"interleaved", "refinement", "chunked", "settled", "hop"}
_SWEPT = {"settled", "hop"}
"""Kinds whose size counts sweeps without gradient."""
_STEPPED = {"interleaved", "chunked"}
"""Kinds whose size counts positions; their passes end where the row does."""
MOST_POSITIONS = 2**24
"""The largest size of such a kind."""


@dataclass(frozen=True)
class Schedule:
    """A family of pass lists, one per row length; parsed from text such as `interleaved-2:weights=0/1` by `parse`."""

    kind: str
    """One of KINDS."""
    size: Span | None = None
    """S, K, C or r; possibly a range drawn per step."""
    settle: Span = NONE
    """Full sweeps without gradient or loss before the first pass."""
    weights: tuple[float, ...] = ()
    """Loss weights of the passes with gradient; the last one repeats; empty means all 1."""
    detach: bool = False
    """Cut the gradient between passes."""

    def __post_init__(self) -> None:
        """ValueError: a kind that there is not, or a size where it has none, or none where it has one."""
        kind, size = self.kind, self.size
        if kind not in KINDS or (size is None) == (kind in _SIZED):
            raise ValueError(f"no schedule is of kind {kind!r} and size {size}: use Schedule.parse('settled-1..3')")

    @staticmethod
    def parse(text: str) -> Schedule:
        """Read `KIND[-SIZE][:weights=a/b/..][:settle=r][:detach]`; options of a range (`Span`) stand right after it."""
        head, *options = text.strip().split(":")
        kind, _, size = head.partition("-")
        if kind not in KINDS:
            raise ValueError(
                f"unknown schedule {text!r}; choose one of {', '.join(KINDS)}, e.g. interleaved-2 or settled-1..3"
            )
        if bool(size) != (kind in _SIZED):
            remedy = f"write {kind}-2, say" if kind in _SIZED else f"write {kind}"
            raise ValueError(f"schedule {text!r}: {kind} takes {'a' if kind in _SIZED else 'no'} size; {remedy}")
        least, most = 0 if kind in _SWEPT else 1, MOST_POSITIONS if kind in _STEPPED else MOST_SIZES
        span = Span.parse(size, least, f"size of schedule {text!r}", most) if size else None
        return Schedule._with_options(Schedule(kind, span), options, text)

    @staticmethod
    def _with_options(schedule: Schedule, options: list[str], text: str) -> Schedule:
        span = "size" if schedule.size else ""  # the range that the next option may belong to
        for option in options:
            key, _, value = option.partition("=")
            if key in SPAN_OPTIONS and span:
                base = schedule.settle if span == "settle" else schedule.size
                assert base is not None
                schedule = replace(schedule, **{span: base.with_option(key, value, f"schedule {text!r}")})
                continue
            span = "settle" if key == "settle" else ""
            if key == "weights":
                schedule = replace(schedule, weights=_parse_weights(value, text))
            elif key == "settle":
                schedule = replace(schedule, settle=Span.parse(value, 0, f"settle of schedule {text!r}"))
            elif option == "detach":
                schedule = replace(schedule, detach=True)
            else:
                raise ValueError(
                    f"schedule {text!r}: unknown option {option!r}; use weights=a/b, settle=r, detach, or "
                    "right after a range p=a/b, tolerance=x, budget=r"
                )
        schedule._require_sense(text)
        return schedule

    def _require_sense(self, text: str) -> None:
        if self.kind == "hop" and self.detach:
            raise ValueError(f"schedule {text!r}: detach cuts the gradient that a hop is for; write settled instead")
        if self.adaptive is None:
            return
        if self.settle.tolerance is None and self.kind not in _SWEPT:
            raise ValueError(f"schedule {text!r}: only sweeps adapt: the size of settled and hop, or settle=1..3")
        if self.size and self.size.tolerance and self.settle.tolerance:
            raise ValueError(f"schedule {text!r} has two ranges that adapt; give one of them a fixed size")
        if not any(rewriting(self.sized(self.adaptive.low).at_largest().passes(4))):
            raise ValueError(
                f"schedule {text!r}: with {self.adaptive.low} sweeps no pass writes memory in place of some that it "
                "read, so there is no residual to adapt to; begin the range at 1"
            )

    @property
    def adaptive(self) -> Span | None:
        """The range whose size is chosen from the measured residual; None if there is none."""
        spans = (self.size, self.settle)
        return next((span for span in spans if span is not None and span.tolerance is not None), None)

    def sized(self, sweeps: int) -> Schedule:
        """The schedule with its adaptive range at so many sweeps."""
        name = "settle" if self.settle.tolerance is not None else "size"
        return replace(self, **{name: Span(sweeps, sweeps)})

    def __str__(self) -> str:
        parts = [self.kind + (f"-{self.size}" if self.size else "")]
        parts += [f"settle={self.settle}"] if self.settle.high else []
        parts += [f"weights={slashed(self.weights)}"] if self.weights else []
        return ":".join([*parts, *(["detach"] if self.detach else [])])

    def draw(self, seed: int, step: int) -> Schedule:
        """This step's schedule, its ranges drawn: a function of (seed, step), never of the rank.

        ValueError: a range adapts to what training measures; say `sized(sweeps)` first.
        """
        size = self.size.draw(f"size-{seed}-{step}") if self.size else None
        return replace(self, size=size, settle=self.settle.draw(f"settle-{seed}-{step}"))

    def at_largest(self) -> Schedule:
        """The schedule with every range at its upper end; what `parallel BPB` is measured with."""
        size = Span(self.size.high, self.size.high) if self.size else None
        return replace(self, size=size, settle=Span(self.settle.high, self.settle.high))

    def shares(self) -> list[tuple[Schedule, float]]:
        """Every schedule that `draw` can give, with its probability."""
        sizes = self.size.shares() if self.size else [(None, 1.0)]
        settles = self.settle.shares()
        return [(replace(self, size=size, settle=settle), p * q) for size, p in sizes for settle, q in settles]

    def passes(self, length: int) -> Passes:
        """The passes over a row of `length` positions. Ranges must have been drawn."""
        if length < 1:
            raise ValueError(f"a row of {length} positions has no passes; it needs at least 1")
        if not self.settle.fixed or (self.size and not self.size.fixed):
            raise ValueError(f"schedule {self} has a range; call draw(seed, step) or at_largest() first")
        full = range(length)
        slices = _slices(self.kind, self.size.low if self.size else 0, length)
        sweeps = self.settle.low + (self.size.low if self.size and self.kind in _SWEPT else 0)
        settling = [no_grad_pass(full)] * sweeps
        weights = list(self.weights) or ([0.0, 1.0] if self.kind == "hop" else [1.0])
        if len(weights) > len(slices):
            raise ValueError(
                f"schedule {self} has {len(weights)} weights for {len(slices)} passes with gradient; give no more"
            )
        weights += [weights[-1]] * (len(slices) - len(weights))
        passes = (
            *settling,
            *(Pass(positions, weight=w, detach=self.detach) for positions, w in zip(slices, weights, strict=True)),
        )
        check(passes)
        return passes


@dataclass(frozen=True)
class Curriculum:
    """Schedules one after the other, such as plain first and memory late: `parallel@0.5,settled-1..3`."""

    stages: tuple[tuple[Schedule, float], ...]
    """Each schedule with the share of the steps at which it ends; the last ends at 1."""
    steps: int | None = None
    """Steps of the whole training; without it stages have no place."""

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
        """The schedule of a step, its ranges not drawn.

        ValueError: there are several stages, and `steps` does not say where they end.
        """
        if self.steps is None and self.stages[1:]:
            raise ValueError(
                f"schedule {str(self)!r} changes at shares of the steps; say of how many: "
                "dataclasses.replace(curriculum, steps=1000)"
            )
        return next((s for s, end in self.stages if step < end * (self.steps or 1)), self.stages[-1][0])

    def draw(self, seed: int, step: int) -> Schedule:
        """This step's schedule, its ranges drawn: a function of (seed, step)."""
        return self.at(step).draw(seed, step)

    def at_largest(self) -> Schedule:
        """The last schedule with every range at its upper end; what `parallel BPB` is measured with."""
        return self.stages[-1][0].at_largest()

    def shares(self) -> list[tuple[Schedule, float]]:
        """Every schedule that `draw` can give, with the share of the steps that has it."""
        starts = (0.0, *(end for _, end in self.stages))
        parts = [(s.shares(), end - start) for (s, end), start in zip(self.stages, starts, strict=False)]
        return [(drawn, share * p) for draws, share in parts for drawn, p in draws]


def _parse_weights(text: str, schedule: str) -> tuple[float, ...]:
    weights = numbers(text)
    if not 0 < sum(weights) < math.inf:
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
    if kind == "hop":
        return [full] * 2
    if kind in ("chunked", "sequential"):
        size = size if kind == "chunked" else 1
        return [range(i, min(i + size, length)) for i in range(0, length, size)]
    return [full]


def effective_forwards(schedule: Schedule | Curriculum, length: int, source: float = 1.0, below: float = 0.0) -> float:
    """Forwards per token, weighted by cost: the mean over the schedule's draws (docs/method.md#conventions).

    `source` is the share of the blocks that lie up to the source block, `below` of those that no memory reaches.
    """
    return sum(share * effective_cost(s.passes(length), source, below) / length for s, share in schedule.shares())


def raw_forwards(schedule: Schedule | Curriculum, length: int) -> float:
    """Forwards per token, all weighted 1: the mean over the schedule's draws."""
    return sum(share * token_forwards(s.passes(length), length) for s, share in schedule.shares())
