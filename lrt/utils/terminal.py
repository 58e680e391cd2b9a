"""Text that fits the reader's screen: long lines are broken between words."""

from __future__ import annotations

import shutil
import sys
import textwrap
from pathlib import Path
from typing import TextIO


def fitted(text: str, columns: int, hang: int = 2) -> str:
    """`text` with every longer line broken between words; what follows is indented by `hang` more columns."""
    return "\n".join(_broken(line, columns, hang) for line in text.split("\n"))


def _broken(line: str, columns: int, hang: int) -> str:
    if len(line) <= columns:
        return line
    indent = " " * min(len(line) - len(line.lstrip()) + hang, columns // 2)
    width = max(columns, len(indent) + 1)
    parts = textwrap.wrap(line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    return "\n".join(parts)


def command_name() -> str:
    """What to type to call this program again: `lrt`, or where that is if the shell does not find it."""
    started = Path(sys.argv[0])
    if shutil.which("lrt"):
        return "lrt"
    return str(started) if started.name == "lrt" and started.is_file() else f"{Path(sys.executable).name} -m lrt"


def show(text: str, stream: TextIO | None = None) -> None:
    """Print to standard output, or to `stream`: fitted to a terminal, as it is into a file or a pipe."""
    to = sys.stdout if stream is None else stream
    on_screen = to is not None and to.isatty()
    print(fitted(text, shutil.get_terminal_size().columns) if on_screen else text, file=to, flush=True)
