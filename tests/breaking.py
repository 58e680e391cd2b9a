"""Files broken by chance, and commands that must end plainly whatever is in them: one line and an exit code."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from serving import make_run

from lrt.cli.main import main

SEED = os.environ.get("LRT_TEST_SEED", "0")
"""What all chances hang on: LRT_TEST_SEED=7 tries others."""
MOST = 300
"""Characters of a line on standard error."""
VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2, 3, 0.5, -0.0, 1e300, 2**31, 2**63, -(2**64), 10**40, float("nan"), float("inf"),
    "", "x", "x" * 5000, "\x00", "\x1b[31mred", "é", "../../../etc/passwd", "/dev/zero", "\ud800", "1", "bytes", "null",
    [], {}, [[]], [None], [1, 2], ["x"], [0.5] * 3, {"": None}, {"x": {"x": []}},
]  # fmt: skip
"""What stands where something else should."""
RAW = [
    b"", b"\x00", b"\xff\xfe", b"[" * 5000,
    b'{"a":' * 5000, b"x: &a [*a]\n", b"\xed\xa0\x80", b"9" * 5000,
    b"{", b'"', b"\r\n", b"\n\n", b",", b"1e999", b"NaN", b"-", b"\xef\xbb\xbf", b"'"
]  # fmt: skip
"""Bytes that are put into a file, or stand in place of some of it."""

SMALL = (
    "--model.depth 1 --model.width 16 --model.heads 2 --model.context 32 --train.length 16 --train.batch 2 "
    "--train.eval-every 2 --train.eval-rows 2 --train.device cpu --train.threads 1 --train.save-every 2 "
    "--data.source text.txt --data.tokenizer bytes"
)
"""Flags of a training that lasts a moment."""


def leave_inputs(home: Path, sweep: str) -> None:
    """All that commands read: a run, a text, a sweep, and the records of one."""
    make_run(home / "run", context=64)
    (home / "text.txt").write_text("".join(f"line {i} of a text\n" for i in range(4000)))
    (home / "sweep.toml").write_text(sweep)
    line = {"arm": "plain", "grid": {}, "seed": 0, "suite": "core", "parts": {}, "mode": "exact"}
    whole = {"whole": False, "centred": 0.1, "centred_error": 0.1}
    (home / "results.jsonl").write_text(json.dumps(line | {"whole": whole}) + "\n")


def places(data: Any, path: tuple = ()) -> list[tuple]:
    """The path of every value in a JSON document."""
    inner = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [path, *(place for key, value in inner for place in places(value, (*path, key)))]


def broken(original: bytes, chance: random.Random) -> bytes:
    """A file with something wrong: a value, a key or a line of it, or some of its bytes."""
    how = chance.choice(["value", "value", "value", "cut", "bytes", "line", "bit"])
    if how in ("value", "line"):
        changed = _values(original, chance) if how == "value" else _lines(original, chance)
        if changed is not None:
            return changed
    where = chance.randrange(len(original) + 1)
    if how == "cut":
        return original[:where]
    if how == "bit" and original:
        where = min(where, len(original) - 1)
        return original[:where] + bytes([original[where] ^ 1 << chance.randrange(8)]) + original[where + 1 :]
    return original[:where] + chance.choice(RAW) + original[where + chance.randrange(4) :]


def _values(original: bytes, chance: random.Random) -> bytes | None:
    """One or two values of a JSON document, or of a line of JSON lines; None where it is neither."""
    before, part, after = b"", original, b""
    if not _is_json(original):
        lines = original.splitlines(keepends=True) or [b""]
        i = chance.randrange(len(lines))
        before, part, after = b"".join(lines[:i]), lines[i], b"\n" + b"".join(lines[i + 1 :])
        if not _is_json(part):
            return None
    data = json.loads(part)
    for _ in range(chance.randint(1, 2)):
        data = _replaced(data, chance.choice(places(data)), chance)
    return before + json.dumps(data).encode("utf-8", "surrogatepass") + after


def _is_json(content: bytes) -> bool:
    try:
        json.loads(content)
    except ValueError:
        return False
    return True


def _replaced(data: Any, place: tuple, chance: random.Random) -> Any:
    if not place:
        return chance.choice(VALUES)
    copy = dict(data) if isinstance(data, dict) else list(data)
    key, kind = place[0], chance.random()
    if len(place) > 1:
        copy[key] = _replaced(copy[key], place[1:], chance)
    elif kind < 0.2:
        del copy[key]
    elif kind < 0.3 and isinstance(copy, dict):
        copy["x" * chance.choice([1, 4000])] = copy.pop(key)
    else:
        copy[key] = chance.choice(VALUES)
    return copy


def _lines(original: bytes, chance: random.Random) -> bytes:
    """Lines twice, missing, or with words of it replaced: for what is no JSON."""
    lines = original.splitlines(keepends=True) or [b""]
    i = chance.randrange(len(lines))
    words = lines[i].split(b" ")
    words[chance.randrange(len(words))] = str(chance.choice(VALUES)).encode("utf-8", "replace") + b"\n"
    new = chance.choice([[], [lines[i]] * 2, [b" ".join(words)], [b"\t" + lines[i]], [lines[i].replace(b",", b",,")]])
    return b"".join([*lines[:i], *new, *lines[i + 1 :]])


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """AssertionError after so many seconds."""

    def late(*_: object) -> None:
        raise AssertionError(f"it takes more than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def ends_plainly(arguments: list[str], capfd: Any, seconds: int = 120) -> str:
    """Run a command that ends with an exit code of 0 or 2, no traceback and no long line; what it said as errors."""
    code: object = 0
    with at_most(seconds):
        try:
            code = main(arguments)
        except SystemExit as end:
            code = end.code
    errors = capfd.readouterr().err
    assert code in (0, 2), code
    assert "Traceback" not in errors and "panicked" not in errors, errors[-2000:]
    long = [line for line in errors.splitlines() if len(line) > MOST]
    assert not long, long[0]
    assert code == 0 or errors.strip(), "an error without a word"
    assert "\x1b" not in errors
    return errors


def every_time(count: int, one: Callable[[random.Random], None], seed: str = SEED) -> list[str]:
    """The failures of `one` for so many seeds, each with its seed."""
    failures = []
    for i in range(count):
        try:
            one(random.Random(f"{seed} {i}"))
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # whatever it is, it is a traceback
            failures.append(f"seed {i}: {type(error).__name__}: {str(error)[:300]} {_where(error)}")
            print(failures[-1], file=sys.__stdout__, flush=True)
    return failures


def _where(error: BaseException) -> str:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return "" if trace is None else f"({trace.tb_frame.f_code.co_filename}:{trace.tb_lineno})"
