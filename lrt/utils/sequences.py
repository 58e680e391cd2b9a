"""What two sequences share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def common_beginning(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Length of the beginning that both have: texts by characters, lists by their elements."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))
