"""Faults provoked: what a training loses (nothing but the steps since its last checkpoint), and what it says."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import CODE, PowerCut, events, power_cut, tiny
from test_distributed import PATIENCE

from lrt.config.recipes import cpu_demo
from lrt.config.run import RunConfig
from lrt.data.shards import open_split
from lrt.training import checkpoint
from lrt.training import session as training
from lrt.training.checkpoint import META, MODEL, OPTIMIZER
from lrt.training.logging import Jsonl
from lrt.training.run_lock import RunLock
from lrt.training.session import Session
from lrt.training.trainer import prepare_data, resolve, train

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A text with its shards, and a whole training of twelve steps with a checkpoint after each third."""
    home = tmp_path_factory.mktemp("faults")
    (home / "text.py").write_text(CODE, encoding="utf-8")
    recorded(small(home), home / "whole")
    return home


def small(home: Path, **changes) -> RunConfig:
    return tiny(cpu_demo(), home / "text.py", steps=12, **{"save_every": 3, "log_every": 1} | changes)


def recorded(config: RunConfig, run: Path, sinks=(), **options) -> list[dict]:
    train(config, run, sinks=[Jsonl(run / "metrics.jsonl"), *sinks], **options)
    return events(run, "train")


def losses(run: Path) -> list[tuple[int, float]]:
    return [(e["step"], e["loss"]) for e in events(run, "train")]


def require_equal(run: Path, whole: Path) -> None:
    """The same losses and the same final weights and optimizer, to the last bit; nothing left half-written."""
    assert losses(run) == losses(whole)
    a, b = (checkpoint.open_checkpoint(r) for r in (run, whole))
    for mine, theirs in ((a.weights(), b.weights()), (a.optimizer_state(), b.optimizer_state())):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(x, theirs[name]) for name, x in mine.items())
    assert not [p for p in run.rglob("*") if p.suffix in (".tmp", ".partial")]
    for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        json.loads(line)


# Checkpoints: killed while writing, damaged, a full disk, a background write.


