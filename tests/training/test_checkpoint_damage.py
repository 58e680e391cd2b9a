"""Damaged checkpoints: refused in one line, whatever was damaged; the newest valid one is found; no pickle."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest
from checkpoints import edit, resum, saved

from lrt.training.checkpoint import (
    META,
    MODEL,
    OPTIMIZER,
    newest_valid,
    open_checkpoint,
    write_json,
)
from lrt.utils import checksums
from lrt.utils.checksums import file_hash


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)


def edit_model(file: Path, **changes) -> None:
    meta = json.loads(file.read_text())
    meta["config"]["model"] |= changes
    write_json(file, meta)
    resum(file)


def hide_pickle(file: Path) -> None:
    """A pickle in place of the weights, with a checksum that fits."""
    file.write_bytes(pickle.dumps({"head.weight": [1.0]}))
    meta = json.loads(file.with_name(META).read_text())
    edit(file.with_name(META), sha256=meta["sha256"] | {file.name: file_hash(file)})


def read(folder: Path) -> None:
    """Open a checkpoint and read everything in it."""
    opened = open_checkpoint(folder)
    opened.model()
    opened.optimizer_state()


DAMAGE = {
    "model truncated": (MODEL, lambda f: f.write_bytes(f.read_bytes()[:-100])),
    "model empty": (MODEL, lambda f: f.write_bytes(b"")),
    "model flipped": (MODEL, flip),
    "model missing": (MODEL, Path.unlink),
    "model pickled": (MODEL, hide_pickle),
    "optimizer flipped": (OPTIMIZER, flip),
    "optimizer missing": (OPTIMIZER, Path.unlink),
    "optimizer pickled": (OPTIMIZER, hide_pickle),
    "meta truncated": (META, lambda f: f.write_text(f.read_text()[:50])),
    "meta not text": (META, lambda f: f.write_bytes(b"\xff\xfe\x00")),
    "meta a list": (META, lambda f: f.write_text("[]")),
    "meta nested": (META, lambda f: f.write_text("[" * 100000)),
    "meta of another format": (META, lambda f: edit(f, format=99)),
    "meta without format": (META, lambda f: f.write_text("{}")),
    "meta without sums": (META, lambda f: edit(f, sha256={})),
    "meta with other sums": (META, lambda f: edit(f, sha256={MODEL: "0", OPTIMIZER: 1})),
    "meta step a text": (META, lambda f: edit(f, step="3")),
    "meta without extra": (META, lambda f: edit(f, extra=None)),
    "meta without config": (META, lambda f: edit(f, config=None)),
    "meta with an unknown field": (META, lambda f: edit(f, config={"modle": {}})),
    "meta of a wider model": (META, lambda f: edit_model(f, width=48)),
    "meta of a deeper model": (META, lambda f: edit_model(f, depth=4)),
    "meta of another memory": (META, lambda f: edit_model(f, memory={"projection": "shared"})),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_damage_is_refused_in_one_line_that_names_the_file(how: str, tmp_path: Path):
    folder = saved(tmp_path)
    name, damage = DAMAGE[how]
    damage(folder / name)
    with pytest.raises(ValueError) as error:
        read(folder)
    message = str(error.value)
    assert "\n" not in message
    assert name in message or "weight" in message  # a weight that does not fit is named itself
    assert ";" in message  # what to do about it


@pytest.mark.parametrize(
    "how", [h for h in DAMAGE if "wider" not in h and "deeper" not in h and "another memory" not in h]
)
def test_the_newest_valid_checkpoint_is_found(how: str, tmp_path: Path):
    saved(tmp_path, 1)
    folder = saved(tmp_path, 2)
    name, damage = DAMAGE[how]
    damage(folder / name)
    found, problems = newest_valid(tmp_path)
    if "pickled" in how:  # its checksum fits: only reading the tensors can tell
        assert found.step == 2
        return
    assert found.step == 1
    assert len(problems) == 1
    assert str(folder) in problems[0]


def test_nothing_valid(tmp_path: Path):
    assert newest_valid(tmp_path) == (None, [])
    for step in (1, 2):
        flip(saved(tmp_path, step) / MODEL)
    found, problems = newest_valid(tmp_path)
    assert found is None
    assert [("step_00000002" in problems[0]), ("step_00000001" in problems[1])] == [True, True]


@pytest.mark.parametrize("name", [MODEL, OPTIMIZER])
def test_weights_without_end_are_not_read_for_their_checksum(name: str, tmp_path: Path, monkeypatch):
    """A sparse file costs nothing, and would be hashed for hours."""
    folder = saved(tmp_path)
    os.truncate(folder / name, 2**40)
    hashed = []
    monkeypatch.setattr(checksums, "file_hash", lambda path: hashed.append(path.name) or file_hash(path))
    with pytest.raises(ValueError, match=rf"{name} is missing, truncated or altered \(checksum\)"):
        open_checkpoint(folder)
    assert name not in hashed
