"""The tokens of a run: its shards are enough, wherever it is opened; what changes while they are read is seen."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_faults import home, recorded, require_equal, small

from lrt.cli.main import main
from lrt.integrations.convert import convert
from lrt.training import checkpoint
from lrt.utils.checksums import SUMS, file_hash, sums_text

__all__ = ["home"]  # a fixture


@pytest.mark.parametrize("layout", ["all of it", "the run alone", "shards inside the run", "shards given by name"])
def test_a_moved_run_needs_its_token_shards_alone(layout: str, home: Path, tmp_path: Path, monkeypatch, capsys):
    """Trained on and scored from another folder, without its text, to the end of a run that never moved."""
    monkeypatch.chdir(tmp_path)
    Path("home").mkdir()
    shutil.copy(home / "text.py", "home")
    monkeypatch.chdir("home")
    base = small(home)
    config = replace(base, data=replace(base.data, source="text.py", folder="shards/here"))
    recorded(config, Path("runs/half"))
    shutil.rmtree(checkpoint.checkpoints(Path("runs/half"))[-1])
    Path("runs/half/result.json").unlink()
    Path("text.py").unlink()
    monkeypatch.chdir(tmp_path)
    flags = []
    if layout == "all of it":
        Path("home").rename("other")
    else:
        Path("other/runs").mkdir(parents=True)
        Path("home/runs/half").rename("other/runs/half")
    if layout == "shards inside the run":
        Path("home/shards/here").rename("other/runs/half/data")
    if layout == "shards given by name":
        Path("home/shards/here").rename("given")
        flags = ["--data.folder", "given"]
    run = Path("other/runs/half")
    assert main(["train", "--resume", str(run), *flags]) == 0
    assert "the text of text.py has changed since, or is gone" in capsys.readouterr().err
    require_equal(run, home / "whole")
    assert main(["eval", str(run), "--rows", "4", "--device", "cpu", "--json"]) == 0
    own, whole = json.loads(capsys.readouterr().out), json.loads((home / "whole" / "result.json").read_text())["bpb"]
    assert own["decoded"] == whole["decoded"]
    assert own["text"] == "the validation split of text.py as it was tokenised"
    shutil.rmtree(next(p for p in map(Path, (run / "data", "given", "other/shards", "home/shards")) if p.exists()))
    assert main(["eval", str(run), "--device", "cpu"]) == 2
    refusal = capsys.readouterr().err
    assert f"no token shards of {run} in {run}/data or where they were" in refusal
    assert "--source TEXT" in refusal and "text.py: no such" in refusal


@pytest.mark.parametrize("change", ["one bit", "truncated"])
def test_a_shard_that_changes_during_training_ends_it_plainly(change: str, home: Path, tmp_path: Path):
    """The last checkpoint stands; with the shard mended the run ends as if nothing had happened."""
    shutil.copytree(home / "data", tmp_path / "data")
    base = small(home)
    config = replace(base, data=replace(base.data, folder=str(tmp_path / "data")))
    shard = next((tmp_path / "data").rglob("train_00000.bin"))
    good = shard.read_bytes()

    def spoil(event: dict) -> None:
        if event["kind"] == "train" and event["step"] == 4:
            with shard.open("r+b") as file:
                file.truncate(100) if change == "truncated" else file.write(bytes([good[0] ^ 1]))

    with pytest.raises(ValueError, match=r"train_00000\.bin: (\d+ bytes where|its checksum|id 257 is)"):
        recorded(config, tmp_path / "run", sinks=[spoil])
    assert checkpoint.newest_valid(tmp_path / "run")[0].step in (3, 6)
    shard.write_bytes(good)
    recorded(config, tmp_path / "run", resume=True)
    require_equal(tmp_path / "run", home / "whole")


def test_a_run_of_a_gpu_is_resumed_on_a_cpu(home: Path, tmp_path: Path, capsys):
    """With --train.device; without it, one line that names it. The end is that of the same run on the CPU."""
    run, base = tmp_path / "run", small(home)
    recorded(replace(base, train=replace(base.train, save_every=3, keep=4)), run)
    for later in checkpoint.checkpoints(run)[1:]:
        shutil.rmtree(later)
    meta = checkpoint.checkpoints(run)[0] / checkpoint.META
    data = json.loads(meta.read_text())
    data["config"]["train"] |= {"device": "cuda", "threads": None}
    meta.write_text(json.dumps(data))
    sums = data["sha256"] | {checkpoint.META: file_hash(meta)}
    (meta.parent / SUMS).write_text(sums_text(sums))
    if not torch.cuda.is_available():
        assert main(["train", "--resume", str(run)]) == 2
        assert "--train.device cpu" in capsys.readouterr().err
    assert main(["train", "--resume", str(run), "--train.device", "tpu"]) == 2
    said = capsys.readouterr().err
    assert "'tpu'" in said and "was trained on" not in said
    assert main(["train", "--resume", str(run), "--train.device", "cpu"]) == 0
    require_equal(run, home / "whole")
    assert json.loads((run / "config.json").read_text())["train"]["device"] == "cpu"


@pytest.mark.parametrize("within", [False, True])
def test_a_converted_run_keeps_its_shards_when_its_source_goes(within: bool, home: Path, tmp_path: Path, monkeypatch):
    """Shards elsewhere are named from the new run and in full; those within the source run come along."""
    monkeypatch.chdir(tmp_path)
    base, run = small(home), Path("runs/first")
    config = replace(base, data=replace(base.data, folder="runs/first/data" if within else "shards"))
    recorded(config, run)
    convert(run, Path("other/second"))
    shutil.rmtree(run)
    monkeypatch.chdir(home)
    assert main(["eval", str(tmp_path / "other/second"), "--rows", "2"]) == 0
    shutil.move(tmp_path, tmp_path.with_name(tmp_path.name + "-moved"))
    assert main(["eval", str(tmp_path.with_name(tmp_path.name + "-moved") / "other/second"), "--rows", "2"]) == 0