@pytest.mark.parametrize("moment", ["half a model", "before the description", "before the rename", "after the rename"])
def test_killed_while_a_checkpoint_is_written(moment: str, home: Path, tmp_path: Path, monkeypatch):
    """At step 6: the checkpoint of step 3 (or the new one) is whole, and the run goes on to the same end."""
    real = {name: getattr(checkpoint, name) for name in ("write_tensors", "write_json", "_sync_folder")}

    def killer(name: str, when):
        def call(*args):
            step = [a for a in args if "step_00000006" in str(a)]
            if step and when(args):
                if name == "write_tensors":
                    real[name](*args)
                    os.truncate(args[1], args[1].stat().st_size // 2)
                raise PowerCut
            return real[name](*args)

        return call

    if moment == "half a model":
        monkeypatch.setattr(checkpoint, "write_tensors", killer("write_tensors", lambda a: a[1].name == MODEL))
    elif moment == "before the description":
        monkeypatch.setattr(checkpoint, "write_json", killer("write_json", lambda a: a[0].name == META))
    else:
        replaced = os.replace

        def rename(a, b):
            if Path(b).name == "step_00000006" and moment == "before the rename":
                raise PowerCut
            replaced(a, b)
            if Path(b).name == "step_00000006":
                raise PowerCut

        monkeypatch.setattr(os, "replace", rename)
    with pytest.raises(PowerCut):
        recorded(small(home), tmp_path / "run")
    monkeypatch.undo()
    assert checkpoint.newest_valid(tmp_path / "run")[0].step == (6 if moment == "after the rename" else 3)
    recorded(small(home), tmp_path / "run", resume=True)
    require_equal(tmp_path / "run", home / "whole")


@pytest.mark.parametrize(("name", "flip"), [(MODEL, True), (OPTIMIZER, False), (META, False)])
def test_a_damaged_checkpoint_is_passed_over_aloud(name: str, flip: bool, home: Path, tmp_path: Path):
    """One bit flipped, or the end cut off: the one before it is used, and a warning names the file."""
    run, said = tmp_path / "run", []
    recorded(small(home, keep=3), run)
    for folder in checkpoint.checkpoints(run)[-1:]:
        raw = bytearray((folder / name).read_bytes())
        raw[len(raw) // 2] ^= 1
        (folder / name).write_bytes(raw if flip else raw[:-7])
    recorded(small(home, keep=3), run, resume=True, sinks=[said.append])
    warning = next(e["text"] for e in said if e["kind"] == "warning")
    assert name in warning and "using an earlier one" in warning
    assert next(e["step"] for e in said if e["kind"] == "start") == 9
    require_equal(run, home / "whole")


def test_a_full_disk(home: Path, tmp_path: Path):
    """The system refuses to write more than 100 kB a file: one line, exit code 2, and the old checkpoint stays."""
    run = tmp_path / "run"

    with pytest.raises(PowerCut):
        recorded(small(home), run, sinks=[power_cut(4)])
    limited = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); "
    limited += "from lrt.cli.main import main; sys.exit(main(sys.argv[1:]))"
    ended = command("-c", limited, "train", "--resume", str(run))
    assert ended.returncode == 2
    last = ended.stderr.strip().splitlines()[-1]
    assert "step_00000006 could not be written" in last and "free space" in last and "Traceback" not in ended.stderr
    assert checkpoint.newest_valid(run)[0].step == 3
    assert not list(run.rglob("*.tmp"))
    recorded(small(home), run, resume=True)
    require_equal(run, home / "whole")


def command(*args: str, timeout: float = PATIENCE, **variables: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | variables
    return subprocess.run([sys.executable, *args], env=environment, capture_output=True, text=True, timeout=timeout)


def test_the_best_checkpoint_is_kept_beside_the_newest(home: Path, tmp_path: Path):
    run = small(home)
    model = training.LRT(run.model)
    for step, score in [(1, 3.0), (2, 1.5), (3, None), (4, 2.0), (5, 1.9), (6, math.nan)]:
        bpb = None if score is None else {"decoded": score}
        checkpoint.save(tmp_path, step, run, model, {}, extra={"bpb": bpb}, keep=2)
    assert [int(p.name[-3:]) for p in checkpoint.checkpoints(tmp_path)] == [2, 5, 6]


# Data.


@pytest.mark.parametrize("how", ["altered", "truncated", "missing"])
def test_damaged_shards_are_refused_before_training(how: str, home: Path, tmp_path: Path):
    """One changed id in a file of the right size is found, too: the first process compares checksums at the start."""
    config = small(home)
    config = replace(config, data=replace(config.data, folder=str(tmp_path / "data")))
    folder = prepare_data(config.data).folder
    file = folder / "train_00000.bin"
    raw = bytearray(file.read_bytes())
    raw[1000] ^= 1
    file.write_bytes(raw if how == "altered" else raw[:-2])
    if how == "missing":
        file.unlink()
    with pytest.raises(ValueError, match=r"train_00000\.bin.*prepare the data again"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    if how == "altered":
        open_split(folder, "train", "size")  # which size alone would not have found


# Numbers that are not finite.


def session(home: Path, tmp_path: Path, sinks=(), **changes) -> Session:
    config = small(home, **changes)
    prepared = prepare_data(config.data)
    return Session(resolve(config, prepared), RunLock(tmp_path / "run"), prepared, sinks, None)


def test_a_step_that_is_not_finite_is_skipped_and_counted(home: Path, tmp_path: Path):
    """Gradients overflow in step 3 alone: weights and momenta stay as they were, and the run goes on."""
    said: list[dict] = []
    s = session(home, tmp_path, [said.append])
    real, calls = s.parallel.collect, []

    def overflow() -> None:
        real()
        calls.append(1)
        if len(calls) == 3:
            s.model.head.weight.grad.mul_(math.inf)

    s.parallel.collect = overflow
    before: list = []
    step = s.step

    def watch(batch):
        state = {name: x.clone() for name, x in (s.model.state_dict() | s.optimizer.state()).items()}
        found = step(batch)
        before.append(all(torch.equal(x, state.get(name, x)) for name, x in s.model.state_dict().items()))
        if len(before) == 3:
            assert all(torch.equal(x, state[name]) for name, x in s.optimizer.state().items())
        return found

    s.step = watch
    s.loop()
    assert before == [i == 2 for i in range(12)]
    warnings = [e["text"] for e in said if e["kind"] == "warning" and "skipped" in e["text"]]
    assert len(warnings) == 1 and "1 steps up to 3 skipped" in warnings[0]
    logged = [e for e in said if e["kind"] == "train"]
    assert logged[-1]["skipped"] == 1 and math.isnan(logged[2]["loss"]) and math.isfinite(logged[3]["loss"])
    assert checkpoint.open_checkpoint(tmp_path / "run").extra["progress"]["skipped"] == 1


@pytest.mark.parametrize("where", ["block", "head"])
def test_many_such_steps_in_a_row_stop_with_a_diagnosis(where: str, home: Path, tmp_path: Path):
    """After a checkpoint at step 3: the message says what is not finite, how many steps, and what to go back to."""
    s = session(home, tmp_path, max_skipped=4)

    def poison(event: dict) -> None:
        if event["kind"] == "checkpoint":
            with torch.no_grad():
                target = s.model.blocks[0].mlp.up.weight if where == "block" else s.model.head.weight
                target.view(-1)[0] = math.nan if where == "block" else math.inf

    s.sinks = [poison]
    with pytest.raises(ValueError) as error:
        s.loop()
    message = str(error.value)
    bad = "weights blocks.0.mlp.up.weight; losses of passes 0" if where == "block" else "weights head.weight; gradients"
    assert re.search(r"4 steps in a row up to step 7 .*not finite when computed again", message) and bad in message
    assert "step_00000003" in message and "matrix_lr" in message and "\n" not in message
    assert checkpoint.newest_valid(tmp_path / "run")[0].step == 3


# Memory, signals, requeued jobs.


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), MemoryError()])
def test_out_of_memory_names_the_knobs(error, home: Path, tmp_path: Path, monkeypatch):
    def full(*_) -> None:
        raise error

    monkeypatch.setattr(Session, "gradients", full)
    with pytest.raises(ValueError, match="out of memory") as raised:
        train(small(home), tmp_path / "run")
    for knob in ("micro_batch", "recompute", "settled-1..3", "smaller S", "fsdp"):
        assert knob in str(raised.value)


