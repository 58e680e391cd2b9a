"""Checkpoints that are written while the training goes on: the same, whole, and their faults told."""

from __future__ import annotations

import signal
import threading
from pathlib import Path

import pytest
import torch
from test_faults import home, recorded, require_equal, session, small

from lrt.training import checkpoint
from lrt.training import session as training
from lrt.training.checkpoint import Writer
from lrt.training.run_lock import RunLock

__all__ = ["home"]  # a fixture


def test_checkpoints_written_in_the_background_are_the_same(home: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(training, "Writer", lambda _: Writer(background=True))
    recorded(small(home), tmp_path / "run")
    require_equal(tmp_path / "run", home / "whole")
    assert [p.name for p in checkpoint.checkpoints(tmp_path / "run")] == ["step_00000009", "step_00000012"]


def test_a_failed_background_write_is_raised_at_the_next():
    done, writer = [], Writer(background=True)

    def fail() -> None:
        raise OSError("disk full")

    writer.submit(fail)
    with pytest.raises(OSError, match="disk full"):
        writer.submit(lambda: done.append(1))
    writer.submit(lambda: done.append(2))
    writer.wait()
    writer.wait()
    assert done == [2]


def failing(home: Path, run: Path, monkeypatch, write) -> list[str]:
    """A training whose fifth step fails while the checkpoint of the third is written by `write`; its warnings."""
    begun, failed, warnings, save = threading.Event(), threading.Event(), list[str](), checkpoint.save

    def slow(*args, **options) -> Path:
        begun.set()
        assert failed.wait(240)
        return write(lambda: save(*args, **options))

    def fail(event: dict) -> None:
        if event["kind"] == "train" and event["step"] == 5:
            assert begun.wait(240)
            failed.set()
            raise RuntimeError("a fault of our own")
        if event["kind"] == "warning":
            warnings.append(event["text"])

    monkeypatch.setattr(training, "Writer", lambda _: Writer(background=True))
    monkeypatch.setattr(checkpoint, "save", slow)
    with pytest.raises(RuntimeError, match="a fault of our own"):
        recorded(small(home), run, sinks=[fail])
    assert not [t.name for t in threading.enumerate() if t.name.startswith("lrt-prefetch")]
    return warnings


def test_a_training_that_fails_waits_for_the_checkpoint_that_is_being_written(home: Path, tmp_path: Path, monkeypatch):
    """Its folder is given back after that, and nothing of it reads or writes any more."""
    order, release = [], RunLock.release
    monkeypatch.setattr(RunLock, "release", lambda lock: (order.append("released"), release(lock)))

    def write(save) -> Path:
        folder = save()
        order.append("written")
        return folder

    assert failing(home, tmp_path / "run", monkeypatch, write) == []
    assert order == ["written", "released"] and checkpoint.newest_valid(tmp_path / "run")[0].step == 3


def test_a_checkpoint_that_was_not_written_is_told_though_something_else_failed_too(
    home: Path, tmp_path: Path, monkeypatch
):
    def write(_) -> Path:
        raise OSError("disk full")

    assert failing(home, tmp_path / "run", monkeypatch, write) == ["a checkpoint was not written: disk full"]


def test_a_stopped_training_says_how_to_go_on_only_once_its_checkpoint_is_written(
    home: Path, tmp_path: Path, monkeypatch
):
    said: list[dict] = []

    def write(*_, **__) -> Path:
        raise OSError("disk full")

    def stop(event: dict) -> None:
        said.append(event)
        if event["kind"] == "train" and event["step"] == 2:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(training, "Writer", lambda _: Writer(background=True))
    monkeypatch.setattr(checkpoint, "save", write)
    with pytest.raises(OSError, match="disk full"):
        recorded(small(home), tmp_path / "run", sinks=[stop])
    assert not [e for e in said if e["kind"] == "warning" and "stopped" in e["text"]]


def test_the_checkpoint_to_go_back_to_may_still_be_being_written(home: Path, tmp_path: Path, monkeypatch):
    """Weights are spoilt after step 4, while the checkpoint of step 3 waits until the diagnosis is made."""
    diagnosed, save, diagnose = threading.Event(), checkpoint.save, training.not_finite

    def slow(*args, **options) -> Path:
        assert diagnosed.wait(240)
        return save(*args, **options)

    def told(*args) -> str:
        diagnosed.set()
        return diagnose(*args)

    def poison(event: dict) -> None:
        if event["kind"] == "train" and event["step"] == 4:
            with torch.no_grad():
                s.model.blocks[0].mlp.up.weight.fill_(torch.nan)

    monkeypatch.setattr(training, "Writer", lambda _: Writer(background=True))
    monkeypatch.setattr(training, "not_finite", told)
    monkeypatch.setattr(checkpoint, "save", slow)
    s = session(home, tmp_path, [poison], max_skipped=2)
    with pytest.raises(ValueError, match=r"up to step 6 .*the last good checkpoint is .*step_00000003:"):
        s.loop()
