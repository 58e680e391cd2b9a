"""A size of a schedule: fixed, drawn per step, or chosen from what training measures. No torch here."""

from __future__ import annotations

import math
import random
import re
from bisect import bisect
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import accumulate

SPAN_OPTIONS = ("p", "tolerance", "budget")
"""Options that belong to the range they follow."""
MOST_SIZES = 2**10
"""How many sizes a range may hold, and how large one is that counts passes: each size, and each pass, is counted."""


@dataclass(frozen=True)
class Span:
    """A size that is fixed (low = high), drawn per step (uniformly, or by `p`), or adaptive (with a `tolerance`)."""

    low: int
    high: int
    p: tuple[float, ...] = ()
    """Probability of every size from low to high; empty: all are equally likely."""
    tolerance: float | None = None
    """Residual of the memory above which a step has one sweep more than the one before it, and below which one less."""
    budget: float | None = None
    """Adaptive sizes: the most that they may be in the mean over the steps so far; none means no limit but `high`."""

    @staticmethod
    def parse(text: str, least: int, label: str, most: int = MOST_SIZES) -> Span:
        """Read `4` or `1..3`, at least `least` and at most `most`; `label` names it in errors."""
        match = re.fullmatch(r"([0-9]{1,100})(?:\.\.([0-9]{1,100}))?", text)
        if not match:
            raise ValueError(f"{label} {text!r} is not a number or a range such as 1..3")
        span = Span(int(match[1]), int(match[2] or match[1]))
        if not least <= span.low <= span.high:
            raise ValueError(f"{label} {text!r} must rise from at least {least}")
        if span.high > most or span.high - span.low >= MOST_SIZES:
            raise ValueError(f"{label} is too large: it may be at most {most:,}, a range at most {MOST_SIZES:,} sizes")
        return span

    def with_option(self, key: str, text: str, label: str) -> Span:
        """The same range with one of SPAN_OPTIONS, read from `text`; `label` names the schedule in errors."""
        if self.fixed:
            raise ValueError(f"{label}: {key}={text} belongs to a range such as 1..3, not to the fixed size {self.low}")
        if key == "p":
            return self._weighted(text, label)
        number = numbers(text)
        if key == "tolerance" and not self.p and len(number) == 1 and number[0] > 0:
            return replace(self, tolerance=number[0])
        if key == "budget" and self.tolerance and len(number) == 1 and self.low <= number[0] <= self.high:
            return replace(self, budget=number[0])
        raise ValueError(
            f"{label}: {key}={text} is not understood; give a tolerance above 0, then perhaps a budget in the range: "
            f"{self.low}..{self.high}:tolerance=0.1:budget={(self.low + self.high) / 2:g}"
        )

    def _weighted(self, text: str, label: str) -> Span:
        p, count = numbers(text), self.high - self.low + 1
        if len(p) != count or abs(sum(p) - 1) > 1e-9 or not (p[0] and p[-1]) or self.tolerance:
            raise ValueError(
                f"{label}: p={text} must give each of the {count} sizes {self.low}..{self.high} a probability; they "
                f"add up to 1, the ends are above 0, nothing adapts: settled-1..3:p=0.8/0.1/0.1"
            )
        return replace(self, p=p)

    def __str__(self) -> str:
        parts = [str(self.low) if self.fixed else f"{self.low}..{self.high}"]
        parts += [f"p={slashed(self.p)}"] if self.p else []
        parts += [f"tolerance={self.tolerance!r}"] if self.tolerance is not None else []
        parts += [f"budget={self.budget!r}"] if self.budget is not None else []
        return ":".join(parts)

    @property
    def fixed(self) -> bool:
        """Whether there is nothing to draw."""
        return self.low == self.high

    @property
    def most(self) -> float:
        """The mean that an adaptive size must not exceed."""
        return float(self.high) if self.budget is None else self.budget

    def draw(self, key: str) -> Span:
        """One size, a function of the key alone: the same on every rank and after every resume."""
        if self.tolerance is not None:
            raise ValueError(
                f"the sweeps {self} are chosen from the residual that training measures; train with `lrt train`, or "
                "give a range that is drawn, such as 1..3:p=0.8/0.1/0.1"
            )
        if self.p:
            size = self.low + bisect(list(accumulate(self.p[:-1])), random.Random(key).random())
        else:
            size = random.Random(key).randint(self.low, self.high)
        return Span(size, size)

    def shares(self) -> list[tuple[Span, float]]:
        """Every size that `draw` can give, with its probability; of an adaptive one, ends that use up the budget."""
        sizes, p = list(range(self.low, self.high + 1)), self.p
        if self.tolerance is not None:
            often = (self.most - self.low) / (self.high - self.low)
            sizes, p = [self.low, self.high], (1 - often, often)
        shares = zip(sizes, p or [1 / len(sizes)] * len(sizes), strict=True)
        return [(Span(size, size), share) for size, share in shares if share > 0]


NONE = Span(0, 0)


def numbers(text: str) -> tuple[float, ...]:
    """The numbers of `0.1/0.3/0.6`; none unless all are finite and at least 0."""
    try:
        weights = tuple(float(part) for part in text.split("/"))
    except ValueError:
        return ()
    return weights if all(0 <= x < math.inf for x in weights) else ()


def slashed(parts: Iterable[float]) -> str:
    """The text that `numbers` reads."""
    return "/".join(str(x).removesuffix(".0") for x in parts)
