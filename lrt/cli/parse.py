"""Flags into dataclasses, with tyro: a wrong one becomes one line that names it."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
import os
import re
import shutil
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from lrt.config.run import TASK, DataConfig, RunConfig
from lrt.config.unread import unread
from lrt.utils.files import expand_home, require_name
from lrt.utils.terminal import fitted, show

T = TypeVar("T")
WIDE = "1000000"
"""Columns of the terminal that tyro's message boxes are made for, so that no line in them is broken."""


NARROWEST = 30
"""Columns below which tyro's boxes are not drawn: at one column that would not end."""
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
DASHES = "\u2010\u2011\u2012\u2013\u2014\u2015\u2212\ufe58\ufe63\uff0d"
DASHED = re.compile(rf"-?[{DASHES}]+-?[A-Za-z][\w.-]*(=|$)")
QUOTED = re.compile("^[\u2018-\u201f\u00ab]|=[\u2018-\u201f\u00ab]|[\u2018-\u201f\u00bb]$")
ERRORS = {
    r"invalid literal for int\(\) with base 10: (.*)": r"\1 is \2; give a whole number",
    r"could not convert string to float: (.*)": r"\1 is \2; give a number",
    r"is (empty;.*|.* too small to hold;.*)": r"\1 is \2",
    r"Could not find valid parse for arguments: .*''.*()": r"\1 is empty; give a path",
    r"Could not (?:find valid parse for|parse) arguments:? \[(.*?)\].*": r"\1 is \2; give what the help names",
    r"no type matching .* could be instantiated from \[(.*)\]": r"\1 is \2; give a number",
}
"""How Python and tyro say that a text is no number or path, and how it is said here."""
SAID_OTHERWISE = {
    r"invalid choice (.*) for argument '(.*)'\. Expected one of \((.*?),?\)": r"\2 is \1; choose one of \3",
    r"Missing value for argument '(.*)'\. Expected 1 values": r"\1 is without a value; give one after it",
}
"""More of tyro's sentences, and ours."""
UNKNOWN = "Unrecognized options: "
STRAY: dict[str, str] = dict.fromkeys(("train", "tokenize"), "a text is given as --data.source {}")
"""What a word without a flag may have been meant as, by the command."""
MISSING = re.compile(r"((?:--[\w.-]+ )?[A-Z]+|\{[\w,]+\}) (.+?) ?\(required\)")
"""What tyro says of an argument that has to be given."""
BOX_CORNERS = ("╭", " --")


def parse(flags: type[T], args: Sequence[str], command: str, **options: Any) -> T:
    """Read arguments into `flags` with tyro; `~` in paths is expanded.

    --help prints the command's short help where it has one, and --help-all what tyro makes of all flags. ValueError: a
    wrong argument, in one line; a number that no machine holds. SystemExit(0): help was printed.
    """
    import tyro

    from lrt.cli.flag_help import flag_rules
    from lrt.cli.short_help import SHORT_HELP

    by_name = (tyro.conf.PositionalMetavarFromFieldName,)  # RUN, where tyro says PATH
    options |= {"prog": f"lrt {command}", "registry": flag_rules(), "config": by_name}
    if {"-h", "--help", "--help-all"} & set(args):
        if command in SHORT_HELP and "--help-all" not in args:
            print(SHORT_HELP[command])
            raise SystemExit(0)
        print(_help(partial(tyro.cli, flags, args=["--help"], **options)))
        raise SystemExit(0)
    message_box = io.StringIO()
    try:
        with contextlib.redirect_stderr(message_box), _terminal_of(WIDE):
            parsed = tyro.cli(flags, args=args, **options)
    except SystemExit as end:
        if not end.code:
            raise
        message = _pasted(args) or _unknown(_first_line(message_box.getvalue()), command)
        raise ValueError(f"{message}{' See' if message.endswith('?') else '; see'} lrt {command} --help") from None
    checked = _checked(parsed, "")
    tell(command, [f"{flag} is given more than once; the last one counts" for flag in _given_twice(args)])
    return checked


def tell(command: str, sentences: Sequence[str]) -> None:
    """What somebody should know of the arguments, on standard error; of several processes the first says it."""
    for sentence in sentences if os.environ.get("RANK", "0") == "0" else ():
        show(f"lrt {command}: {sentence}", sys.stderr)


def tell_unread(command: str, config: RunConfig, args: Sequence[str]) -> None:
    """Tell which of the flags given change nothing, as the run is otherwise set and its text is."""
    names = names_of(args)
    tell(command, unread(config, names, "--data.text-column" not in names or _may_have_columns(config.data)))


def _may_have_columns(data: DataConfig) -> bool:
    """Whether the text has columns; what is not there is told by whoever reads it."""
    from lrt.data.prepare import has_columns

    try:
        return data.source.startswith(TASK) or has_columns(data)
    except (ValueError, OSError):
        return True


def _pasted(args: Sequence[str]) -> str:
    """What is wrong with an argument from a page that sets dashes and quotation marks as type; "" if there is none."""
    for arg in args:
        if DASHED.match(arg):
            return f"{arg} begins with a typographic dash; write --{arg.lstrip(DASHES + '-')}"
        if QUOTED.search(arg):
            return f"{arg} has typographic quotation marks; write plain ones, or none"
    return ""


