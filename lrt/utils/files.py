"""Files that somebody else may have written: read bounded and checked, with errors of one line; and written whole.

Every reader takes regular files alone (a pipe or a device would never end), UTF-8 without a byte order mark, and a size
and depth that fit. What comes out are plain values: objects with string keys that each occur once, lists, strings,
numbers of at most 128 bits, true, false, null. Everything else raises ValueError naming file, place and remedy: `label`
is what it calls the file, such as `sweep file`.
An object that carries a seal (`seals.py`) must be what that says; the seal itself is not handed on.
"""

from __future__ import annotations

import contextlib
import csv
import io
import itertools
import json
import math
import os
import re
import stat
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lrt.utils.seals import SEAL, seal_of, unsealed

MEBI = 2**20
MOST_JSON = 64 * MEBI
MOST_SETTINGS = 2**18
"""Bytes of a YAML, TOML or CSV file, which people write by hand."""
MOST_LINES = 1024 * MEBI
MOST_LINE = 16 * MEBI
"""Bytes of a JSON-lines file, and of one line in it."""
DAY = 86_400.0
"""Seconds after which what nobody has written into is taken for abandoned."""
DEPTH = 64
"""Levels of objects and lists inside one another."""
PLAIN = (str, int, float, bool, type(None))
SURROGATE = re.compile("[\ud800-\udfff]")
UNSHOWN = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069]")
"""Control characters, ends of lines, and marks that turn the direction of a text."""
BOM = b"\xef\xbb\xbf"
RESTORE = "restore the file, or give another"
NAMES = {
    dict: "an object",
    list: "a list",
    str: "a text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
}


def printable(text: str) -> str:
    """`text`, with a question mark for all that moves a cursor, colours or turns a terminal; lines stay."""
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in text)


def require_name(name: str, where: str) -> None:
    """ValueError if a name, which lines and pages will show, holds what steers a terminal or turns the text."""
    if UNSHOWN.search(name):
        raise ValueError(f"{where} is {name!a}: it holds control characters; choose a name without")


def one_line(message: object, most: int = 300) -> str:
    """`message` as one printable line of at most `most` characters; the middle of a longer one is left out."""
    text = printable(" ".join(str(message).split()))
    half = (most - 5) // 2
    return text if len(text) <= most else f"{text[:half]} ... {text[-half:]}"


def expand_home(path: Path | str) -> Path:
    """`~` and `~user` as the user's home; where there is no such user, the path as it is, as a shell has it."""
    return Path(os.path.expanduser(path))


# --- reading --------------------------------------------------------------------------------------------------------


def read_bytes(path: Path | str, label: str, most: int = MOST_JSON) -> bytes:
    """The content of a regular file of at most `most` bytes. ValueError: there is none, or it is something else."""
    with open_regular(path, label) as file, _readable(path, label):
        content = file.read(most + 1)
        if content is None:  # some files of the kernel are called regular, and would be waited for
            raise ValueError("gives nothing to read")
    if len(content) > most:
        raise ValueError(f"{label} {path} is larger than {most:,} bytes; {RESTORE}")
    return content


def is_there(path: Path | str) -> bool:
    """Whether a file that may be missing has a name here; a link that leads to nothing is no missing file."""
    return os.path.lexists(path)


def open_regular(path: Path | str, label: str) -> io.BufferedReader:
    """A regular file, opened without waiting for a writer. ValueError: there is none, or it is something else."""
    with _readable(path, label):
        number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        mode = os.fstat(number).st_mode
        if stat.S_ISREG(mode):
            return os.fdopen(number, "rb")
        os.close(number)
        raise ValueError("is a folder, not a file" if stat.S_ISDIR(mode) else "is no regular file")


@contextlib.contextmanager
def _readable(path: Path | str, label: str) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{label} {path} does not exist; {RESTORE}") from None
    except OSError as error:
        raise ValueError(f"{label} {path} cannot be read ({error.strerror}); {RESTORE}") from None
    except ValueError as error:  # also a name with a NUL in it
        raise ValueError(f"{label} {path} {error}; {RESTORE}") from None


def read_text(path: Path | str, label: str, most: int = MOST_JSON) -> str:
    """The text of a file, see `read_bytes`. ValueError also: not UTF-8, or a byte order mark in front."""
    return _decoded(read_bytes(path, label, most), f"{label} {path}")


def _decoded(content: bytes, where: str) -> str:
    if content.startswith(BOM):
        raise ValueError(f"{where} begins with a byte order mark; save it as UTF-8 without one")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not UTF-8 (byte {error.start}); {RESTORE}") from None


