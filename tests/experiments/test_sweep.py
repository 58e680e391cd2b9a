"""Sweeps: what a file stands for, and that one killed in the middle ends with the same table."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lrt.cli.main import main
from lrt.experiments.sweep import read_sweep
from lrt.training.trainer import train

TINY = """
seeds = [0]
[base]
data = {{ source = "text.py", tokenizer = "bytes", vocab_size = 258 }}
model = {{ depth = 1, width = 16, heads = 1, context = 32 }}
train = {{ length = 32, batch = 4, horizon = "steps={steps}", eval_every = 0, save_every = 20, eval_rows = 4 }}
[arms."layerwise, settled"]
train.schedule = "settled-1..2"
[arms.plain]
train.schedule = "parallel"
model.memory = {{ projection = "none", residual = false }}
"""
KILLED = """
import os, signal, sys
from lrt.cli.main import main
from lrt.training.logging import Live

def show(self, event, name):
    if name == "plain-seed0" and event["kind"] == "checkpoint":
        os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    Live.show = show
    main()
"""
"""Runs the command line, and kills itself once the second run says that it has a checkpoint to go on from."""
CLOCKS = {"wall_seconds", "cpu_seconds", "decode_tokens_per_second", "decode_tokens_per_cpu_second"}
CLOCKS |= {"peak_memory_bytes", "seal"}


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = "".join(f"def function_{i}(x):\n    return [x] * {i}\n\n" for i in range(400))
    (tmp_path / "text.py").write_text(text, encoding="utf-8")
    (tmp_path / "tiny.toml").write_text(TINY.format(steps=60), encoding="utf-8")
    return tmp_path


def lines(folder) -> list[dict]:
    found = [json.loads(line) for line in (folder / "results.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{k: v for k, v in line.items() if k not in CLOCKS} for line in found]


def test_a_file_is_a_grid_of_runs_and_an_arm_wins_over_the_grid(tmp_path):
    file = tmp_path / "s.toml"
    file.write_text(
        'seeds = [3, 4]\ngrid.train.horizon = ["steps=1", "steps=2"]\ngrid.train.batch = [2, 4]\n'
        'base.model.memory.source = 2\n[arms.a]\n[arms."b, c"]\nmodel.depth = 5\ntrain.batch = 8\n',
        encoding="utf-8",
    )
    runs = read_sweep(file)
    assert len(runs) == 2 * 2 * 2 * 2
    assert [r.name for r in runs[:3]] == ["a-steps1-2-seed3", "b-c-steps1-2-seed3", "a-steps1-2-seed4"]
    assert {r.config.train.batch for r in runs if r.arm == "a"} == {2, 4}
    assert {(r.config.train.batch, r.config.model.depth) for r in runs if r.arm == "b, c"} == {(8, 5)}
    assert all(r.config.model.memory.source == 2 for r in runs)
    assert runs[-1].grid == {"train.horizon": "steps=2", "train.batch": 4} and runs[-1].config.train.seed == 4


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seeds = 3", "seeds is 3; it must be a list"),
        ('seeds = ["a"]', "give a list of numbers"),
        ("arms.a = 3", "an arm is a table"),
        ("[arms.a]\ntrain.bach = 3", "arm 'a': config.train has no field 'bach'"),
        ("colour = 1", "unknown colour"),
        ("grid.train.batch = 3", "grid.train.batch is 3; give a list"),
        ('[arms."a b"]\n[arms."a-b"]', "would be run twice"),
        ("= 3", "is not valid TOML"),
        ("[arms.a]\ntrain.schedule = 'settled'", "settled takes a size"),
    ],
)
def test_bad_files_are_named(tmp_path, capsys, text: str, said: str):
    (tmp_path / "bad.toml").write_text(text, encoding="utf-8")
    assert main(["sweep", str(tmp_path / "bad.toml")]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_killed_in_the_middle_and_started_again_it_ends_with_the_same_table(place):
    assert main(["sweep", "tiny.toml", "--out", "whole", "--jobs", "2"]) == 0
    again = ["sweep", "tiny.toml", "--out", "halves", "--jobs", "1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    killed = subprocess.run([sys.executable, "-c", KILLED, *again], stderr=subprocess.DEVNULL, env=environment)
    assert killed.returncode == -signal.SIGKILL
    assert list((place / "halves").glob("plain-seed0/checkpoints/step_*"))
    assert not (place / "halves" / "results.jsonl").exists()
    first = place / "halves" / "layerwise-settled-seed0" / "record.json"
    before = first.read_bytes()
    last = subprocess.run([sys.executable, "-m", "lrt", *again], stderr=subprocess.PIPE, env=environment)
    assert last.returncode == 0, last.stderr
    assert first.read_bytes() == before  # a finished run is not run again
    assert lines(place / "halves") == lines(place / "whole")
    assert len({line["bpb"]["decoded"] for line in lines(place / "whole")}) == 2


def test_a_folder_of_other_settings_is_refused_and_one_failure_does_not_stop_the_rest(place, capsys):
    text = TINY.format(steps=2)
    (place / "tiny.toml").write_text(text, encoding="utf-8")
    assert main(["sweep", "tiny.toml", "--out", "o", "--jobs", "1"]) == 0
    (place / "tiny.toml").write_text(text.replace("width = 16", "width = 32"), encoding="utf-8")
    assert main(["sweep", "tiny.toml", "--out", "o"]) == 2
    assert "was run with another model.width; choose another --out" in capsys.readouterr().err
    wrong = "[arms.wrong]\ntrain.length = 2000\nmodel.context = 2000\n"  # found out only where the run begins
    (place / "tiny.toml").write_text(text.replace("[arms.plain]", wrong + "[arms.plain]"), encoding="utf-8")
    assert main(["sweep", "tiny.toml", "--out", "p", "--jobs", "2"]) == 2
    error = capsys.readouterr().err
    assert "wrong-seed0 failed: the split has" in error and "1 of 3 runs failed" in error
    assert [line["arm"] for line in lines(place / "p")] == ["layerwise, settled", "plain"]


def test_a_job_array_does_the_same_and_finished_runs_are_not_submitted_again(place, capsys):
    (place / "tiny.toml").write_text(TINY.format(steps=2) + "[cluster]\ntimeout_min = 5\n", encoding="utf-8")
    assert main(["sweep", "tiny.toml", "--out", "array", "--cluster", "debug"]) == 0
    assert main(["sweep", "tiny.toml", "--out", "alone", "--jobs", "1"]) == 0
    assert lines(place / "array") == lines(place / "alone")
    assert main(["sweep", "tiny.toml", "--out", "array", "--cluster", "local"]) == 0
    assert "2 runs, 2 finished before" in capsys.readouterr().err
    assert main(["sweep", "tiny.toml", "--cluster", "cloud"]) == 2
    for name, again in {
        "plain-seed0/record.json": ["sweep", "tiny.toml", "--out", "alone"],
        "results.jsonl": ["report", "alone/results.jsonl"],
    }.items():
        file = place / "alone" / name
        written = file.read_text(encoding="utf-8")
        file.write_text(re.sub(r'("decoded": \d\.\d)\d', r"\g<1>x", written).replace("x", "0"), encoding="utf-8")
        capsys.readouterr()
        assert main(again) == 2
        assert "its seal does not fit" in capsys.readouterr().err
        file.write_text(written, encoding="utf-8")


@pytest.mark.parametrize("file", sorted((Path(__file__).parents[2] / "sweeps").glob("*.toml")), ids=lambda f: f.stem)
def test_the_sweeps_that_are_shipped_can_be_read(file):
    runs = read_sweep(file)
    assert runs and len({run.name for run in runs}) == len(runs)


def test_a_sweep_deletes_nothing(place, capsys):
    """A folder that merely bears a run's name, and a run whose checkpoint a newer version wrote: named, and left."""
    (place / "tiny.toml").write_text(TINY.format(steps=2), encoding="utf-8")
    strange, newer = place / "o" / "plain-seed0", place / "o" / "layerwise-settled-seed0"
    strange.mkdir(parents=True)
    (strange / "thesis.tex").write_text("years of work", encoding="utf-8")
    step = newer / "checkpoints" / "step_00000002"
    step.mkdir(parents=True)
    (newer / "config.json").write_text("{}", encoding="utf-8")
    (step / "meta.json").write_text('{"format": 99}', encoding="utf-8")
    other = place / "other"
    other.mkdir()
    (other / "config.json").write_text('{"mine": 1}', encoding="utf-8")
    before = {p: p.read_bytes() for o in ("o", "other") for p in (place / o).rglob("*") if p.is_file()}
    with pytest.raises(ValueError, match="mine"):
        train(read_sweep(place / "tiny.toml")[0].config, other, resume=None)
    assert main(["sweep", "tiny.toml", "--out", "o", "--jobs", "1"]) == 2
    said = capsys.readouterr().err
    assert "plain-seed0 holds something else than a run" in said and "has format 99" in said
    assert all(p.read_bytes() == content for p, content in before.items())
