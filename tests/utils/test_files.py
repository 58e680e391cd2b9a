"""Files of others: plain values come out, or one line that names the file; and files are written whole."""

from __future__ import annotations

import json
import math
import os
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lrt.utils import files
from lrt.utils.files import (
    is_there,
    one_line,
    parse_json,
    read_csv,
    read_json,
    read_jsonl,
    read_text,
    read_toml,
    read_yaml,
    require_fields,
    to_json,
    write_json,
    write_text,
)

READERS = {
    "json": lambda path: read_json(path, "settings"),
    "jsonl": lambda path: list(read_jsonl(path, "settings")),
    "yaml": lambda path: read_yaml(path, "settings"),
    "toml": lambda path: read_toml(path, "settings"),
    "csv": lambda path: read_csv(path, "settings", ["name", "value"]),
}
GOOD = {
    "json": ('{"a": [1, 2.5, true, null, {"b": "ü"}]}', {"a": [1, 2.5, True, None, {"b": "ü"}]}),
    "jsonl": ('{"a": 1}\n\n{"a": 2}', [(1, {"a": 1}), (3, {"a": 2})]),
    "yaml": ("a:\n- {b: [1, 2.5], c: 'x: y'}\n- true\n", {"a": [{"b": [1, 2.5], "c": "x: y"}, True]}),
    "toml": ('a.b = [1, 2.5]\n[c]\nd = { e = "x" }\n', {"a": {"b": [1, 2.5]}, "c": {"d": {"e": "x"}}}),
    "csv": (
        'name,value,more\na,1,"x,\ny"\n\nb,2,\n',
        [{"name": "a", "value": "1", "more": "x,\ny"}, {"name": "b", "value": "2", "more": ""}],
    ),
}
DEEP = 100_000
KEY = ".".join(["a"] * DEEP)
BOMB = "a: &a [x]\n" + "".join(f"{c}: &{c} [{', '.join(['*' + chr(ord(c) - 1)] * 9)}]\n" for c in "bcdefghi")
BAD = {
    "json": {
        "nothing": "", "cut off": '{"a": [1, 2', "a list": "[1]", "a number": "3",
        "twice": '{"a": 1, "b": {"c": 1, "c": 2}}', "nan": '{"a": [NaN]}', "infinity": '{"a": -Infinity}',
        "overflow": '{"a": 1e999}', "long number": '{"a": 1' + "0" * 40 + "}", "endless number": '{"a": 1' + "0" * 9000,
        "deep": "[" * DEEP + "]" * DEEP, "deep objects": '{"a":' * DEEP,
        "just too deep": '{"a": ' + "[" * 64 + "1" + "]" * 64 + "}", "half a character": '{"a": "\\ud800"}',
        "half a name": '{"\\udfff": 1}',
    },
    "jsonl": {"a list": '{"a": 1}\n[1]', "cut off": '{"a": 1}\n{"a": ', "nan": '{"a": 1}\n{"a": NaN}'},
    "yaml": {
        "nothing": "", "a list": "- 1", "unclosed": "a: [1, 2", "twice": "a: 1\na: 2", "alias": "a: &x [1]\nb: *x",
        "bomb": BOMB, "code": "a: !!python/object/apply:os.system ['echo hi']", "a date": "a: 2020-01-02",
        "no date": "a: 2020-99-99", "a set": "a: !!set {b, c}", "bytes": "a: !!binary aGk=", "nan": "a: .nan",
        "deep": "a: " + "[" * DEEP, "deep braces": "{" * DEEP, "deep lists": "- " * DEEP, "deep keys": "? " * DEEP,
        "deep blocks": "".join(" " * i + "a:\n" for i in range(400)), "number key": "1: 2", "list key": "[1]: 2",
        "two documents": "a: 1\n---\nb: 2", "tab": "a:\n\t- 1", "merge": "a: {<<: {b: 1}}",
        "large number": "a: " + "9" * 9000, "sexagesimal": "a: " + ":".join(["59"] * 900),
    },
    "toml": {
        "no value": "a =", "twice": "a = 1\na = 2", "nan": "a = nan", "infinity": "a = inf", "a date": "a = 2020-01-02",
        "deep": "a = " + "[" * DEEP, "deep braces": "a = " + "{a = " * DEEP, "deep key": f"{KEY} = 1",
        "spaced key": f"{KEY.replace('.', ' . ')[:200_000]} = 1", "deep table": f"[{KEY}]",
        "deep key inside": f"a = {{{KEY} = 1}}", "long number": "a = " + "9" * 9000,
    },
    "csv": {
        "nothing": "", "another header": "names,values\na,1", "a column twice": "name,name,value\na,b,1",
        "a cell less": "name,value\na", "a cell more": "name,value\na,1,2", "open quote": 'name,value\n"a,1',
        "quote inside": 'name,value\n"a"b,1', "a giant cell": "name,value\na," + "x" * 200_000,
    },
}  # fmt: skip


