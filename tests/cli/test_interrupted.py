"""SIGINT in the first seconds of a command: one line, exit code 130, no traceback."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMMANDS = ["--help", "info", "schedule settled-2", "train --data.source text.txt --out run", "eval nowhere", "demo"]


def test_an_interruption_while_modules_are_loaded_is_one_line(tmp_path: Path):
    """The module that is being loaded interrupts itself, and catches whatever is raised in it."""
    half = "except BaseException:\n    raise ImportError('half')"
    (tmp_path / "tyro.py").write_text(f"import os, signal\ntry:\n    os.kill(os.getpid(), signal.SIGINT)\n{half}")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-m", "lrt", "schedule", "parallel"]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert (ended.returncode, ended.stderr) == (130, "lrt: interrupted\n")


START = """
import signal, sys
from lrt.__main__ import _interrupted, start
signal.signal(signal.SIGINT, _interrupted)
print("begun", flush=True)
start()
"""
"""The entry point, once it has begun: what the interpreter itself does before is not ours."""


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_an_interruption_at_any_moment_of_the_start(command: str, tmp_path: Path):
    (tmp_path / "text.txt").write_text("some text\n" * 200)
    chance, environment = random.Random(command), os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for _ in range(8):
        with subprocess.Popen(
            [sys.executable, "-c", START, *command.split()], cwd=tmp_path, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        ) as process:  # fmt: skip
            assert process.stdout is not None and process.stdout.readline() == "begun\n"
            time.sleep(chance.random() * 3)
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=120)
        # The interpreter was already leaving, with its handlers gone; a shell reads 130 there too.
        late = -signal.SIGINT
        assert process.returncode in (0, 2, 130, late), errors
        assert "Traceback" not in errors and "Exception ignored" not in errors, errors
