"""Flags into dataclasses, with tyro: a wrong one becomes one line that names it."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


def parse(what: Callable[..., T], args: list[str], command: str, **options: Any) -> T:
    """Read flags into a dataclass or function arguments with tyro; a wrong one becomes one line (ValueError)."""
    import tyro

    message_box = io.StringIO()
    try:
        with contextlib.redirect_stderr(message_box):
            return tyro.cli(what, args=args, prog=f"lrt {command}", **options)
    except SystemExit as end:
        if not end.code:
            raise
        raise ValueError(f"{_first_line(message_box.getvalue())}; see lrt {command} --help") from None


def _first_line(box: str) -> str:
    """The message in tyro's box, without title and frame (drawn or ASCII), plus the flag it suggests."""
    plain = [line.strip("│╭╮╰╯ ") for line in box.splitlines()[1:]]
    parts: list[list[str]] = [[]]
    for line in plain:
        if set(line) <= set("─- "):
            parts += [[]] if parts[-1] else []
        else:
            parts[-1].append(line)
    message = re.sub(r"^Error parsing [\w.]+: (?=\w+\.\w+ )", "", " ".join(parts[0]).strip().rstrip("."))
    near = [part[1].split()[0] for part in parts if len(part) > 1 and part[0].startswith("Perhaps you meant")]
    return message + (f"; did you mean {near[0]}?" if near else "")


def early_value(args: list[str], flag: str, default: str) -> str:
    """The value of one flag, before the rest can be parsed."""
    for i, arg in enumerate(args):
        if arg == flag and i + 1 < len(args):
            return args[i + 1]
        if arg.startswith(flag + "="):
            return arg.partition("=")[2]
    return default
