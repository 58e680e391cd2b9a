"""What a training does at each step, beside what it says and counts of it: rates, scores, checkpoints, skips, costs."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import tiny
from torch import Tensor

from lrt.config.model import MEMORY_OFF, ModelConfig
from lrt.config.recipes import cpu_demo
from lrt.config.run import OptimConfig, RunConfig
from lrt.data.mixture import Mixture
from lrt.model.flops import passes_flops, train_flops_per_token
from lrt.schedule import Schedule
from lrt.training import checkpoint, session
from lrt.training.budget import Progress, horizon
from lrt.training.checkpoint import Checkpoint
from lrt.training.optimizer import memory_rate, rate
from lrt.training.run_lock import RunLock
from lrt.training.session import Session
from lrt.training.trainer import prepare_data, resolve


def begun(config: RunConfig, run: Path, said: list[dict[str, Any]], started: Checkpoint | None = None) -> Session:
    """A training that has said that it begins."""
    prepared = prepare_data(config.data)
    return Session(resolve(config, prepared), RunLock(run), prepared, [said.append], started)


def of_kind(said: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [event for event in said if event["kind"] == kind]


def test_every_step_has_its_own_rates_and_the_log_says_them(source: Path, tmp_path: Path):
    optim = OptimConfig(warmup=0.5, decay=0.5, final=0.0, memory_warmup=1.0)
    said: list[dict[str, Any]] = []
    s = begun(replace(tiny(cpu_demo(), source, steps=6, log_every=1), optim=optim), tmp_path / "run", said)
    taken, step = [], s.optimizer.step

    def noted(share: float, skip: Tensor | None = None, memory: float = 1.0) -> None:
        taken.append((share, memory))
        step(share, skip, memory)

    s.optimizer.step = noted
    s.loop()
    assert taken == [(rate(k, 6, optim), memory_rate(k, 6, optim)) for k in range(6)]
    assert [event["rate"] for event in of_kind(said, "train")] == [share for share, _ in taken]
    assert taken[0] == (pytest.approx(1 / 3), pytest.approx(1 / 6)) and taken[5][0] == pytest.approx(1 / 3)


def test_speeds_are_of_the_steps_since_the_last_log(source: Path, tmp_path: Path, monkeypatch):
    seconds = itertools.count(0, 5)  # a step takes 5 s
    clock = SimpleNamespace(perf_counter=lambda: next(seconds), process_time=lambda: 0.0, monotonic=lambda: 0.0)
    monkeypatch.setattr(session, "time", clock)
    said: list[dict[str, Any]] = []
    s = begun(tiny(cpu_demo(), source, steps=6, log_every=2, schedule="parallel"), tmp_path / "run", said)
    s.loop()
    logged, flops = of_kind(said, "train"), s.progress.flops / 6
    assert [event["step"] for event in logged] == [2, 4, 6]
    assert [event["tokens_per_second"] for event in logged] == [8 * 32 / 5] * 3
    assert [event["flops_per_second"] for event in logged] == pytest.approx([flops / 5] * 3)
    assert [event["mfu"] for event in logged] == pytest.approx([flops / 5 / s.peak] * 3)


def test_a_checkpoint_holds_the_score_of_its_own_step_alone(source: Path, tmp_path: Path):
    """An older score would make it the best one, or not."""
    said: list[dict[str, Any]] = []
    begun(tiny(cpu_demo(), source, steps=6, eval_every=2, save_every=3, keep=9), tmp_path / "run", said).loop()
    scores = [checkpoint.open_checkpoint(p).extra["bpb"] for p in checkpoint.checkpoints(tmp_path / "run")]
    assert [event["step"] for event in of_kind(said, "eval")] == [2, 4, 6]
    assert scores[0] is None and scores[1]["decoded"] == of_kind(said, "eval")[-1]["bpb"]["decoded"]


def test_a_checkpoint_is_due_so_many_minutes_after_the_last_one(source: Path, tmp_path: Path, monkeypatch):
    seconds = itertools.count(0, 30)  # a look at the clock takes half a minute
    clock = SimpleNamespace(perf_counter=lambda: 0.0, process_time=lambda: 0.0, monotonic=lambda: next(seconds))
    monkeypatch.setattr(session, "time", clock)
    said: list[dict[str, Any]] = []
    begun(tiny(cpu_demo(), source, steps=7, save_every=0, save_minutes=1.0), tmp_path / "run", said).loop()
    assert [event["step"] for event in of_kind(said, "checkpoint")] == [2, 4, 6, 7]


def test_steps_skipped_before_a_checkpoint_are_told_all_the_same(source: Path, tmp_path: Path):
    """A checkpoint counts them too, between two logs. None is written at a skipped step; a resumed run counts on."""
    config = tiny(cpu_demo(), source, log_every=6, save_every=4, keep=9, max_skipped=2)
    said: list[dict[str, Any]] = []
    s = begun(config, tmp_path / "run", said)
    collect = s.parallel.collect

    def overflow() -> None:
        collect()
        if s.progress.step + 1 in (2, 8):
            assert s.model.head is not None and s.model.head.weight.grad is not None
            s.model.head.weight.grad.mul_(math.inf)

    s.parallel.collect = overflow
    s.loop()
    warnings = [event["text"].partition(" skipped")[0] for event in of_kind(said, "warning")]
    assert [text for text in warnings if "steps up to" in text] == ["1 steps up to 6", "1 steps up to 12"]
    assert [event["step"] for event in of_kind(said, "checkpoint")] == [4, 12]
    s.lock.release()
    resumed = begun(config, tmp_path / "run", said, checkpoint.open_checkpoint(tmp_path / "run"))
    assert resumed.skips.read()[0] == resumed.told_skipped == 2


def test_how_often_each_source_of_a_mixture_is_read(source: Path, tmp_path: Path):
    other = source.with_name("other.txt")
    other.write_text("the quick brown fox jumps over the lazy dog\n" * 200, encoding="utf-8")
    config = tiny(cpu_demo(), source, steps=50)
    mixed = replace(config, data=replace(config.data, source=f"{source}@0.75,{other}@0.25"))
    said: list[dict[str, Any]] = []
    s = begun(mixed, tmp_path / "run", said)
    assert isinstance(s.prepared.train, Mixture)
    sizes = [len(stream) for stream in s.prepared.train.streams]
    assert of_kind(said, "start")[0]["text_read"] == [50 * 8 * 32 * 0.75 / sizes[0], 50 * 8 * 32 * 0.25 / sizes[1]]


# What is counted, by hand.


def spent(model: ModelConfig, schedule: str) -> Progress:
    """One step of a batch of 8 rows of 32."""
    config = RunConfig(model=model)
    config = replace(config, train=replace(config.train, batch=8, length=32))
    progress = Progress()
    progress.count(config, Schedule.parse(schedule).passes(32), 2.0, 1.0)
    return progress


def test_a_looped_model_spends_every_time_round():
    model = ModelConfig(depth=2, width=32, heads=2, vocab_size=64, loops=3, memory=MEMORY_OFF)
    one, tokens = spent(model, "parallel"), 8 * 32
    assert (one.step, one.tokens, one.token_forwards, one.effective_forwards) == (1, tokens, 3 * tokens, 3 * tokens)
    assert one.flops == 8 * passes_flops(model, Schedule.parse("parallel").passes(32))
    train = replace(RunConfig().train, batch=8, length=32, schedule="parallel")
    until = {
        text: horizon(RunConfig(model=model, train=replace(train, horizon=text)))
        for text in ("ratio=60", "compute=180", "flops_of_plain=60")
    }
    assert until["ratio=60"] == until["compute=180"]  # every token costs three forwards
    flops = [train_flops_per_token(replace(model, loops=n), Schedule.parse("parallel"), 32) for n in (1, 3)]
    assert until["flops_of_plain=60"] == pytest.approx(until["ratio=60"] * flops[0] / flops[1], abs=1)


def test_blocks_that_no_memory_reaches_are_spent_once_without_gradient():
    memory = replace(ModelConfig().memory, source=2, blocks=(2, 4))
    one = spent(ModelConfig(depth=4, width=32, heads=2, vocab_size=64, memory=memory), "settled-2")
    assert one.token_forwards == 3 * 8 * 32
    assert one.effective_forwards == pytest.approx(8 * 32 * (2 / 4 / 3 + 1 / 4 / 3 + 1))


# What decides the outcome, and so may not differ when a run goes on.


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("train", {"schedule": "parallel"}), ("train", {"consistency": 0.5}), ("train", {"batch": 16}),
        ("train", {"length": 16}), ("train", {"horizon": "steps=9"}), ("train", {"seed": 1}),
        ("train", {"dtype": "bfloat16"}), ("optim", {"clip": None}), ("optim", {"memory_lr": 0.5}),
        ("model", {"softcap": None}), ("data", {"validation": 0.5}), ("data", {"max_bytes": 10**6}),
    ],
)  # fmt: skip
def test_a_run_goes_on_under_the_settings_that_it_began_with(part: str, change: dict[str, Any]):
    base = RunConfig(train=replace(RunConfig().train, dtype="float32"))
    started = Checkpoint(Path("runs/run"), 1, base, {})
    checkpoint.require_same(replace(base, data=replace(base.data, folder="elsewhere")), started)
    with pytest.raises(ValueError, match=rf"^--{part}\.{next(iter(change))} is .*, but runs/run was trained with"):
        checkpoint.require_same(replace(base, **{part: replace(getattr(base, part), **change)}), started)
