"""A disk that is really full, at every place where it may become so: one line, exit code 2, nothing lost."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from breaking import SMALL, ends_plainly, leave_inputs

from lrt.cli.main import main
from lrt.training.checkpoint import load_model

SIZES = (4, 24, 60, 120, 200, 320)
"""Kilobytes that are left."""
SWEEP = """
[base]
data = { source = "text.txt", tokenizer = "bytes", folder = "data" }
model = { depth = 1, width = 16, heads = 2, context = 32 }
train = { length = 16, batch = 2, horizon = "steps=2", eval_every = 0, eval_rows = 1 }
"""
COMMANDS = {
    "tokenize": "tokenize --source text.txt --tokenizer bpe --vocab-size 300 --folder full/new",
    "train": f"train {SMALL} --train.horizon steps=6 --data.folder data --out full/new --or-resume",
    "shards": f"train {SMALL} --train.horizon steps=6 --data.folder full/new --out elsewhere --or-resume",
    "resume": "train --resume full/kept",
    "report": "report results.jsonl --out full/new",
    "export": "export run full/new",
    "convert": "convert run --out full/new",
    "eval": "eval run --suite parity --limit 4 --lengths 4 8 --out full/new",
    "sweep": "sweep sweep.toml --out full/new --jobs 1",
}
"""What is written into the folder `full`, which is a disk of its own."""


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Iterator[Path]:
    """A folder with all that is read, and a run that was stopped."""
    home = tmp_path_factory.mktemp("disk")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        leave_inputs(home, SWEEP)
        assert main([*f"train {SMALL} --train.horizon steps=6 --data.folder data --out kept".split()]) == 0
        for file in ("kept/checkpoints/step_00000006", "kept/result.json"):
            shutil.rmtree(file) if Path(file).is_dir() else Path(file).unlink()
        yield home


@pytest.fixture
def full(home: Path, monkeypatch) -> Iterator[Path]:
    """A disk of one megabyte, in the folder `full`."""
    monkeypatch.chdir(home)
    disk = home / "full"
    disk.mkdir(exist_ok=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no file system may be mounted here")
    try:
        yield disk
    finally:
        monkeypatch.undo()
        subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("kilobytes", SIZES)
@pytest.mark.parametrize("name", COMMANDS)
def test_a_disk_that_becomes_full_is_one_line_and_loses_nothing(name: str, kilobytes: int, full: Path, capfd):
    if name == "resume":
        shutil.copytree("kept", full / "kept")
    (full / "before.txt").write_text("what was there")
    used = shutil.disk_usage(full)
    filler = full / "filler"
    filler.write_bytes(b"x" * max(0, used.free - 1024 * kilobytes))
    errors = ends_plainly(COMMANDS[name].split(), capfd)
    assert (full / "before.txt").read_text() == "what was there"
    left = [str(f.relative_to(full)) for f in full.rglob("*") if f.name.endswith((".tmp", ".partial"))]
    filler.unlink()
    if not errors or "No space left" in errors or "written" in errors:
        assert not left, (errors, left)
    if name == "resume":  # what was there opens, and the training goes on from it
        assert load_model(full / "kept").step >= 4
    code, errors = main(COMMANDS[name].split()), capfd.readouterr().err
    shutil.rmtree("elsewhere", ignore_errors=True)
    assert code == 0 or f"{full.name}/new exists" in errors, errors
