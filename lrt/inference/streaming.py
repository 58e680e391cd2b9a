"""Streaming text: tokens in, text out as soon as it is certain."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable, Sequence
from typing import final

DecodeBytes = Callable[[Iterable[int]], bytes]
"""Spells token ids as UTF-8 bytes, such as a tokenizer's `decode_bytes`."""


@final
class TextStream:
    """The text of one answer, piece by piece.

    A piece never ends inside a UTF-8 character, nor inside what may become a stop text; a stop text ends the answer and
    is not part of it. Bytes that are not UTF-8 become U+FFFD.
    """

    def __init__(self, decode_bytes: DecodeBytes, stop: Sequence[str] = ()) -> None:
        self._decode_bytes, self._stop = decode_bytes, tuple(stop)
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""
        self.stopped = False

    def push(self, token: int, looking: bool = True) -> str:
        """Take in a token; return the text that has become certain. Not `looking`: no stop text ends it."""
        new = self._utf8.decode(self._decode_bytes([token]))
        return self._release(new) if looking else new

    def close(self) -> str:
        """The rest, once no token follows."""
        text = self._release(self._utf8.decode(b"", final=True)) + self._held
        self._held = ""
        return text

    def _release(self, new: str) -> str:
        if self.stopped:
            return ""
        text = self._held + new
        starts = [index for index in (text.find(stop) for stop in self._stop) if index >= 0]
        self.stopped = bool(starts)
        end = min(starts) if starts else len(text) - self._doubtful(text)
        self._held = "" if starts else text[end:]
        return text[:end]

    def _doubtful(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop text."""
        longest = max((len(stop) - 1 for stop in self._stop), default=0)
        ends = range(min(longest, len(text)), 0, -1)
        return next((n for n in ends if any(stop.startswith(text[-n:]) for stop in self._stop)), 0)