def _unknown(message: str, command: str) -> str:
    """tyro's list of what it does not know, as the flags alone, or as the words that belong to none."""
    if not message.startswith(UNKNOWN):
        return message
    names, semicolon, near = message.removeprefix(UNKNOWN).partition("; did you mean ")
    unknown = names.split(", ")
    if flags := [name for name in unknown if name.startswith("-")]:
        return f"unknown flag{'s' * (len(flags) > 1)} {', '.join(flags)}{semicolon}{near}"
    meant = STRAY.get(command, "the command takes no more words").format(unknown[0])
    return f"{', '.join(unknown)}: {meant}"


def _given_twice(args: Sequence[str]) -> list[str]:
    """Flags that occur more than once."""
    names = [name for name in names_of(args) if len(name) > 2]
    return sorted({name for name in names if names.count(name) > 1})


class _Page(io.TextIOWrapper):
    """Collects what is printed, as it would be printed on standard output: in its encoding, coloured if it is one."""

    def __init__(self) -> None:
        super().__init__(io.BytesIO(), encoding=sys.stdout.encoding or "utf-8", errors="replace")
        self.on_screen = sys.stdout.isatty()

    def isatty(self) -> bool:
        return self.on_screen


def _help(print_help: Callable[[], object]) -> str:
    """What tyro prints, with usage and description broken between words where the screen ends."""
    page = _Page()
    columns = max(NARROWEST, shutil.get_terminal_size().columns)
    with contextlib.redirect_stdout(page), contextlib.suppress(SystemExit), _terminal_of(str(columns)):
        print_help()
    page.seek(0)
    usage, *lines = page.read().rstrip("\n").split("\n")
    first_box = next((i for i, line in enumerate(lines) if COLOUR.sub("", line).startswith(BOX_CORNERS)), len(lines))
    description = "\n".join([COLOUR.sub("", usage), *lines[:first_box]])
    return "\n".join([fitted(description, shutil.get_terminal_size().columns, 0), *lines[first_box:]])


def names_of(args: Sequence[str]) -> list[str]:
    """The flags among arguments, spelled as help spells them, without values."""
    flags = (arg.partition("=")[0] for arg in args if arg.startswith("--"))
    return [flag.replace("_", "-") for flag in flags]


def early_value(args: Sequence[str], flag: str, default: str) -> str:
    """The value of one flag, before the rest can be parsed; of several the last, as tyro takes it."""
    value = default
    for i, arg in enumerate(args):
        name, equals, after = arg.partition("=")
        if name.replace("_", "-") == flag and (equals or i + 1 < len(args)):
            value = after if equals else args[i + 1]
    return value


def early_positional(args: Sequence[str], switches: Collection[str]) -> str | None:
    """The first argument that is neither a flag nor a flag's value; `switches` are flags that take none."""
    before = ""
    for arg in args:
        takes_it = before.startswith("-") and "=" not in before and before not in switches
        if not arg.startswith("-") and not takes_it:
            return arg
        before = arg
    return None


@contextlib.contextmanager
def _terminal_of(columns: str) -> Iterator[None]:
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = columns
    try:
        yield
    finally:
        del os.environ["COLUMNS"]
        if before is not None:
            os.environ["COLUMNS"] = before


def _first_line(box: str) -> str:
    """The message in tyro's box, without title and frame (drawn or ASCII), plus the flag it suggests."""
    plain = [line.strip("│╭╮╰╯ ") for line in COLOUR.sub("", box).splitlines()[1:]]
    parts: list[list[str]] = [[]]
    for line in plain:
        if set(line) <= set("─- "):
            parts += [[]] if parts[-1] else []
        else:
            parts[-1].append(line)
    message = re.sub(r"^Error parsing [\w.]+: (?=\w+(\.\w+)+ )", "", " ".join(parts[0]).strip().rstrip("."))
    if missing := MISSING.findall(message):
        return "; ".join(f"{name} is missing: {about.rstrip('.')}" for name, about in missing)
    for form, plain_words in ERRORS.items():
        message = re.sub(rf"Error parsing (\S+|\[.*\]): {form}", plain_words, message)
    for form, plain_words in SAID_OTHERWISE.items():
        message = re.sub(form, plain_words, message)
    near = [part[1].split()[0] for part in parts if len(part) > 1 and part[0].startswith("Perhaps you meant")]
    return message + (f"; did you mean {near[0]}?" if near else "")


def flag_name(field: dataclasses.Field[Any], within: str) -> str:
    """A field as the command line calls it: a flag, or in capitals what is told by its place."""
    if "Positional[" in str(field.type):
        return field.name.upper()
    if "name=''" in str(field.type):  # its own fields are flags of the command
        return within
    return f"{within or '-'}{'.' if within else '-'}{field.name}".replace("_", "-")


def _checked(value: Any, name: str) -> Any:
    """`value` with `~` in its paths expanded. ValueError: an integer of more than 64 bits, a NaN, or an infinity."""
    if isinstance(value, Path):
        require_name(str(value), name)
        return expand_home(value)
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError(f"{name} is {value}; it must fit 64 bits")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} is {value}; give a number that is finite")
    if type(value) is tuple:
        return tuple(_checked(item, name) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        checked = {f.name: _checked(fields[f.name], flag_name(f, name)) for f in dataclasses.fields(value)}
        changed = {n: v for n, v in checked.items() if v is not fields[n] and v != fields[n]}
        return dataclasses.replace(value, **changed) if changed else value
    return value