def read_json(path: Path | str, label: str, *, most: int = MOST_JSON, loose: bool = False) -> dict[str, Any]:
    """The object of a JSON file. `loose`: whether NaN, infinities and half characters may stand in it."""
    where = f"{label} {path}"
    return unsealed(require_kind(parse_json(read_bytes(path, label, most), where, loose=loose), dict, where), where)


def parse_json(text: str | bytes, where: str, *, loose: bool = False) -> Any:
    """The plain value that a JSON text stands for; `where` names it in errors. `loose`: see `read_json`."""
    text = _decoded(text, where) if isinstance(text, bytes) else text
    with _named(where, "JSON", RecursionError, ValueError):
        return _plain(json.loads(text, object_pairs_hook=_once), loose)


def read_jsonl(
    path: Path | str, label: str, *, loose: bool = False, torn: bool = False
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line numbers and objects of a JSON-lines file; empty lines are passed over.

    torn: whether a last line without its end is left out too, since its writer was killed.
    """
    with open_regular(path, label) as file:
        done = 0
        for number in itertools.count(1):
            with _readable(path, label):
                line = file.readline(MOST_LINE + 1)
            where, done = f"{label} {path}:{number}", done + len(line)
            if len(line) > MOST_LINE or done > MOST_LINES:
                raise ValueError(f"{where} makes the file too large; {RESTORE}")
            if not line or (torn and not line.endswith(b"\n")):
                return
            if line.strip():
                yield number, unsealed(require_kind(parse_json(line, where, loose=loose), dict, where), where)


def read_csv(path: Path | str, label: str, columns: Sequence[str]) -> list[dict[str, str]]:
    """The rows of a CSV file with a header, which must name the `columns`; every row has a cell for each name."""
    text = read_text(path, label, MOST_SETTINGS)
    with _named(f"{label} {path}", "CSV", csv.Error, ValueError):
        lines = csv.reader(io.StringIO(text, newline=""), strict=True)
        header = next(lines, [])
        missing = [name for name in columns if name not in header]
        if missing or len(set(header)) < len(header):
            raise ValueError(f"its first line must name {', '.join(columns)}, each column once")
        rows = [cells for cells in lines if cells]
        for number, cells in enumerate(rows, 2):
            if len(cells) != len(header):
                raise ValueError(f"row {number} has {len(cells)} cells, the header {len(header)}")
        return [dict(zip(header, cells, strict=True)) for cells in rows]


def read_toml(path: Path | str, label: str) -> dict[str, Any]:
    """The table of a TOML file."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib  # pyright: ignore[reportMissingImports]

    text = read_text(path, label, MOST_SETTINGS)
    with _named(f"{label} {path}", "TOML", RecursionError, ValueError):
        parts = re.split(r"[=,\[\]{}#]", "".join(text.split(" ")).replace("\t", "").replace("\n", "#"))
        if any(part.count(".") > DEPTH for part in parts):  # the parser takes quadratic time for such a key
            raise ValueError(f"a key of more than {DEPTH} parts")
        return _plain(tomllib.loads(text), loose=False)


def read_yaml(path: Path | str, label: str) -> dict[str, Any]:
    """The mapping of a YAML file that holds plain values alone: no aliases, no tags, one document."""
    return parse_yaml(read_text(path, label, MOST_SETTINGS), f"{label} {path}")


def parse_yaml(text: str, where: str) -> dict[str, Any]:
    """The mapping that a YAML text holds, within the same bounds."""
    import yaml

    with _named(where, "YAML", yaml.YAMLError, RecursionError, ValueError, OverflowError, TypeError):
        if len(text) > MOST_SETTINGS:
            raise ValueError(f"more than {MOST_SETTINGS:,} characters")
        data = _plain(yaml.load(text, Loader=_yaml_loader()), loose=False)
    return require_kind(data, dict, where)


def _yaml_loader() -> Any:
    """PyYAML's safe loader without what makes a small file large or slow."""
    import yaml

    class BoundedLoader(yaml.SafeLoader):
        depth = 0

        def fetch_flow_collection_start(self, TokenClass: Any) -> None:
            _require_depth(self.flow_level)
            super().fetch_flow_collection_start(TokenClass)

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise ValueError("an alias (*name): write the value out")
            self.depth += 1
            _require_depth(self.depth)
            node = super().compose_node(parent, index)
            self.depth -= 1
            return node

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            return _once([(self.construct_object(k, True), self.construct_object(v, True)) for k, v in node.value])

    return BoundedLoader


# --- what may be in them --------------------------------------------------------------------------------------------


def require_kind(value: Any, kind: type, where: str) -> Any:
    """`value`, if it is of the `kind`; a whole number is a number too, a truth value is none."""
    kinds = (int, float) if kind is float else (kind,)
    if type(value) not in kinds:
        raise ValueError(f"{where} is {one_line(repr(value), 60)}; it must be {NAMES[kind]}")
    return value


def require_fields(data: Mapping[str, Any], kinds: Mapping[str, type], where: str) -> None:
    """ValueError naming the field, unless every field of `kinds` is in `data` and of its kind."""
    for name, kind in kinds.items():
        if name not in data:
            raise ValueError(f"{where} lacks {name!r}; {RESTORE}")
        require_kind(data[name], kind, f"{where}: {name}")


def _once(pairs: Sequence[tuple[Any, Any]]) -> dict[Any, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"{one_line(repr(twice), 60)} stands twice in one object")
    return made


def _plain(data: Any, loose: bool) -> Any:
    """`data`, once every level of it has been looked at; no recursion, so no depth is too much for it."""
    level, depth = [data], 0
    while level:
        below: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                below += [*value, *value.values()]
                if not all(isinstance(key, str) for key in value):
                    raise ValueError("a key that is no text")
            elif isinstance(value, list):
                below += value
            else:
                _require_plain(value, loose)
        level, depth = below, depth + 1
        _require_depth(depth if below else 0)
    return data


def _require_plain(value: Any, loose: bool) -> None:
    if not isinstance(value, PLAIN):
        raise ValueError(f"a {type(value).__name__}: only texts, numbers, true, false and null are read")
    if isinstance(value, float) and not loose and not math.isfinite(value):
        raise ValueError(f"{value}, which is no number")
    if isinstance(value, int) and value.bit_length() > 128:  # 10^30 is what tokenizers call unlimited
        raise ValueError("a whole number of more than 128 bits")
    if isinstance(value, str) and not loose and SURROGATE.search(value):
        raise ValueError("half a character (a lone surrogate)")


def _require_depth(depth: int) -> None:
    if depth > DEPTH:
        raise ValueError(f"more than {DEPTH} levels inside one another")


@contextlib.contextmanager
def _named(where: str, form: str, *errors: type[Exception]) -> Iterator[None]:
    try:
        yield
    except errors as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else one_line(error, 160)
        raise ValueError(f"{where} is not valid {form} ({reason}); {RESTORE}") from None


# --- writing --------------------------------------------------------------------------------------------------------


def to_json(data: Any, indent: int | None = None) -> str:
    """`data` as JSON; what is no finite number is written as null, since JSON has no NaN."""
    text = json.dumps(_finite(data), indent=indent, allow_nan=False, ensure_ascii=False)
    return text.encode("utf-8", "backslashreplace").decode()  # half characters, of file names, have no UTF-8 form


def _finite(data: Any) -> Any:
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, Mapping):
        return {key: _finite(value) for key, value in data.items()}
    return [_finite(value) for value in data] if isinstance(data, (list, tuple)) else data


