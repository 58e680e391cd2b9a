"""What may stand where a command line is being typed: commands, flags, choices, or a path. No torch."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from lrt.cli.bench import KINDS as BENCHES
from lrt.cli.main import COMMANDS
from lrt.cli.parse import flag_name
from lrt.config.run import Device, TrackerName

PATHS = ":paths"
"""In place of a word: any file or folder."""
SCHEDULES = ("parallel", "interleaved-2", "refinement-1", "chunked-8", "sequential", "settled-1..3", "hop-1")
MODES = ("exact", "jacobi", "interleaved-8", "zero_memory")
LIKELY: dict[str, tuple[str, ...]] = {
    "device": get_args(Device),
    "log-to": get_args(TrackerName),
    "mode": MODES,
    "modes": MODES[:-1],
    "prefill": MODES[:-1],
    "schedule": SCHEDULES,
    "schedules": SCHEDULES,
    "source": ("python", PATHS),
    "suite": ("core", "blimp", "parity", "sums", "s5", "a5", "parity_check", "mqar-8-8192", "pointers-2"),
    "tokenizer": ("bytes", "bpe", PATHS),
    "folder": (PATHS,),
    "init-from": (PATHS,),
    "validation-source": (PATHS,),
}
"""By the last part of a flag's name: what a text is likely to be."""


class Word(NamedTuple):
    """One thing that may be typed."""

    text: str
    about: str = ""


class Argument(NamedTuple):
    """A flag of a command, or in capitals what its place tells."""

    name: str
    about: str
    values: tuple[str, ...]
    """Words it may be; empty if it is a number or any text."""
    takes: Literal["nothing", "one", "many"]


def next_words(typed: Sequence[str]) -> list[Word]:
    """What the last of the words after `lrt` may become; it may be empty, and is complete up to the cursor.

    `--flag=value` may be one word, or three as bash has it; its values stand without the flag.
    """
    *before, last = typed[1:] if typed[:1] == ["--traceback"] else typed
    before = [word for word in before if word != "="]
    last = "" if last == "=" else last
    if before[:1] == ["help"]:
        return _starting(_below([word for word in before[1:] if word != "help"]), last)
    if below := _below(before):
        first = (
            [Word("help", "what a command does"), Word("--version"), Word("--help"), Word("--traceback")]
            if not before
            else []
        )
        return _starting([*below, *first], last)
    if before[0] not in COMMANDS or (before[0] == "bench" and before[1] not in BENCHES):
        return []
    flags = importlib.import_module(f"lrt.cli.{before[0]}").FLAGS
    return _of_command(list(arguments(flags[before[1]] if isinstance(flags, dict) else flags)), before, last)


def _below(before: Sequence[str]) -> list[Word]:
    """The commands below what is typed: all of them, those of bench, or none."""
    kinds = {(): COMMANDS, ("bench",): BENCHES}.get(tuple(before), {})
    return [Word(name, about) for name, about in kinds.items()]


def _starting(words: Sequence[Word], last: str) -> list[Word]:
    return [word for word in words if word.text.startswith(last) or word.text == PATHS]


def _of_command(known: list[Argument], before: Sequence[str], last: str) -> list[Word]:
    """The values of the flag before, or of the place; of a word that begins with a dash, the flags."""
    flags = {a.name: a for a in known if a.name.startswith("-")}
    flag, equals, value = last.partition("=")
    if equals and flag in flags:
        return _starting(_values(flags[flag]), value)
    wanted = [Word(a.name, a.about) for a in flags.values()]
    wanted += [Word("--help"), Word("--help-all", "every flag")]
    if last.startswith("-"):
        return _starting(wanted, last)
    owner, count = _owner(flags, before)
    if owner is not None and (owner.takes == "many" or count == 0):
        return _starting(_values(owner), last)
    places = [a for a in known if not a.name.startswith("-")]
    return _starting([word for a in places for word in _values(a)] or wanted, last)


def _owner(flags: dict[str, Argument], before: Sequence[str]) -> tuple[Argument | None, int]:
    """The nearest flag before that takes something, and how many words it has already."""
    for count, word in enumerate(reversed(before)):
        if word.startswith("--"):
            flag = flags.get(word.partition("=")[0].replace("_", "-"))
            return (None, 0) if flag is None or flag.takes == "nothing" else (flag, count + ("=" in word))
    return None, 0


def _values(argument: Argument) -> list[Word]:
    return [Word(value) for value in argument.values]


def arguments(flags: type, within: str = "") -> Iterator[Argument]:
    """What a command takes, from the fields of its dataclass, nested ones among them."""
    hints, about = get_type_hints(flags), _sentences(flags)
    for field in dataclasses.fields(flags):
        name, hint = flag_name(field, within), hints[field.name]
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            yield from arguments(hint, name)
            continue
        values, takes = _takes(hint)
        values = values or LIKELY.get("schedule" if name == "NAME" else name.rpartition(".")[2].lstrip("-"), ())
        if takes == "nothing" and field.default is True:
            name = re.sub(r"(?<=[.-])(?=\w[\w-]*$)", "no-", name, count=1)
        for spelled in (name, *re.findall(r"[\"'](--[\w-]+)[\"']", str(field.type))):  # its aliases stand there
            yield Argument(spelled, about.get(field.name, ""), values, takes)


def _takes(hint: Any) -> tuple[tuple[str, ...], Literal["nothing", "one", "many"]]:
    """The words that a type allows, and how many of them."""
    if hint is bool:
        return (), "nothing"
    if get_origin(hint) is tuple:
        return _takes(get_args(hint)[0])[0], "many"
    if get_origin(hint) is Literal:
        return tuple(map(str, get_args(hint))), "one"
    kinds = [kind for kind in get_args(hint) if kind is not type(None)]
    if get_origin(hint) is Union or kinds:
        return _takes(kinds[0])
    return ((PATHS,) if hint is Path else ()), "one"


def _short(text: str) -> str:
    return textwrap.shorten(re.split(r"[;:.] ", " ".join(text.split()))[0].rstrip("."), 60, placeholder=" ..")


def _sentences(flags: type) -> dict[str, str]:
    """The beginning of the sentence under each field, the parents' among them."""
    about: dict[str, str] = {}
    for owner in [parent for parent in reversed(flags.__mro__) if dataclasses.is_dataclass(parent)]:
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
        assert isinstance(definition, ast.ClassDef)
        for field, text in zip(definition.body, definition.body[1:], strict=False):
            match field, text:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str() as words)):
                    about[name] = _short(words)
                case _:
                    pass
    return about
