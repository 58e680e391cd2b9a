"""Commands that are killed at random moments, again and again; the next one ends as if nothing had been."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
from breaking import SEED, SMALL, leave_inputs

from lrt.utils.checksums import file_hash

KILLS = int(os.environ.get("LRT_TEST_KILLS", "2"))
"""Of each signal, per command."""
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
TRAIN = f"train {SMALL} --train.horizon steps=6 --data.folder data"
SWEEP = """
seeds = [0, 1]
[base]
data = { source = "text.txt", tokenizer = "bytes", folder = "data" }
model = { depth = 1, width = 16, heads = 2, context = 32 }
train = { length = 16, batch = 2, horizon = "steps=3", eval_every = 0, eval_rows = 1, schedule = "parallel" }
[arms.plain]
model.memory = { projection = "none", residual = false }
"""


class Killed(NamedTuple):
    """A command, the folders it writes, and which of their files hold times or speeds, so that names alone count."""

    command: str
    folders: tuple[str, ...]
    varies: str = "$^"


COMMANDS = {
    "tokenize": Killed("tokenize --source text.txt --tokenizer bpe --vocab-size 300 --folder data", ("data",)),
    "train": Killed(f"{TRAIN} --out new --or-resume", ("new", "data"), r"metrics|result\.json|SHA256|meta"),
    "sweep": Killed("sweep sweep.toml --out new --jobs 1", ("new", "data"), r"metrics|result|record\.json|SHA256|meta"),
    "report": Killed("report results.jsonl --out new", ("new",)),
    "export": Killed("export run new", ("new",)),
    "convert": Killed("convert run --out new", ("new",), r"SHA256|meta"),
    "eval": Killed("eval run --suite parity --limit 8 --lengths 4 8 16 32 --out new", ("new",), r"jsonl"),
}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("killed")
    leave_inputs(home, SWEEP)
    return home


def started(command: str, home: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "lrt", *command.split()], cwd=home, env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def tree(home: Path, killed: Killed) -> dict[str, str]:
    """Every file that the command wrote, with what it holds where that does not vary."""
    files = [f for folder in killed.folders for f in sorted((home / folder).rglob("*")) if f.is_file()]
    names = [str(f.relative_to(home)) for f in files]
    return {
        n: "" if re.search(rf"\.lock$|{killed.varies}", n) else file_hash(f) for n, f in zip(names, files, strict=True)
    }


def removed(home: Path, killed: Killed) -> None:
    for folder in killed.folders:
        shutil.rmtree(home / folder, ignore_errors=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_that_was_killed_ends_as_one_that_was_not(name: str, home: Path):
    killed, chance = COMMANDS[name], random.Random(f"{SEED} {name}")
    removed(home, killed)
    begun = time.monotonic()
    whole = started(killed.command, home)
    _, errors = whole.communicate(timeout=300)
    assert whole.returncode == 0, errors
    seconds, undisturbed = time.monotonic() - begun, tree(home, killed)
    removed(home, killed)
    for number in SIGNALS * KILLS:
        process = started(killed.command, home)
        time.sleep((0.1 + 0.9 * chance.random()) * seconds)
        os.killpg(process.pid, number)
        _, errors = process.communicate(timeout=120)
        assert "Traceback" not in errors, errors
        if name in ("export", "convert") and (home / "new").exists():  # whole, or not there
            assert tree(home, killed) == undisturbed
            removed(home, killed)
    last = started(killed.command, home)
    _, errors = last.communicate(timeout=300)
    assert last.returncode == 0, errors
    assert tree(home, killed) == undisturbed