def sealed(data: Mapping[str, Any]) -> dict[str, Any]:
    """The object as JSON holds it, with its seal (`seals.py`)."""
    content = {key: value for key, value in json.loads(to_json(data)).items() if key != SEAL}
    return content | {SEAL: seal_of(content)}


def write_json(path: Path, data: Any) -> None:
    """Write JSON (see `to_json`) as `write_text` does."""
    write_text(path, to_json(data, indent=2) + "\n")


def write_sealed(path: Path, data: Mapping[str, Any]) -> None:
    """Write an object with its seal as `write_text` does: for what lrt alone reads, and figures above all."""
    write_json(path, sealed(data))


def write_text(path: Path, text: str) -> None:
    """Write a text aside, sync it, and put it in place at once: a reader finds the old file or the new one."""
    write_whole(path, lambda aside: aside.write_text(text, encoding="utf-8"))


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Have `write` make a file aside, sync it, and put it in place at once; two writers do not meet aside.

    OSError: it cannot be written; then nothing of it stays. What a killed writer left goes with a later one's write.
    """
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    _remove_left(path)
    try:
        write(aside)
        sync(aside)
        os.replace(aside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise


def _remove_left(path: Path) -> None:
    """Delete what writers of this file have left aside, where nobody has written for a day."""
    aside = re.compile(re.escape(path.name) + r"\.[0-9]+\.tmp")
    with contextlib.suppress(OSError):
        for other in path.parent.iterdir():
            if aside.fullmatch(other.name) and time.time() - other.lstat().st_mtime > DAY:
                other.unlink()


def sync(path: Path) -> None:
    """Make what was written to a file survive a power cut."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def write_jsonl(path: Path, rows: Iterable[Any]) -> None:
    """Write one JSON value a line, as `write_text` does."""
    write_text(path, "".join(to_json(row) + "\n" for row in rows))
