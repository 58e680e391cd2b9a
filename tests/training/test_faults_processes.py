"""Faults provoked in processes of their own: kills, lost processes, restarts, signals. All slow."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from helpers import events
from test_distributed import PATIENCE, launch
from test_faults import ROOT, command, home, losses, require_equal, small

from lrt.training import checkpoint
from lrt.training.run_lock import RunLock

__all__ = ["home"]  # a fixture


def arguments(home: Path, run: Path, steps: int, *more: str) -> list[str]:
    c = small(home)
    return [
        "-m", "lrt", "train", "--or-resume", "--out", str(run), "--data.source", c.data.source,
        "--data.folder", c.data.folder, "--data.tokenizer", "bytes", "--model.depth", "2", "--model.width", "32",
        "--model.kv-heads", "1", "--model.context", "64", "--train.batch", "8", "--train.length", "32",
        "--train.horizon", f"steps={steps}", "--train.eval-every", "0", "--train.eval-rows", "4",
        "--train.log-every", "1", "--train.save-every", "2", "--train.dtype", "float32",
        "--train.schedule", c.train.schedule, *more,
    ]  # fmt: skip


def last_step(run: Path) -> int:
    try:
        lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return max((json.loads(line).get("step", 0) for line in lines if line.endswith("}")), default=0)
    except (OSError, ValueError):
        return 0


@pytest.mark.slow
def test_twenty_random_kills(home: Path, tmp_path: Path):
    """Killed twenty times at random moments, a checkpoint every second step: the same end to the last bit."""
    run, steps, chance, kills = tmp_path / "run", 240, random.Random(0), 0
    assert command(*arguments(home, tmp_path / "whole", steps), timeout=PATIENCE).returncode == 0
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    while kills < 20:
        target = last_step(run) + chance.randint(1, 8)
        with subprocess.Popen(
            [sys.executable, *arguments(home, run, steps)], env=environment, stderr=subprocess.PIPE, text=True
        ) as process:
            began = time.monotonic()
            while last_step(run) < target and process.poll() is None and time.monotonic() - began < PATIENCE:
                time.sleep(0.005)
            time.sleep(chance.random() * 0.06)
            assert process.poll() is None, process.stderr.read()[-2000:]
            process.kill()
        kills += 1
        found, problems = checkpoint.newest_valid(run)
        assert problems == [] and (found is not None or last_step(run) < 4)
    assert command(*arguments(home, run, steps), timeout=PATIENCE).returncode == 0
    require_equal(run, tmp_path / "whole")
    assert len(losses(run)) == steps


@pytest.mark.slow
def test_a_lost_process_ends_the_others_with_one_line(home: Path, tmp_path: Path):
    run = tmp_path / "run"
    first, second = launch(2, *arguments(home, run, 100_000))
    began = time.monotonic()
    while last_step(run) < 3 and time.monotonic() - began < PATIENCE:
        time.sleep(0.05)
    second.kill()
    said = first.communicate(timeout=PATIENCE)[1]
    assert first.returncode == 2
    assert "another process of this run has ended" in said.strip().splitlines()[-1]
    assert "Traceback" not in said
    second.communicate()


@pytest.mark.slow
def test_torchrun_restarts_resume(home: Path, tmp_path: Path):
    """One of two workers kills itself at step 7, the first time: the restarted ones end as if nothing had happened."""
    script = tmp_path / "worker.py"
    script.write_text(
        "import os, signal, sys\n"
        "from lrt.training.session import Session\n"
        "from lrt.cli.main import main\n"
        "real = Session.step\n"
        "def step(self, batch):\n"
        "    fatal = os.environ['TORCHELASTIC_RESTART_COUNT'] == '0' and os.environ['RANK'] == '1'\n"
        "    if fatal and self.progress.step == 7:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return real(self, batch)\n"
        "Session.step = step\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    agent = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    agent += ["--rdzv-endpoint", "127.0.0.1:0"]
    flags = arguments(home, tmp_path / "run", 12, "--train.save-every", "3")[2:]
    own_store = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # see docs/scaling.md
    ended = command(*agent, "--max-restarts", "1", str(script), *flags, timeout=PATIENCE, **own_store)
    assert ended.returncode == 0, ended.stderr[-3000:]
    starts = [e["step"] for e in events(tmp_path / "run", "start")]
    assert starts == [0, 6]
    mine, whole = ([loss for _, loss in losses(r)] for r in (tmp_path / "run", home / "whole"))
    assert mine == pytest.approx(whole, rel=1e-5)


@pytest.mark.slow
def test_workers_that_outlive_torchrun_keep_a_second_start_out(home: Path, tmp_path: Path):
    """torchrun is killed, its workers train on: others are refused with a pid of theirs, until they have ended."""
    run = tmp_path / "run"
    agent = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    agent += ["--rdzv-endpoint", "127.0.0.1:0"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen([sys.executable, *agent, *arguments(home, run, 100_000)], env=environment) as parent:
        began = time.monotonic()
        while last_step(run) < 3 and time.monotonic() - began < PATIENCE:
            time.sleep(0.05)
        workers = psutil.Process(parent.pid).children(recursive=True)
        parent.kill()
    try:
        first = [w for w in workers if w.is_running()]
        assert len(first) == 2
        alone = command(*arguments(home, run, 100_000), timeout=PATIENCE)
        both = launch(2, *arguments(home, run, 100_000))
        said = [p.communicate(timeout=PATIENCE)[1] for p in both]
        before = last_step(run)
        assert [alone.returncode, *(p.returncode for p in both)] == [2, 2, 2]
        for text in (alone.stderr, said[0]):
            (line,) = [x for x in text.splitlines() if "is being trained by process" in x]
            assert any(f"process {w.pid};" in line for w in first)
        assert "Traceback" not in alone.stderr + "".join(said)
        while last_step(run) <= before and time.monotonic() - began < PATIENCE:
            time.sleep(0.05)
        assert last_step(run) > before, "the workers have trained on, undisturbed"
    finally:
        for worker in workers:
            worker.kill()
        psutil.wait_procs(workers, timeout=60)
    RunLock(run).take()  # which raises nothing now
    trained = [e["step"] for e in events(run, "train")]
    assert trained == sorted(set(trained)), "no step was recorded twice"


@pytest.mark.slow
def test_sigterm_saves_and_leaves_with_143(home: Path, tmp_path: Path):
    """Also where one of two processes is asked: both leave after the same step."""
    for processes in (1, 2):
        run = tmp_path / f"run{processes}"
        started = launch(processes, *arguments(home, run, 100_000))
        began = time.monotonic()
        while last_step(run) < 3 and time.monotonic() - began < PATIENCE:
            time.sleep(0.05)
        started[-1].send_signal(signal.SIGTERM)
        said = [p.communicate(timeout=PATIENCE)[1] for p in started]
        assert [p.returncode for p in started] == [143] * processes, said
        assert checkpoint.newest_valid(run)[0].step == last_step(run)
        assert "stopped at step" in said[0]
