"""`lrt chat`: its commands, and what Ctrl-C, an empty line, a full context and the end of input do."""

from __future__ import annotations

import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import refusal
from serving import make_run

from lrt.cli.chat import ChatSession
from lrt.config.decoding import SamplingParams


class Talk:
    """A conversation that answers `ok` piece by piece, and keeps what it was told."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, SamplingParams]] = []
        self.dropped = 0
        self.interrupt_after = self.fail_after = 99

    def say(self, text: str, sampling: SamplingParams):
        self.heard.append((text, sampling))
        for i, piece in enumerate("okay!"):
            if i == self.interrupt_after:
                os.kill(os.getpid(), signal.SIGINT)
            if i == self.fail_after:
                raise ValueError("no token can be drawn")
            yield piece


@pytest.fixture
def session() -> ChatSession:
    return ChatSession(Talk, "USER: {}\nBOT:", SamplingParams())  # pyright: ignore[reportArgumentType]


def test_lines_are_said_and_empty_ones_are_not(session: ChatSession, capsys):
    for line in ("", "   ", "hello", " /etc is a folder"):
        session.take(line)
    heard = [text for text, _ in session.conversation.heard]
    assert heard == ["USER: hello\nBOT:", "USER: /etc is a folder\nBOT:"]
    assert capsys.readouterr().out == "okay!\nokay!\n"


def test_commands_change_how_text_is_drawn(session: ChatSession, capsys):
    for line in ("/temp 0.3", "/seed 7", "hello"):
        session.take(line)
    _, sampling = session.conversation.heard[0]
    assert (sampling.temperature, sampling.seed) == (0.3, 7)
    session.take("/help")
    assert all(name in capsys.readouterr().err for name in ["/new"])
    before = session.conversation
    session.take("/new")
    assert session.conversation is not before and session.transcript == []


@pytest.mark.parametrize(
    "line", ["/temp", "/temp warm", "/temp -1", "/temp nan", "/seed 1.5", "/seed -3", f"/seed {10**30}", "/save", "/x"]
)
def test_wrong_commands_say_what_is_wrong_and_change_nothing(line: str, session: ChatSession):
    before = session.sampling
    with pytest.raises(ValueError, match=r"/|sampling\."):
        session.take(line)
    assert session.sampling == before and session.conversation.heard == []


def test_saving_writes_a_new_file(session: ChatSession, tmp_path: Path):
    session.take("hello")
    session.take(f"/save {tmp_path / 'talk.txt'}")
    assert (tmp_path / "talk.txt").read_text() == "USER: hello\nBOT:okay!\n"
    with pytest.raises(ValueError, match="exists"):
        session.take(f"/save {tmp_path / 'talk.txt'}")


def test_ctrl_c_stops_the_answer_and_not_the_chat(session: ChatSession, capsys):
    session.conversation.interrupt_after = 2
    handler = signal.getsignal(signal.SIGINT)
    session.take("hello")
    assert capsys.readouterr().out == "oka\n"
    assert signal.getsignal(signal.SIGINT) is handler
    session.conversation.interrupt_after = 99
    session.take("again")
    assert capsys.readouterr().out == "okay!\n"


@pytest.mark.parametrize(("after", "shown", "kept"), [(2, "ok\n", ["USER: hello\nBOT:ok\n"]), (0, "", [])])
def test_an_answer_that_fails_is_kept_as_far_as_it_came(session: ChatSession, after, shown, kept, capsys):
    session.conversation.fail_after = after
    with pytest.raises(ValueError, match="no token"):
        session.take("hello")
    assert (capsys.readouterr().out, session.transcript) == (shown, kept)


def test_forgotten_turns_are_told(session: ChatSession, capsys):
    session.conversation.dropped = 3
    session.take("hello")
    assert capsys.readouterr().err.count("oldest 3 turns are forgotten") == 1


def test_piped_input_is_answered_line_by_line(random_run: Path):
    command = [sys.executable, "-m", "lrt", "chat", str(random_run), "--max-new-tokens", "4", "--template", "{}"]
    done = subprocess.run(command, input="one\n\n/seed 3\ntwo\n", text=True, capture_output=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr and len(done.stdout.splitlines()) >= 2
    wrong = subprocess.run(command, input="/nonsense\n", text=True, capture_output=True)
    assert wrong.returncode == 2 and "there is no /nonsense" in wrong.stderr


def test_a_template_needs_a_place_for_the_text(capsys):
    assert "--template" in refusal(capsys, ["chat", "RUN", "--template", "nothing"])


def test_what_was_changed_is_said(session: ChatSession, capsys):
    for line in ("/temp 0.3", "/seed 7", "/new"):
        session.take(line)
    assert capsys.readouterr().err == "(temperature 0.3)\n(seed 7)\n(a new conversation)\n"


def test_quotes_name_a_file_with_spaces_and_must_be_closed(session: ChatSession, tmp_path: Path):
    session.take(f"/save '{tmp_path}/my talk.txt'")
    assert (tmp_path / "my talk.txt").exists()
    with pytest.raises(ValueError, match="name one file"):
        session.take("/save it's.txt")


@pytest.mark.slow
def test_a_full_context_goes_on_and_says_so(random_run: Path):
    """With a real model whose context holds a few turns."""
    command = [sys.executable, "-m", "lrt", "chat", str(random_run), "--max-new-tokens", "30", "--template", "{}\n"]
    turns = "".join(f"{k} the quick brown fox jumps over the lazy dog\n" for k in range(8))
    done = subprocess.run(command, input=turns, text=True, capture_output=True)
    assert done.returncode == 0 and "turns are forgotten" in done.stderr


class Terminal:
    """A command that runs at a terminal of its own, as if somebody sat there."""

    def __init__(self, *command: str):
        self.master, slave = pty.openpty()
        environment = os.environ | {"TERM": "xterm"}
        self.process = subprocess.Popen(
            ["setsid", "--ctty", *command], stdin=slave, stdout=slave, stderr=slave, env=environment
        )
        os.close(slave)
        self.shown = b""

    def until(self, text: bytes, length: int = 0) -> None:
        """Read until `text` has come since the last time, and at least so many bytes."""
        new, deadline = b"", time.monotonic() + 240
        while text not in new or len(new) < length:
            assert time.monotonic() < deadline, self.shown + new
            if select.select([self.master], [], [], 1)[0]:
                new += os.read(self.master, 4096)
        self.shown += new

    def type(self, keys: bytes) -> None:
        os.write(self.master, keys)


@pytest.fixture
def endless(tmp_path: Path) -> Path:
    """The run of a model whose context is so long that no answer comes to its end here."""
    return make_run(tmp_path / "endless", context=200_000)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("setsid") is None, reason="needs setsid")
def test_at_a_terminal(endless: Path, tmp_path: Path):
    """Editing, history, commands, Ctrl-C within an answer, twice too, and on an empty line; Ctrl-D leaves."""
    flags = ["--template", "{}", "--max-new-tokens", "150000"]
    at = Terminal(sys.executable, "-m", "lrt", "chat", str(endless), *flags)
    at.until(b"> ")
    at.type(b"/nonsenseXY\x7f\x7f\n")  # two letters taken back
    at.until(b"there is no /nonsense;")
    at.type(b"\x1b[A\n")  # the line before, again
    at.until(b"there is no /nonsense;")
    at.type(b"/help\n")
    at.until(b"/save FILE")
    at.type(b"\n   \n/seed 3\n")
    at.until(b"(seed 3)")
    for keys in (b"\x03", b"\x03\x03"):
        at.type(b"hello\n")
        at.until(b"hello", length=300)  # the answer goes on and on
        at.type(keys)
        at.until(b"> ")
        at.type(b"/temp 1\n")
        at.until(b"(temperature 1.0)\r\n> ")
    at.type(b"half a line\x03")
    at.until(b"> ")
    at.type(b"/save " + str(tmp_path / "talk.txt").encode() + b"\n")
    at.until(b"2 turns")
    assert (tmp_path / "talk.txt").read_text(encoding="utf-8").count("hello") == 2
    at.type(b"/new\n")
    at.until(b"(a new conversation)\r\n> ")  # what is typed before the prompt may be dropped
    at.type(b"\x04")
    assert at.process.wait(60) == 0
    os.close(at.master)
    assert b"Traceback" not in at.shown