@pytest.mark.slow
def test_out_of_memory_for_real(home: Path, tmp_path: Path):
    """The allocator refuses: a step over so many rows wants more than the address space has."""
    big = ["--train.batch", "60000", "--train.length", "64", "--train.horizon", "steps=1", "--train.log-every", "1"]
    shape = ["--model.depth", "2", "--model.width", "512", "--model.context", "64", "--data.tokenizer", "bytes"]
    data = ["--data.source", str(home / "text.py"), "--data.folder", str(home / "data"), "--train.eval-rows", "2"]
    limited = "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30)); "
    limited += "from lrt.cli.main import main; sys.exit(main(sys.argv[1:]))"
    ended = command("-c", limited, "train", *shape, *big, *data, "--out", str(tmp_path / "run"), timeout=PATIENCE)
    assert ended.returncode == 2, ended.stderr[-2000:]
    assert "out of memory; set train.recompute" in ended.stderr.strip().splitlines()[-1]


def test_or_resume_begins_goes_on_and_refuses_other_settings(home: Path, tmp_path: Path):
    """What a requeued job runs: the same command again and again."""
    run = tmp_path / "run"

    with pytest.raises(PowerCut):
        recorded(small(home), run, sinks=[power_cut(8)], resume=None)
    with pytest.raises(ValueError, match=r"--train\.schedule is parallel.*trained with settled-1\.\.3"):
        recorded(small(home, schedule="parallel"), run, resume=None)
    recorded(small(home), run, resume=None)
    require_equal(run, home / "whole")


def test_or_resume_does_not_begin_anew_over_damaged_checkpoints(home: Path, tmp_path: Path):
    recorded(small(home), tmp_path / "run")
    for folder in checkpoint.checkpoints(tmp_path / "run"):
        (folder / MODEL).write_bytes(b"")
    with pytest.raises(ValueError, match="no valid checkpoint.*checksum"):
        recorded(small(home), tmp_path / "run", resume=None)


def test_every_fault_in_the_docs_names_a_test_that_exists():
    page = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(test_\w+)`", page))
    there = {
        name
        for p in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", p.read_text(), re.M)
    }
    assert len(named) >= 20
    assert named <= there, sorted(named - there)


def test_checkpoints_are_also_written_by_time(home: Path, tmp_path: Path):
    run, said = tmp_path / "run", []
    recorded(small(home, save_every=0, save_minutes=1e-9, keep=20), run, sinks=[said.append])
    assert [e["step"] for e in said if e["kind"] == "checkpoint"] == list(range(1, 13))
    assert RunConfig().train.save_minutes > 0
    with pytest.raises(ValueError, match="save_minutes"):
        small(home, save_minutes=-1.0)


def test_a_clock_that_stands_still_or_goes_back(home: Path, tmp_path: Path, monkeypatch):
    """A suspended machine: no step took any time, or less than none."""
    clock = iter(range(10_000, 0, -1))
    for name in ("perf_counter", "process_time"):
        monkeypatch.setattr(training.time, name, lambda: float(next(clock)))
    recorded(small(home, save_minutes=0.0), tmp_path / "run")
    assert losses(tmp_path / "run") == losses(home / "whole")
