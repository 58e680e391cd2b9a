"""Hooks on modules that several threads may call: each acts in the thread that set it, and goes when that is done."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils.hooks import RemovableHandle


def in_this_thread(hook: Callable[..., Any]) -> Callable[..., Any]:
    """`hook`, which leaves the calls of other threads as they are."""
    mine = threading.get_ident()
    return lambda *call: hook(*call) if threading.get_ident() == mine else None


@contextmanager
def while_hooked(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Remove these hooks at the end of the block, whatever ends it."""
    set_hooks = list(handles)
    try:
        yield
    finally:
        for handle in set_hooks:
            handle.remove()
