"""Nested settings by dotted names, such as `train.horizon`, and back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any


def leaves(tree: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Every value that is no mapping itself, by its dotted name, in order."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{above}{name}.")
        else:
            yield above + name, value


def nested(values: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """The tree that has these leaves; a later value of a name replaces an earlier one."""
    tree: dict[str, Any] = {}
    for name, value in values:
        *above, last = name.split(".")
        node = tree
        for key in above:
            node = node.setdefault(key, {})
        node[last] = value
    return tree
