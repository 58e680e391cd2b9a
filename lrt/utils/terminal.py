"""Text that fits the reader's screen: long lines are broken between words."""

from __future__ import annotations

import re
import shutil
import sys
import textwrap
import unicodedata
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


class WordByWord:
    """Text that comes piece by piece; on a terminal a word that the line cannot hold begins the next.

    The word that is being written is held back until it ends; into a file or a pipe every piece goes as it is. As a
    context manager it shows that word, and ends the line, whatever ends the text.
    """

    MOST_HELD = 24
    """Characters after which a word is shown though it may go on, as in languages without spaces."""

    def __init__(self, stream: TextIO):
        self.stream, self.word, self.column = stream, "", 0
        self.columns = shutil.get_terminal_size().columns if stream.isatty() else 0

    def __enter__(self) -> WordByWord:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def write(self, piece: str) -> None:
        """Show a piece, but for its last word."""
        text = piece
        if self.columns:
            *parts, self.word = re.split(r"(\s)", self.word + piece)
            parts += [self.word] if len(self.word) > self.MOST_HELD else []
            self.word = "" if len(self.word) > self.MOST_HELD else self.word
            text = "".join(map(self._placed, parts))
        print(text, end="", file=self.stream, flush=True)

    def end(self) -> None:
        """Show the last word, and end the line."""
        print(self._placed(self.word) if self.columns else "", file=self.stream, flush=True)
        self.word, self.column = "", 0

    def _placed(self, part: str) -> str:
        """A word or a space as it goes to the screen; spaces at a line's end are left out."""
        wide = sum(1 + (unicodedata.east_asian_width(sign) in "WF") for sign in part)
        if part == "\n":
            self.column = 0
        elif self.column + wide <= self.columns:
            self.column += wide
        elif part.isspace():
            return ""
        else:
            broken, self.column = "\n" * (self.column > 0), wide % self.columns
            return broken + part
        return part
