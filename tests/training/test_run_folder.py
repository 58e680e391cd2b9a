"""The folder of a run: one training at a time in it, and what happens where it is finished, moved or cannot be made."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import PowerCut, events, power_cut
from test_faults import ROOT, home, recorded, require_equal, small

from lrt.training import checkpoint, trainer
from lrt.training.checkpoint import Checkpoint
from lrt.training.logging import Jsonl
from lrt.training.run_lock import RunLock
from lrt.training.trainer import train

__all__ = ["home"]  # the fixture


def test_two_trainings_in_one_folder(home: Path, tmp_path: Path):
    """The second is refused by one line with the pid of the first; what a killed process held is free again."""
    run = tmp_path / "run"
    shutil.copytree(home / "whole", run)
    held = RunLock(run)
    held.take()
    with pytest.raises(ValueError, match=rf"is being trained by process {os.getpid()}; wait for it"):
        recorded(small(home), run, resume=True)
    held.release()
    script = "import time; from pathlib import Path; from lrt.training.run_lock import RunLock; "
    script += f"RunLock(Path({str(run)!r})).take(); print(1, flush=True); time.sleep(600)"
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(ROOT)}
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == b"1\n"
        with pytest.raises(ValueError, match=f"by process {process.pid};"):
            recorded(small(home), run, resume=True)
        process.kill()
    recorded(small(home), run, resume=True)


def test_the_folder_is_held_before_its_checkpoints_are_read(home: Path, tmp_path: Path, monkeypatch):
    """Another training would delete them meanwhile."""
    read, newest = [], checkpoint.newest_valid

    def held(run: Path) -> tuple[Checkpoint | None, list[str]]:
        with pytest.raises(ValueError, match=rf"is being trained by process {os.getpid()};"):
            RunLock(run).take()
        read.append(run)
        return newest(run)

    shutil.copytree(home / "whole", tmp_path / "run")
    monkeypatch.setattr(checkpoint, "newest_valid", held)
    recorded(small(home), tmp_path / "run", resume=True)
    assert read == [tmp_path / "run"]


def test_a_run_that_was_trained_while_the_text_was_read_is_left_alone(home: Path, tmp_path: Path, monkeypatch):
    run, prepare = tmp_path / "run", trainer.prepare_data

    def meanwhile(*args):
        shutil.copytree(home / "whole", run)
        return prepare(*args)

    monkeypatch.setattr(trainer, "prepare_data", meanwhile)
    with pytest.raises(ValueError, match="run was trained meanwhile by another process; continue it with --resume"):
        train(small(home), run)
    require_equal(run, home / "whole")


def test_a_run_that_began_from_anothers_weights_goes_on_without_them(home: Path, tmp_path: Path):
    other, run = tmp_path / "other", tmp_path / "run"
    shutil.copytree(home / "whole", other)
    base = checkpoint.open_checkpoint(other).config
    begun = replace(base, train=replace(base.train, init_from=str(other)))
    with pytest.raises(PowerCut):
        recorded(begun, run, sinks=[power_cut(4)])
    shutil.rmtree(other)
    assert [e["step"] for e in recorded(begun, run, resume=True)][-1] == 12


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/null", path)])
def test_a_lock_that_is_no_regular_file_is_named(make, tmp_path: Path):
    make(tmp_path / ".lock")
    with pytest.raises(OSError, match=re.escape(str(tmp_path / ".lock"))):
        RunLock(tmp_path).take()


def test_resuming_a_finished_run_adds_no_lines(home: Path, tmp_path: Path):
    run = tmp_path / "run"
    shutil.copytree(home / "whole", run)
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name != ".lock"}
    recorded(small(home), run, resume=True)
    assert before == {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name != ".lock"}
    assert len(events(run, "eval")) == 1


def test_or_resume_under_another_name_is_refused(home: Path, tmp_path: Path):
    shutil.copytree(home / "whole", tmp_path / "run")
    with pytest.raises(ValueError, match="--name is other, but .* is of the run cpu_demo"):
        recorded(replace(small(home), name="other"), tmp_path / "run", resume=None)


@pytest.mark.parametrize("how", ["moved", "removed", "replaced"])
def test_a_run_that_is_moved_while_it_trains_is_not_written_in_two(how: str, home: Path, tmp_path: Path):
    """Folders would be made anew where it was, without its tokenizer and earlier checkpoints."""
    out, config, kinds = tmp_path / "run", small(home), []

    def move(event: dict) -> None:
        kinds.append(event["kind"])
        if event["kind"] == "checkpoint" and event["step"] == 6:
            if how == "removed":
                shutil.rmtree(out)
                return
            out.rename(tmp_path / "elsewhere")
            if how == "replaced":
                shutil.copytree(tmp_path / "elsewhere", out)

    with pytest.raises(ValueError, match="run was moved or removed while it was trained, so nothing more is written"):
        train(config, out, sinks=[Jsonl(out / "metrics.jsonl"), move])
    assert kinds[-1] == "checkpoint" and out.exists() == (how == "replaced")
    if how == "moved":
        train(config, tmp_path / "elsewhere", resume=True, sinks=[Jsonl(tmp_path / "elsewhere" / "metrics.jsonl")])
        require_equal(tmp_path / "elsewhere", home / "whole")


def test_an_out_that_cannot_be_made_is_told_before_any_text_is_read(home: Path, tmp_path: Path, monkeypatch):
    (tmp_path / "file").write_text("x")
    (tmp_path / "lost").symlink_to(tmp_path / "nowhere")
    data = replace(small(home).data, folder=str(tmp_path / "data"))
    for out in (tmp_path / "file" / "run", tmp_path / "lost" / "run"):
        with pytest.raises(ValueError, match="is no folder, so .*run cannot be made; remove it, or choose another"):
            train(replace(small(home), data=data), out)
    monkeypatch.setattr(os, "access", lambda *_: False)  # as on a disk that is read alone; root may write elsewhere
    with pytest.raises(ValueError, match=r"run cannot be written into \(.* forbids it\); choose another"):
        train(replace(small(home), data=data), tmp_path / "run")
    assert not (tmp_path / "data").exists()
