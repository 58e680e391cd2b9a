"""Warnings of work that reads the same thing several times, each told once."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator


@contextlib.contextmanager
def each_told_once(logger: str) -> Iterator[None]:
    """Within, `logger` says no sentence twice: a source is looked at, and read, more than once."""
    sentences: set[str] = set()

    def is_new(record: logging.LogRecord) -> bool:
        sentence = record.getMessage()
        is_new = sentence not in sentences
        sentences.add(sentence)
        return is_new

    named = logging.getLogger(logger)
    named.addFilter(is_new)
    try:
        yield
    finally:
        named.removeFilter(is_new)
