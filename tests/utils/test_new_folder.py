"""Folders that appear whole or not at all: killed writers, two writers, and what they leave."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lrt.utils.file_lock import LOCK, FileLock
from lrt.utils.new_folder import folder_aside, new_folder, require_makable


def test_a_killed_writer_leaves_no_half_of_a_folder_and_the_next_one_cleans_up(tmp_path: Path):
    out = tmp_path / "out"
    script = "import os, signal, sys\nfrom pathlib import Path\nfrom lrt.utils.new_folder import new_folder\n"
    script += f"with new_folder(Path({str(out)!r})) as aside:\n    (aside / 'half').write_text('x')\n"
    script += "    os.kill(os.getpid(), signal.SIGKILL)\n"
    done = subprocess.run([sys.executable, "-c", script], check=False, env={**os.environ})
    assert done.returncode == -signal.SIGKILL and not out.exists()
    assert len(list(tmp_path.glob("out.*.partial"))) == 1
    with new_folder(out) as aside:
        (aside / "whole").write_text("x")
    assert [p.name for p in out.iterdir()] == ["whole"] and list(tmp_path.iterdir()) == [out]


def written_while_another_is(out: Path) -> None:
    with new_folder(out) as second:
        (second / "second").write_text("x")
        with new_folder(out) as first:
            (first / "first").write_text("x")
        assert second.is_dir()


def test_of_two_writers_of_one_folder_the_second_is_told_and_neither_mixes(tmp_path: Path):
    out = tmp_path / "out"
    with pytest.raises(OSError, match="out could not be written"):
        written_while_another_is(out)
    assert [p.name for p in out.iterdir()] == ["first"] and list(tmp_path.iterdir()) == [out]


def interrupted(out: Path) -> None:
    with new_folder(out) as aside:
        (aside / "half").write_text("x")
        raise KeyboardInterrupt


def test_what_fails_leaves_nothing_and_what_is_not_put_in_place_goes(tmp_path: Path):
    with pytest.raises(KeyboardInterrupt):
        interrupted(tmp_path / "out")
    with folder_aside(tmp_path / "out") as aside:
        assert aside.is_dir()
    assert not list(tmp_path.iterdir())


def test_a_writer_that_has_made_its_lock_and_not_taken_it_yet_keeps_its_folder(tmp_path: Path):
    begun = tmp_path / "out.0123abcd.partial"
    begun.mkdir()
    (begun / LOCK).touch()
    with new_folder(tmp_path / "other"):
        lock = FileLock(begun / LOCK)
        lock.take()  # nobody else holds it
        lock.release()
    with new_folder(tmp_path / "third"):
        assert not begun.exists()  # it had a holder, who has ended


@pytest.mark.parametrize("mask", [0o777, 0o277, 0o177])
def test_a_umask_that_forbids_the_owner_is_told_before_anything_is_made(mask: int, tmp_path: Path, monkeypatch):
    """An administrator may write all the same."""
    before = os.umask(mask)
    try:
        monkeypatch.setattr(os, "geteuid", lambda: 1000)
        with pytest.raises(ValueError, match=rf"its own owner \(umask {mask:03o}\); set another"):
            require_makable(tmp_path / "run")
        monkeypatch.setattr(os, "geteuid", lambda: 0)
        require_makable(tmp_path / "run")
        assert os.umask(mask) == mask
    finally:
        os.umask(before)
