"""Schedules drawn: the text, and the picture that holds the same marks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lrt.cli.main import main
from lrt.experiments import draw
from lrt.schedule import Schedule

TEXT = """\
interleaved-2:weights=0/1 over 5 positions: 3 passes, 2.00 token forwards, 2.00 effective at most, exact prefix 2

pass  positions  0
                 01234
   0  0:5        ▓▓▓▓▓
   1  0:5:2      █·█·█
   2  1:4:2      ·█·█·
exact            ^^

█ gradient and loss  ▓ gradient, no loss"""


def test_the_text_is_what_it_was():
    assert draw.as_text(Schedule.parse("interleaved-2:weights=0/1"), 5) == TEXT


def test_text_needs_no_matplotlib():
    code = (
        "import sys; sys.modules['matplotlib'] = None; from lrt.cli.main import main; main(['schedule', 'settled-2'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "░░░░" in done.stdout, done.stderr


@pytest.mark.parametrize("name", ["parallel", "interleaved-3", "refinement-2:weights=0/1", "settled-2", "chunked-4"])
def test_picture_and_text_agree(name: str):
    schedule, length = Schedule.parse(name), 9
    (mesh,) = draw.picture(schedule, length).axes[0].collections
    signs = list(draw.COLOURS)
    rows = ["".join(signs[int(i)] for i in row) for row in mesh.get_array()]
    assert rows == ["".join(draw.mark(p, t) for t in range(length)) for p in schedule.passes(length)]
    assert all(row in draw.as_text(schedule, length) for row in rows)


def test_long_schedules_are_cut_and_say_so():
    figure = draw.picture(Schedule.parse("sequential"), 64)
    assert len(figure.axes[0].get_yticks()) == draw.MOST
    assert figure.legends[0].get_title().get_text() == "and 24 more passes"


@pytest.mark.parametrize(("suffix", "begins"), [(".svg", b"<?xml"), (".PNG", b"\x89PNG"), (".pdf", b"%PDF")])
def test_the_command_writes_the_same_file_each_time(suffix: str, begins: bytes, tmp_path: Path, capsys):
    written = []
    for name in ("one", "two"):
        out = tmp_path / f"{name}{suffix}"
        assert main(["schedule", "interleaved-2", "--length", "6", "--out", str(out)]) == 0
        written.append(out.read_bytes())
    assert written[0] == written[1] and written[0].startswith(begins)
    assert "exact prefix 2" in capsys.readouterr().out


def test_a_format_that_cannot_be_written_is_one_line(tmp_path: Path, capsys):
    assert main(["schedule", "parallel", "--out", str(tmp_path / "x.gif")]) == 2
    said = capsys.readouterr()
    assert said.out == "" and len(said.err.splitlines()) == 1 and ".svg, .png, .pdf" in said.err
    assert not list(tmp_path.iterdir())
