"""Fields of a frozen configuration have the types that they are annotated with, however it was built.

By hand: this module travels with exported models, which need torch and transformers alone.
"""

from __future__ import annotations

import dataclasses
import os
from functools import cache
from numbers import Integral, Real
from typing import Any, Literal, get_args, get_origin, get_type_hints


def check_fields(config: Any, part: str) -> None:
    """Bring the fields of `config` to their types: lists to tuples, numpy's numbers and paths to plain ones.

    ValueError: a field of another type, named as `part`.NAME.
    """
    for name, (hint, written) in hints_of(type(config)).items():
        value = getattr(config, name)
        if get_origin(hint) is Literal and isinstance(value, str):
            continue  # the configuration itself says which there are
        typed = field_value(hint, written, value, f"{part}.{name}")
        if typed is not value:
            object.__setattr__(config, name, typed)


def named(config: Any, *names: str) -> dict[str, Any]:
    """Some fields of `config`."""
    return {name: getattr(config, name) for name in names}


@cache
def hints_of(cls: type) -> dict[str, tuple[Any, str]]:
    """Each field's type, and as it is written."""
    hints = get_type_hints(cls)
    return {f.name: (hints[f.name], str(f.type)) for f in dataclasses.fields(cls)}


def field_value(hint: Any, written: str, value: Any, where: str) -> Any:
    """A field's value, of the type it is annotated with; no truth value is a number. ValueError: it is of another."""
    value = _plain(value)
    number = any(isinstance(x, bool) for x in (value if isinstance(value, tuple) else (value,))) and hint is not bool
    if number or not _fits(value, hint):
        raise ValueError(f"{where} is {value!r}; it must be {_in_words(hint, written)}")
    return value


def _plain(value: Any) -> Any:
    """The same in Python's own types."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        parts = tuple(map(_plain, value))
        same = isinstance(value, tuple) and all(new is old for new, old in zip(parts, value, strict=True))
        return value if same else parts
    if isinstance(value, Real):
        return int(value) if isinstance(value, Integral) else float(value)
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a field's type: a plain one, a choice, one of several, or a tuple of such."""
    kinds, kind = get_args(hint), get_origin(hint)
    if kind is Literal:
        return value in kinds
    if kind is tuple:
        if not isinstance(value, tuple):
            return False
        each = (kinds[0],) * len(value) if kinds[-1] is ... else kinds
        return len(value) == len(each) and all(map(_fits, value, each))
    if kinds:
        return any(_fits(value, one) for one in kinds)
    return isinstance(value, (int, float) if hint is float else hint)


def _in_words(hint: Any, written: str) -> str:
    choices = get_args(hint) if get_origin(hint) is Literal else ()
    return f"one of {', '.join(map(str, choices))}" if choices else written
