"""`lrt chat`: its commands, and what Ctrl-C, an empty line, a full context and the end of input do."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lrt.cli.chat import ChatSession
from lrt.cli.main import main
from lrt.config.decoding import SamplingParams


class Talk:
    """A conversation that answers `ok` piece by piece, and keeps what it was told."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, SamplingParams]] = []
        self.dropped = 0
        self.interrupt_after = 99

    def say(self, text: str, sampling: SamplingParams):
        self.heard.append((text, sampling))
        for i, piece in enumerate("okay!"):
            if i == self.interrupt_after:
                os.kill(os.getpid(), signal.SIGINT)
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


def test_forgotten_turns_are_told(session: ChatSession, capsys):
    session.conversation.dropped = 3
    session.take("hello")
    assert capsys.readouterr().err.count("oldest 3 turns are forgotten") == 1


def test_piped_input_is_answered_line_by_line(random_run: Path):
    command = [sys.executable, "-m", "lrt", "chat", str(random_run), "--max-new-tokens", "4", "--template", "{}"]
    done = subprocess.run(command, input="one\n\n/seed 3\ntwo\n", text=True, capture_output=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr
    wrong = subprocess.run(command, input="/nonsense\n", text=True, capture_output=True)
    assert wrong.returncode == 2 and "there is no /nonsense" in wrong.stderr


def test_a_template_needs_a_place_for_the_text(capsys):
    assert main(["chat", "RUN", "--template", "nothing"]) == 2
    assert "--template" in capsys.readouterr().err


@pytest.mark.slow
def test_a_terminal_keeps_the_chat_through_errors_and_ctrl_c(random_run: Path):
    """Through a pseudo-terminal: a long answer is stopped, a wrong command is told, and Ctrl-D leaves."""
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "lrt", "chat", str(random_run), "--template", "{}"]
    with subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, start_new_session=True) as process:
        os.close(slave)
        shown = b""

        def until(text: bytes) -> None:
            nonlocal shown
            deadline = time.monotonic() + 120
            while text not in shown:
                assert time.monotonic() < deadline, shown
                shown += os.read(master, 4096)

        until(b"> ")
        for typed, expected in ((b"/nonsense\n", b"there is no /nonsense"), (b"/help\n", b"/save FILE")):
            os.write(master, typed)
            until(expected)
        os.write(master, b"hello\n")
        time.sleep(1)
        os.kill(process.pid, signal.SIGINT)
        os.write(master, b"/temp 0\n")
        os.write(master, b"/nonsense2\n")
        until(b"there is no /nonsense2")
        os.write(master, b"\x04")
        assert process.wait(60) == 0
    assert b"Traceback" not in shown
    os.close(master)
