"""Runs followed over their steps: figures of the evaluations, weights of the checkpoints."""

from __future__ import annotations

import importlib.util
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import events, tiny

from lrt.config.model import MEMORY_OFF, MemoryConfig
from lrt.config.recipes import cpu_demo
from lrt.training.checkpoint import load_model
from lrt.training.logging import Jsonl
from lrt.training.trainer import train

TOOL = Path(__file__).parent.parent / "tools" / "over_steps.py"
FOUND = importlib.util.spec_from_file_location("over_steps", TOOL)
assert FOUND and FOUND.loader
over_steps = importlib.util.module_from_spec(FOUND)
sys.modules["over_steps"] = over_steps
FOUND.loader.exec_module(over_steps)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, source) -> Path:
    """Two runs of two evaluations each, with and without memory."""
    folder = tmp_path_factory.mktemp("runs")
    for name, memory in (("late-seed3", MemoryConfig(shift=True, source=1)), ("plain-seed3", MEMORY_OFF)):
        schedule = "settled-1" if memory.on else "parallel"
        config = tiny(cpu_demo(), source, steps=4, schedule=schedule, eval_every=2, save_every=2, keep=9)
        config = replace(config, model=replace(config.model, memory=memory))
        train(config, folder / name, sinks=[Jsonl(folder / name / "metrics.jsonl")])
    return folder


def test_rows_hold_what_the_run_measured_and_the_weights_at_that_step(runs):
    rows, run = over_steps.rows_of(runs / "late-seed3"), runs / "late-seed3"
    assert [(r["arm"], r["seed"], r["step"]) for r in rows] == [("late", 3, 2), ("late", 3, 4)]
    for row, event in zip(rows, events(run, "eval"), strict=True):
        by_position = event["bpb"]["by_position"]
        assert (row["decoded"], row["contraction"]) == (event["bpb"]["decoded"], event["bpb"]["contraction"])
        assert row["early_less_late"] == by_position["8-15"] - by_position["16-32"]
        model = load_model(run / "checkpoints" / f"step_{row['step']:08}").model
        values = [p.detach() for n, p in model.named_parameters() if ".projection." in n or n.startswith("projection.")]
        squares = sum(float(p.double().square().sum()) for p in values)
        assert row["matrices"] == pytest.approx(math.sqrt(squares / sum(p.numel() for p in values)))
    assert rows[0]["gamma"] != rows[1]["gamma"] and rows[0]["matrices"] != rows[1]["matrices"]


def test_what_a_file_holds_is_what_was_written_and_drawn(runs, tmp_path, capsys, monkeypatch):
    out, picture = tmp_path / "rows.jsonl", tmp_path / "p.png"
    words = ["over_steps.py", *map(str, sorted(runs.iterdir())), "--out", str(out), "--picture", str(picture)]
    monkeypatch.setattr(sys, "argv", words)
    over_steps.main()
    printed = capsys.readouterr().out
    assert printed.count("| late ") == 2 and picture.read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(sys, "argv", ["over_steps.py", str(out)])
    over_steps.main()
    assert capsys.readouterr().out == printed
    assert [row["gamma"] is None for row in over_steps.rows_of(out)] == [False, False, True, True]


def test_the_committed_picture_is_drawn_of_the_committed_rows():
    rows = over_steps.rows_of(TOOL.parent.parent / "results" / "over_steps_python.jsonl")
    panels = over_steps.picture(rows).axes
    assert [axes.get_title() for axes in panels] == [*over_steps.FIGURES.values(), ""]
    assert {len(axes.lines) for axes in panels[:-1]} == {8}
    last = {(r["arm"], r["seed"]): f"{r['decoded']:.3f}" for r in rows}
    page = (TOOL.parent.parent / "docs/results/seeds.md").read_text(encoding="utf-8")
    for arm, name in (("settled", "without shift"), ("settled-shift", "with shift")):
        assert f"| {name}: decoded bits per byte | " + " | ".join(last[arm, seed] for seed in range(4)) in page
