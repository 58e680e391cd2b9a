"""Adaptive settling: the rule, its budget, its place in a curriculum; what training makes of it, interrupted or not."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import PowerCut, events, power_cut, tiny
from hypothesis import given
from hypothesis import strategies as st

from lrt.config.recipes import cpu_demo
from lrt.schedule import Curriculum, Schedule, effective_forwards
from lrt.training import checkpoint
from lrt.training.adaptive import Settling, restored
from lrt.training.logging import Jsonl
from lrt.training.trainer import train


def sweeps(text: str, residuals: list[float], settling: Settling | None = None) -> list[int]:
    """What a training would run, given the residual of every step."""
    plan, settling, found = replace(Curriculum.parse(text), steps=len(residuals)), settling or Settling(), []
    for step, residual in enumerate(residuals):
        drawn = settling.draw(plan, 0, step)
        found.append(sum(not p.grad for p in drawn.passes(4)))
        settling = settling.follow(plan, step, lambda residual=residual: residual)
    return found


@pytest.mark.parametrize("text", ["settled-1..3:tolerance=0.1", "interleaved-2:settle=1..3:tolerance=0.1"])
def test_one_sweep_more_above_the_tolerance_and_one_less_below(text: str):
    assert sweeps(text, [0.5, 0.5, 0.5, 0.5, 0.1, 0.01, 0.0, 0.2]) == [1, 2, 3, 3, 3, 2, 1, 1]
    assert sweeps(text, [math.nan, math.inf, 0.0]) == [1, 2, 3]


def test_a_hop_may_do_without_sweeps():
    assert sweeps("hop-0..2:tolerance=0.1", [0.5, 0.5, 0.5, 0.0, 0.0, 0.0]) == [0, 1, 2, 2, 1, 0]


def test_what_is_wanted_waits_until_the_budget_holds_it():
    assert sweeps("settled-1..3:tolerance=0.1:budget=1.5", [1.0] * 9) == [1, 2, 1, 1, 1, 3, 1, 1, 1]
    assert sweeps("settled-1..3:tolerance=0.1:budget=1", [1.0] * 5) == [1] * 5


@given(st.lists(st.floats(0, 1) | st.just(math.nan), min_size=1, max_size=60), st.floats(1, 4))
def test_the_mean_never_exceeds_the_budget_and_sizes_stay_in_the_range(residuals: list[float], budget: float):
    found = sweeps(f"settled-1..4:tolerance=0.3:budget={budget!r}", residuals)
    assert set(found) <= {1, 2, 3, 4}
    assert all(sum(found[: i + 1]) <= budget * (i + 1) + 1e-6 for i in range(len(found)))


def test_a_budget_that_is_always_wanted_is_used_up():
    found = sweeps("settled-1..3:tolerance=0.1:budget=1.3", [1.0] * 1000)
    assert 1.297 < sum(found) / 1000 <= 1.3
    assert set(found) == {1, 3}


def test_every_stage_begins_anew():
    text = "settled-1..3:tolerance=0.1@0.5,settled-2..4:tolerance=0.1"
    assert sweeps(text, [1.0] * 8) == [1, 2, 3, 3, 2, 3, 4, 4]
    assert sweeps("parallel@0.5,hop-1..2:tolerance=0.1", [1.0] * 6) == [0, 0, 0, 1, 2, 2]


def test_planned_costs_use_the_budget_up():
    for text, mean in (("settled-1..3:tolerance=0.1:budget=1.3", 1.3), ("settled-1..3:tolerance=0.1", 3.0)):
        assert effective_forwards(Schedule.parse(text), 8) == pytest.approx(1 + mean / 3)
    assert str(Schedule.parse("settled-1..3:tolerance=0.1:budget=1.3").at_largest()) == "settled-3"


def test_an_adaptive_size_cannot_be_drawn_without_a_measurement():
    with pytest.raises(ValueError, match="residual that training measures"):
        Schedule.parse("settled-1..3:tolerance=0.1").draw(0, 0)


PLAN = Curriculum.parse("settled-1..3:tolerance=0.1")


@pytest.mark.parametrize("saved", [None, {}, {"schedule": "x", "wanted": 1.5, "steps": 0, "spent": 0}, "much"])
def test_a_checkpoint_that_does_not_say_where_settling_stood_is_refused(saved):
    with pytest.raises(ValueError, match="how many sweeps"):
        restored(saved, PLAN, "meta.json")
    assert restored(saved, Curriculum.parse("settled-1..3"), "meta.json") == Settling()


def test_a_state_survives_json():
    state = Settling("settled-1..3:tolerance=0.1", 2, 7, 9)
    assert restored(json.loads(json.dumps(vars(state))), PLAN, "meta.json") == state


# In training.


def ran(run: Path) -> list[int]:
    return [sum("no grad" in p for p in e["passes"]) for e in events(run, "train")]


@pytest.mark.parametrize(("tolerance", "expected"), [(1e-9, [1, 2, 3, 3]), (1e9, [1, 1, 1, 1])])
def test_training_follows_the_measured_residual(tolerance: float, expected: list[int], source, tmp_path):
    config = tiny(cpu_demo(), source, steps=4, schedule=f"settled-1..3:tolerance={tolerance!r}", log_every=1)
    result = train(config, tmp_path / "run", sinks=[Jsonl(tmp_path / "run" / "metrics.jsonl")])
    assert ran(tmp_path / "run") == expected
    assert result.progress.token_forwards == sum(r + 1 for r in expected) / 4 * result.progress.tokens


def test_a_resumed_run_chooses_and_computes_what_an_uninterrupted_one_does(source, tmp_path):
    """The tolerance is what this training's residual has in the middle, so that it is crossed both ways."""
    options = {"steps": 16, "consistency": 0.1, "save_every": 5, "log_every": 1}
    probe = tmp_path / "probe"
    train(tiny(cpu_demo(), source, schedule="settled-1", **options), probe, sinks=[Jsonl(probe / "metrics.jsonl")])
    middle = statistics.median(e["consistency"] ** 0.5 for e in events(probe, "train")[5:])
    text = f"settled-1..3:tolerance={middle!r}:budget=1.6"
    config = tiny(cpu_demo(), source, schedule=text, **options)
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    straight = train(config, whole, sinks=[Jsonl(whole / "metrics.jsonl")])

    with pytest.raises(PowerCut):
        train(config, parted, sinks=[power_cut(7)])
    resumed = train(config, parted, resume=True, sinks=[Jsonl(parted / "metrics.jsonl")])
    assert ran(parted) == ran(whole)[5:]
    assert len(set(ran(parted))) > 1, "nothing adapted: the test would pass for nothing"
    ours, theirs = resumed.model.state_dict(), straight.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    states = [checkpoint.open_checkpoint(run).extra["settling"] for run in (whole, parted)]
    assert states[0] == states[1] and states[0]["steps"] == 16