def told(path: Path, kind: str) -> str:
    """What is said about a file that is refused."""
    with pytest.raises(ValueError) as refused:
        READERS[kind](path)
    said = str(refused.value)
    assert "\n" not in said and said.isprintable()
    assert str(path) in said and ("; " in said)
    assert len(said) < 300 + len(str(path))
    return said


@pytest.mark.parametrize("kind", READERS)
def test_good_files(kind: str, tmp_path: Path):
    text, value = GOOD[kind]
    file = tmp_path / f"settings.{kind}"
    file.write_text(text, encoding="utf-8")
    assert READERS[kind](file) == value


@pytest.mark.timeout(20)
@pytest.mark.parametrize(("kind", "case"), [(kind, case) for kind, cases in BAD.items() for case in cases])
def test_bad_files_end_in_one_line(kind: str, case: str, tmp_path: Path):
    file = tmp_path / f"settings.{kind}"
    file.write_text(BAD[kind][case], encoding="utf-8")
    said = told(file, kind)
    assert kind != "jsonl" or f"{file}:2" in said


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", READERS)
def test_what_is_no_regular_utf8_file_of_a_fitting_size(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert "does not exist" in told(tmp_path / "missing", kind)
    assert "does not exist" in told(tmp_path / "missing" / "deeper", kind)
    assert "is a folder" in told(tmp_path, kind)
    os.mkfifo(tmp_path / "pipe")
    assert "no regular file" in told(tmp_path / "pipe", kind)
    assert "no regular file" in told(Path("/dev/zero"), kind)
    file = tmp_path / "file"
    file.write_bytes(b'{"a": "\xff"}')
    assert "not UTF-8 (byte 7)" in told(file, kind)
    file.write_bytes(b"\xef\xbb\xbf" + GOOD[kind][0].encode())
    assert "byte order mark" in told(file, kind)
    for limit in ("MOST_SETTINGS", "MOST_LINES"):
        monkeypatch.setattr(files, limit, 8)
    with pytest.raises(ValueError, match="larger|too large"):
        read_json(file, "settings", most=8) if kind == "json" else READERS[kind](file)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_file(tmp_path: Path):
    (tmp_path / "file").touch(mode=0)
    assert "Permission denied" in told(tmp_path / "file", "json")


@given(
    content=st.binary(max_size=60) | st.text(alphabet='{}[]":,=.#&*-?!<>|1eE+ \n\t\\ua', max_size=60).map(str.encode)
)
@pytest.mark.parametrize("kind", READERS)
def test_any_bytes_are_a_value_or_a_value_error(kind: str, content: bytes, tmp_path_factory):
    file = tmp_path_factory.getbasetemp() / f"any.{kind}"
    file.write_bytes(content)
    try:
        value = READERS[kind](file)
    except ValueError:
        told(file, kind)
    else:
        json.dumps(value, allow_nan=False)


def test_nan_where_it_is_allowed():
    assert math.isnan(parse_json('{"a": NaN}', "here", loose=True)["a"])
    assert parse_json('{"a": -1e999}', "here", loose=True) == {"a": -math.inf}


def test_a_torn_last_line_is_left_out_where_asked(tmp_path: Path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"a": 1}\n{"a": 2')
    assert list(read_jsonl(file, "metrics", torn=True)) == [(1, {"a": 1})]
    assert "metrics" in told(file, "jsonl").replace("settings", "metrics")


def test_fields_are_there_and_of_their_kind():
    kinds = {"step": int, "rate": float, "name": str, "on": bool, "more": dict, "list": list}
    fine = {"step": 1, "rate": 2, "name": "a", "on": True, "more": {}, "list": []}
    require_fields(fine, kinds, "file")
    for name, wrong in {"step": True, "rate": "1", "name": None, "on": 1, "more": [], "list": {}}.items():
        with pytest.raises(ValueError, match=f"file: {name} is .*; it must be"):
            require_fields(fine | {name: wrong}, kinds, "file")
        with pytest.raises(ValueError, match=f"file lacks '{name}'"):
            require_fields({key: value for key, value in fine.items() if key != name}, kinds, "file")


def test_json_is_written_whole_and_without_nan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "result.json"
    write_json(file, {"a": [1.5, math.nan, (math.inf, "x")]})
    assert json.loads(file.read_text()) == {"a": [1.5, None, [None, "x"]]}
    assert to_json({"a": -math.inf}) == '{"a": null}'
    before = file.read_bytes()

    def full(_: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="disk full"):
        write_json(file, {"b": 1})
    assert file.read_bytes() == before


def test_files_are_written_with_the_modes_that_the_umask_gives(tmp_path: Path):
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "file", "x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640


def test_one_line():
    assert one_line("a\n  b\x1b[31m\tc\u202e") == "a b?[31m c?"
    assert one_line("x" * 9000).startswith("xxx") and len(one_line("x" * 9000)) <= 300
    assert one_line("begin " + "x" * 900 + " end").endswith(" end")


def test_text_is_bounded(tmp_path: Path):
    (tmp_path / "template").write_text("x" * 11)
    assert read_text(tmp_path / "template", "template", most=11) == "x" * 11
    with pytest.raises(ValueError, match="larger than 10 bytes"):
        read_text(tmp_path / "template", "template", most=10)


def test_what_does_not_fit_leaves_nothing_aside_and_two_writers_do_not_meet(tmp_path: Path, monkeypatch):
    file, whole = tmp_path / "file", os.replace
    write_text(file, "old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    def another(aside: Path, path: Path) -> None:
        monkeypatch.setattr(os, "replace", whole)
        monkeypatch.setattr(os, "getpid", lambda: 1)
        write_text(path, "another's")
        assert Path(aside).read_text() == "mine"
        whole(aside, path)

    monkeypatch.setattr(files, "sync", full)
    with pytest.raises(OSError, match="No space"):
        write_text(file, "new")
    assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]
    monkeypatch.undo()
    monkeypatch.setattr(os, "replace", another)
    write_text(file, "mine")
    assert file.read_text() == "mine" and list(tmp_path.iterdir()) == [file]


def test_a_link_that_leads_nowhere_is_no_missing_file(tmp_path: Path):
    assert not is_there(tmp_path / "settings")
    (tmp_path / "settings").symlink_to("nowhere")
    assert is_there(tmp_path / "settings")
    with pytest.raises(ValueError, match="settings .*settings does not exist; restore"):
        read_json(tmp_path / "settings", "settings")


def test_what_killed_writers_left_aside_goes_after_a_day(tmp_path):
    """A writer that is alive writes on, so its file is young; files of other names are nobody's business here."""
    names = ["a.json.123.tmp", "a.json.456.tmp", "a.json.tmp", "b.json.123.tmp", "a.json.x.tmp"]
    for name in names:
        (tmp_path / name).write_text("half")
        os.utime(tmp_path / name, (0, 0))
    os.utime(tmp_path / "a.json.456.tmp")
    write_text(tmp_path / "a.json", "whole")
    assert {p.name for p in tmp_path.iterdir()} == {"a.json", *names[1:]}
