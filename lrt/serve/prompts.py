"""What the page offers to begin with: the prompts of the run's model card, or some that fit its text."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from lrt.utils.files import one_line, parse_yaml, read_text

log = logging.getLogger("lrt.serve")
CARD = "README.md"
FRONT = re.compile(r"\A---\n(.*?\n)---\n", re.S)
"""The part of a card that is YAML."""
MOST, LONGEST = 8, 2000
"""Prompts that are taken from a card, and characters of one."""
PYTHON = (
    'def area(self):\n    """Return the',
    "def mean(values):\n    total = 0\n    for value in values:\n        total += value\n    return total / len(values",
)
ENGLISH = (
    "It was",
    "Once upon a time there was a king who had three daughters,",
    "He opened the door, looked into the room, and saw that it was empty. The window stood open, and on the table lay",
)


def prompts_of(run: Path, source: str) -> tuple[str, ...]:
    """Prompts for the model of a run: `widget` of its card, as model hubs have it, else by the text's `source`.

    A card that cannot be read is told in the log and left: a server does not fail for its page's sake.
    """
    try:
        prompts = card_prompts(run / CARD) if (run / CARD).is_file() else ()
    except (ValueError, OSError) as error:
        log.warning(one_line(f"the page begins without the card's prompts: {error}"))
        prompts = ()
    return prompts or (PYTHON if source == "python" else ENGLISH)


def card_prompts(card: Path) -> tuple[str, ...]:
    """The texts under `widget` in a card's front matter; none if it has none. ValueError: it is no YAML."""
    front = FRONT.match(read_text(card, "model card"))
    widgets = parse_yaml(front[1], f"model card {card}").get("widget", []) if front else []
    if not isinstance(widgets, list):
        raise ValueError(f"model card {card}: widget must be a list of prompts, such as - text: It was")
    texts = [widget.get("text") for widget in widgets[:MOST] if isinstance(widget, dict)]
    return tuple(text[:LONGEST] for text in texts if isinstance(text, str) and text)
