"""Text fitted to a screen."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from lrt.utils.terminal import WordByWord, command_name, fitted, show


def test_long_lines_break_between_words_and_short_ones_stay():
    text = "short\n\n  step 20: decoded 3.05, merged 3.05\n"
    assert fitted(text, 100) == text
    assert fitted(text, 24) == "short\n\n  step 20: decoded 3.05,\n    merged 3.05\n"


def test_a_word_longer_than_the_screen_stays_whole():
    """A path that is broken cannot be copied."""
    path = "/a/very/long/path/to-a-run"
    assert fitted(f"see {path} now", 12) == f"see\n  {path}\n  now"
    assert fitted("a b", 1) == "a\nb"


class Screen(io.StringIO):
    """A terminal of the columns that COLUMNS says."""

    def isatty(self) -> bool:
        return True


def test_only_a_terminal_is_fitted_to(monkeypatch):
    monkeypatch.setenv("COLUMNS", "12")
    pipe, screen = io.StringIO(), Screen()
    show("one two three four", pipe)
    show("one two three four", screen)
    assert pipe.getvalue() == "one two three four\n"
    assert screen.getvalue() == "one two\n  three four\n"


def test_commands_to_copy_begin_as_the_shell_finds_them(tmp_path: Path, monkeypatch):
    script = tmp_path / "bin" / "lrt"
    script.parent.mkdir()
    script.write_text("#!/bin/sh\n")
    script.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("sys.argv", ["bin/lrt", "demo"])
    assert command_name() == "bin/lrt"
    monkeypatch.setattr("sys.argv", ["/somewhere/lrt/__main__.py"])
    assert command_name().startswith("python") and command_name().endswith(" -m lrt")
    monkeypatch.setenv("PATH", str(script.parent))
    assert command_name() == "lrt"


@pytest.mark.parametrize(
    "pieces", [["one two", " th", "ree\n\nfour fi", "ve  six"], list("one two three\n\nfour five  six")]
)
def test_words_that_come_in_pieces_are_not_broken_by_a_terminals_edge(pieces: list[str], monkeypatch):
    monkeypatch.setenv("COLUMNS", "9")
    screen, pipe = Screen(), io.StringIO()
    for stream in (screen, pipe):
        writer = WordByWord(stream)
        for piece in pieces:
            writer.write(piece)
        writer.end()
    assert pipe.getvalue() == "one two three\n\nfour five  six\n"
    assert screen.getvalue() == "one two \nthree\n\nfour five\nsix\n"


def test_a_word_that_is_held_is_shown_whatever_ends_the_text(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    screen = Screen()

    def written() -> None:
        with WordByWord(screen) as writer:
            writer.write("one tw")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        written()
    assert screen.getvalue() == "one tw\n"


def test_a_text_without_spaces_is_shown_as_it_comes(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    screen = Screen()
    writer = WordByWord(screen)
    for _ in range(50):
        writer.write("記憶")
    assert len(screen.getvalue().replace("\n", "")) > 75 and max(map(len, screen.getvalue().split("\n"))) <= 30
    writer.end()
    assert screen.getvalue().replace("\n", "") == "記憶" * 50
