"""Text that knows which of its characters a template wrote, through everything that templates do with text.

It is loaded by the process that renders templates, and imports nothing of this package.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

if TYPE_CHECKING:
    from typing_extensions import Self

DIRECTIVE = re.compile(r"%(?:\(\w+\))?[-+ #0]*\d*(?:\.\d+)?[a-zA-Z%]")
"""What `%` fills in a text."""


class Marked(str):
    """Text that knows which of its characters the template wrote."""

    _mask: bytes
    """One byte a character: 1 where the template wrote it."""

    def __new__(cls, text: str, mask: bytes | None = None) -> Self:
        marked = super().__new__(cls, text)
        marked._mask = bytes(len(text)) if mask is None else mask
        return marked

    def __str__(self) -> str:
        return self

    def __add__(self, other: Any) -> Any:
        return joined((self, other)) if isinstance(other, str) and not is_markup(other) else NotImplemented

    def __radd__(self, other: Any) -> Any:
        return joined((other, self)) if isinstance(other, str) else NotImplemented

    def __mul__(self, count: Any) -> Any:
        return Marked(str.__mul__(self, count), self._mask * count)

    def __rmul__(self, count: Any) -> Any:
        return self * count

    def __mod__(self, values: Any) -> Any:
        text, parts, end = str.__mod__(self, values), [], 0
        remaining = iter(values if isinstance(values, tuple) else (values,))
        for directive in DIRECTIVE.finditer(self):
            parts += [self[end : directive.start()], self._filled(directive[0], values, remaining)]
            end = directive.end()
        marked = joined([*parts, self[end:]])
        return marked if marked == text else text

    def _filled(self, directive: str, values: Any, remaining: Iterator[Any]) -> str:
        """What one directive of `%` becomes; "" where there is no value for it."""
        if directive == "%%":
            return self[:0] + literal("%")
        if directive.startswith("%("):
            value = values[directive[2 : directive.index(")")]] if isinstance(values, Mapping) else ""
            directive = "%" + directive[directive.index(")") + 1 :]
        else:
            value = next(remaining, "")
        return text_of(value) if directive == "%s" else str.__mod__(directive, (value,))

    def __getitem__(self, index: Any) -> Marked:
        mask = self._mask[index]
        return Marked(str.__getitem__(self, index), mask if isinstance(mask, bytes) else bytes([mask]))

    def __iter__(self) -> Iterator[Marked]:
        return (self[i] for i in range(len(self)))

    def lstrip(self, chars: str | None = None) -> Marked:
        return self[len(self) - len(str.lstrip(self, chars)) :]

    def rstrip(self, chars: str | None = None) -> Marked:
        return self[: len(str.rstrip(self, chars))]

    def strip(self, chars: str | None = None) -> Marked:
        return self.lstrip(chars).rstrip(chars)

    def removeprefix(self, prefix: str) -> Marked:
        return self[len(prefix) :] if self.startswith(prefix) else self

    def removesuffix(self, suffix: str) -> Marked:
        return self[: len(self) - len(suffix)] if suffix and self.endswith(suffix) else self

    def split(self, sep: str | None = None, maxsplit: Any = -1) -> list[Any]:
        return self._located(str.split(self, sep, maxsplit))

    def rsplit(self, sep: str | None = None, maxsplit: Any = -1) -> list[Any]:
        return self._located(str.rsplit(self, sep, maxsplit))

    def splitlines(self, keepends: bool = False) -> list[Any]:
        return self._located(str.splitlines(self, keepends))

    def partition(self, sep: str) -> tuple[Any, ...]:
        return tuple(self._located(str.partition(self, sep)))

    def rpartition(self, sep: str) -> tuple[Any, ...]:
        return tuple(self._located(str.rpartition(self, sep)))

    def replace(self, old: str, new: str, count: Any = -1) -> Any:
        parts = Marked.split(self, old, count) if old else ["", *self, ""]
        text, marked = str.replace(self, old, new, count), Marked(new, mask_of(new)).join(parts)
        return marked if marked == text else text

    def join(self, parts: Iterable[Any]) -> Any:
        together: list[Any] = []
        for part in parts:
            together += [self, part]
        str.join(self, together)  # the error where something is no text
        return joined(together[1:])

    def lower(self) -> Any:
        return self._as_long(str.lower(self))

    def upper(self) -> Any:
        return self._as_long(str.upper(self))

    def title(self) -> Any:
        return self._as_long(str.title(self))

    def capitalize(self) -> Any:
        return self._as_long(str.capitalize(self))

    def swapcase(self) -> Any:
        return self._as_long(str.swapcase(self))

    def casefold(self) -> Any:
        return self._as_long(str.casefold(self))

    def ljust(self, width: Any, fillchar: str = " ") -> Any:
        return self._padded(str.ljust(self, width, fillchar), 0, fillchar)

    def rjust(self, width: Any, fillchar: str = " ") -> Any:
        text = str.rjust(self, width, fillchar)
        return self._padded(text, len(text) - len(self), fillchar)

    def center(self, width: Any, fillchar: str = " ") -> Any:
        text = str.center(self, width, fillchar)
        return self._padded(text, len(str.center("\0" * len(self), width, "-").partition("\0")[0]), fillchar)

    def zfill(self, width: Any) -> Any:
        text, sign = str.zfill(self, width), int(self[:1] in ("+", "-"))
        return joined((self[:sign], "0" * (len(text) - len(self)), self[sign:]))

    def _padded(self, text: str, left: int, fill: str) -> Marked:
        """This text within `text`, `left` characters of filling before it."""
        one = mask_of(fill)
        return Marked(text, one * left + self._mask + one * (len(text) - left - len(self)))

    def _as_long(self, text: str) -> str:
        return Marked(text, self._mask) if len(text) == len(self) else text

    def _located(self, parts: Iterable[str]) -> list[Any]:
        """The same parts, which follow each other in this text."""
        pieces, offset = [], 0
        for part in parts:
            offset = str.find(self, part, offset)
            pieces.append(self[offset : offset + len(part)])
            offset += len(part)
        return pieces


class Safe(Marked):
    """What `|safe` gives: as jinja2 has it, it escapes what is added to it, and then nothing of it stays marked."""

    def __add__(self, other: Any) -> Any:
        return Markup(self) + other

    def __radd__(self, other: Any) -> Any:
        return other + Markup(self)

    def __mod__(self, values: Any) -> Any:
        return Markup(self) % values


def is_markup(text: str) -> bool:
    """Whether the text escapes what it is joined with."""
    return isinstance(text, Markup)


def mask_of(text: str) -> bytes:
    """Which characters the template wrote."""
    return text._mask if isinstance(text, Marked) else bytes(len(text))


def joined(parts: Iterable[str]) -> Marked:
    """Texts one after the other."""
    parts = list(parts)
    return Marked("".join(parts), b"".join(map(mask_of, parts)))


@lru_cache(4096)
def literal(text: str) -> Marked:
    """Text that the template wrote."""
    return Marked(text, b"\1" * len(text))


def text_of(value: Any) -> str:
    """What an expression outputs; no number of a message can spell a token by itself."""
    if isinstance(value, str):
        return value
    if value is None or isinstance(value, (bool, int, float)):
        return literal(str(value))
    return spelled(str(value), value, repr) if isinstance(value, (dict, list, tuple)) else str(value)


def spelled(text: str, value: Any, form: Callable[[str], str], sort: bool = False) -> str:
    """`text`, in which the texts within `value` stand one after the other, each spelled by `form`, with their marks."""
    mask, offset = bytearray(len(text)), 0
    for part in texts_in(value, sort):
        literal_form, characters = form(part), [form(c)[1:-1] for c in part] if any(mask_of(part)) else []
        offset = text.find(literal_form, offset)
        if offset < 0:
            return text
        if sum(map(len, characters)) + 2 == len(literal_form):
            marks = zip(mask_of(part), characters, strict=True)
            mask[offset + 1 : offset + len(literal_form) - 1] = b"".join(bytes([mark]) * len(c) for mark, c in marks)
        offset += len(literal_form)
    return Marked(text, bytes(mask))


def texts_in(value: Any, sort: bool) -> Iterator[str]:
    """The texts of a value in the order in which it is written, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in sorted(value.items()) if sort else value.items():
            yield from texts_in(key, sort)
            yield from texts_in(inner, sort)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from texts_in(inner, sort)


def unmarked(value: Any) -> Any:
    """What a message holds, its texts ready to be put together with marked ones."""
    if isinstance(value, str):
        return Marked(value)
    if isinstance(value, dict):
        return {key: unmarked(inner) for key, inner in value.items()}
    return [unmarked(inner) for inner in value] if isinstance(value, list) else value
