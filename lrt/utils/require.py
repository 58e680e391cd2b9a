"""Refusals in one line: what a value is, and what it may be."""

from __future__ import annotations

from typing import Any, get_args


def require(condition: bool, message: str) -> None:
    """Raise `ValueError(message)` unless `condition`; the message names the numbers and the remedy."""
    if not condition:
        raise ValueError(message)


def require_at_least(least: float, **values: float | None) -> None:
    """Raise `ValueError` unless each value is None or at least `least`; they are named as flags."""
    for name, value in values.items():
        require(value is None or value >= least, f"--{name.replace('_', '-')} is {value}; give at least {least}")


def require_at_most(most: float, **values: float | None) -> None:
    """Raise `ValueError` unless each value is None or at most `most`; they are named as flags."""
    for name, value in values.items():
        require(value is None or value <= most, f"--{name.replace('_', '-')} is {value}; give at most {most:,}")


MOST_SEED = 2**32 - 1
"""Weights are drawn by torch's generator, which looks at 32 bits of a seed: larger ones would repeat smaller."""


def require_seed(name: str, seed: int) -> None:
    """Raise `ValueError` unless other seeds draw other weights."""
    require(0 <= seed <= MOST_SEED, f"{name} is {seed}; it must be at least 0, and at most {MOST_SEED:,}")


def require_choice(name: str, value: str, choices: Any) -> None:
    """Raise `ValueError` unless `value` is one of a Literal's."""
    require(value in get_args(choices), f"{name} is {value!r}; choose one of {', '.join(get_args(choices))}")
