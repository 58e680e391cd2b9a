"""Training end to end on a small text: it learns, resumes bit for bit, refuses to overwrite, says what it did."""

from __future__ import annotations

import json
import math
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import CODE, PowerCut, events, power_cut, tiny

from lrt.config.recipes import cpu_demo, cpu_demo_layerwise, cpu_demo_paper, cpu_demo_plain, cpu_demo_shift
from lrt.config.run import RunConfig
from lrt.evaluation.bits_per_byte import evaluate
from lrt.model.flops import scaling_parameters, train_flops_per_token
from lrt.schedule import Curriculum, Schedule
from lrt.training import checkpoint
from lrt.training.budget import horizon
from lrt.training.logging import Jsonl
from lrt.training.session import Session
from lrt.training.trainer import train
from lrt.utils.checksums import SUMS, file_hash, sums_text


@pytest.mark.parametrize("base", [cpu_demo, cpu_demo_paper, cpu_demo_plain, cpu_demo_shift])
def test_training_lowers_the_loss_and_records_everything(base, source, tmp_path):
    run = tmp_path / "run"
    result = train(tiny(base(), source, steps=40), run, sinks=[Jsonl(run / "metrics.jsonl")])
    logged = events(run, "train")
    assert logged[-1]["loss"] < 0.6 * math.log(257) < 0.8 * logged[0]["loss"] + 1
    assert logged[-1]["step"] == result.progress.step == 40
    assert result.progress.tokens == 40 * 8 * 32
    assert (run / "result.json").exists() and len(checkpoint.checkpoints(run)) == 1
    final = json.loads((run / "result.json").read_text())["bpb"]
    assert final["decoded"] == pytest.approx(result.bpb.decoded) and final["decoded"] < 5
    assert events(run, "eval")[-1]["bpb"]["live_gap"] == pytest.approx(final["decoded"] - final["merged"])


def test_effective_compute_counts_every_pass(source, tmp_path):
    run = tmp_path / "run"
    result = train(tiny(cpu_demo_layerwise(), source, schedule="settled-2"), run)
    p = result.progress
    assert p.token_forwards == 3 * p.tokens
    assert p.effective_forwards == pytest.approx(p.tokens * (1 + 2 / 3))


def test_effective_compute_counts_a_pass_that_stops_at_the_source_block_by_its_share(source, tmp_path):
    config = sourced(tiny(cpu_demo(), source, schedule="settled-2"), 1)
    p = train(config, tmp_path / "run").progress
    assert p.token_forwards == 3 * p.tokens
    assert p.effective_forwards == pytest.approx(p.tokens * (1 + 2 / 3 / config.model.layers))


def sourced(config: RunConfig, block: int) -> RunConfig:
    memory = replace(config.model.memory, source=block)
    return replace(config, model=replace(config.model, memory=memory))


def until(config: RunConfig, text: str) -> int:
    return horizon(replace(config, train=replace(config.train, horizon=text)))


def test_a_horizon_in_flops_is_what_the_steps_spend(source, tmp_path):
    config = tiny(cpu_demo(), source, schedule="hop-1", horizon="flops=3e9")
    config = sourced(config, 1)
    result = train(config, tmp_path / "run")
    assert result.progress.flops == pytest.approx(3e9, rel=0.02)
    assert until(result_config(tmp_path), "flops=3e9") == result.progress.step > 20


def result_config(folder: Path) -> RunConfig:
    return checkpoint.open_checkpoint(folder / "run").config


@pytest.mark.parametrize("block", [1, 3])
@pytest.mark.parametrize("schedule", ["settled-1..3:p=0.8/0.1/0.1", "interleaved-2", "parallel@0.5,hop-1", "parallel"])
def test_equal_flops_to_the_plain_model(schedule: str, block: int):
    """Whatever the schedule and the source, the steps cost what the plain model's do at that compute."""
    config, plain = sourced(cpu_demo(), block), cpu_demo_plain()
    config = replace(config, train=replace(config.train, schedule=schedule))
    steps, plains = until(config, "flops_of_plain=9"), until(plain, "compute=9")
    assert until(plain, "flops_of_plain=9") == plains
    flops = [
        n * train_flops_per_token(c.model, Curriculum.parse(c.train.schedule), c.train.length)
        for n, c in ((steps, config), (plains, plain))
    ]
    assert flops[0] == pytest.approx(flops[1], rel=1e-3)
    assert steps < plains


@pytest.mark.parametrize("kind", ["tokens", "ratio", "compute", "flops"])
def test_horizons_agree(kind, source):
    config = tiny(cpu_demo_paper(), source)
    tokens = 100 * config.train.batch * config.train.length
    ratio = tokens / scaling_parameters(config.model)
    text = {"tokens": f"tokens={tokens}", "ratio": f"ratio={ratio}", "compute": f"compute={2 * ratio}"}
    text["flops"] = f"flops={tokens * train_flops_per_token(config.model, Schedule.parse('interleaved-2'), 32)}"
    assert until(config, text[kind]) == 100


@pytest.mark.parametrize(
    ("schedule", "consistency", "rates"),
    [
        ("settled-1..3", 0.0, {}), ("interleaved-2", 0.5, {"memory_lr": 0.004, "gamma_lr": 0.5, "alpha_lr": 0.005}),
        ("hop-0..2:p=0.5/0.3/0.2", 1.0, {"memory_warmup": 0.7}),
    ],
)  # fmt: skip
def test_a_resumed_run_equals_an_uninterrupted_one_to_the_last_bit(schedule, consistency, rates, source, tmp_path):
    base = replace(cpu_demo(), optim=replace(cpu_demo().optim, **rates))
    config = tiny(base, source, steps=12, schedule=schedule, consistency=consistency, save_every=5, log_every=1)
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    straight = train(config, whole, sinks=[Jsonl(whole / "metrics.jsonl")])

    with pytest.raises(PowerCut):
        train(config, parted, sinks=[power_cut(7)])
    assert [p.name for p in checkpoint.checkpoints(parted)] == ["step_00000005"]
    resumed = train(config, parted, resume=True, sinks=[Jsonl(parted / "metrics.jsonl")])
    losses = [[e["loss"] for e in events(run, "train") if e["step"] > 5] for run in (whole, parted)]
    assert losses[0] == losses[1] and len(losses[0]) == 7
    ours, theirs = resumed.model.state_dict(), straight.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.fixture
def heard():
    """SIGHUP is not ignored, as it is where the tests themselves run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    ("number", "ends"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit), (signal.SIGHUP, SystemExit)]
)
def test_a_signal_ends_the_step_saves_and_says_how_to_go_on(number, ends, source, tmp_path, heard):
    said, before = [], signal.getsignal(number)

    def stop(event: dict) -> None:
        said.append(event)
        if event["kind"] == "train":
            signal.raise_signal(number)

    with pytest.raises(ends) as end:
        train(tiny(cpu_demo(), source), tmp_path / "run", sinks=[stop])
    assert "--resume" in said[-1]["text"]
    assert checkpoint.open_checkpoint(tmp_path / "run").step == 4
    assert signal.getsignal(number) == before
    assert ends is KeyboardInterrupt or end.value.code == 128 + number


def test_a_training_that_ends_in_nan_says_so_and_saves_nothing_of_it(source, tmp_path):
    """The last step's own weights are looked at too: no later loss would tell of them."""
    config, run = tiny(cpu_demo(), source, steps=3, save_every=1), tmp_path / "run"

    def spoil(event: dict) -> None:
        if event["kind"] == "train":
            with torch.no_grad():
                sessions[0].model.embedding.weight[0] = math.inf

    sessions, init = [], Session.__init__

    def seen(self, *args, **options):
        init(self, *args, **options)
        sessions.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Session, "__init__", seen)
        with pytest.raises(ValueError, match="ended at step 3 with weights or logits that are not finite.*last good"):
            train(config, run, sinks=[spoil])
    assert [p.name for p in checkpoint.checkpoints(run)] == ["step_00000001", "step_00000002"]
    assert not (run / "result.json").exists()


def test_micro_batches_give_the_same_step(source, tmp_path):
    base = tiny(cpu_demo(), source, steps=3, schedule="interleaved-2", consistency=1.0, log_every=1)
    runs = []
    for micro in (8, 2):
        run = tmp_path / f"micro{micro}"
        train(replace(base, train=replace(base.train, micro_batch=micro)), run, sinks=[Jsonl(run / "metrics.jsonl")])
        runs.append(events(run, "train"))
    for a, b in zip(*runs, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["per_pass"] == pytest.approx(b["per_pass"], rel=1e-4)
        assert a["consistency"] == pytest.approx(b["consistency"], rel=1e-4) and a["consistency"] > 0


def test_an_existing_run_is_never_overwritten(source, tmp_path):
    config = tiny(cpu_demo(), source, steps=2)
    train(config, tmp_path / "run")
    before = sorted((p, p.stat().st_mtime_ns) for p in (tmp_path / "run").rglob("*"))
    with pytest.raises(ValueError, match="already holds a run.*--resume"):
        train(config, tmp_path / "run")
    assert before == sorted((p, p.stat().st_mtime_ns) for p in (tmp_path / "run").rglob("*"))


def test_resume_refuses_other_data(source, tmp_path):
    config = tiny(cpu_demo(), source, steps=2)
    train(config, tmp_path / "run")
    other = tmp_path / "other.py"
    other.write_text(CODE.upper(), encoding="utf-8")
    with pytest.raises(ValueError, match="other tokens"):
        train(replace(config, data=replace(config.data, source=str(other))), tmp_path / "run", resume=True)


def test_resume_refuses_a_checkpoint_that_does_not_say_what_was_spent(source, tmp_path):
    config = tiny(cpu_demo(), source, steps=2)
    train(config, tmp_path / "run")
    meta = checkpoint.checkpoints(tmp_path / "run")[0] / checkpoint.META
    for spent in (None, {}, {"step": "two"}):
        data = json.loads(meta.read_text(encoding="utf-8"))
        data["extra"]["progress"] = spent
        meta.write_text(json.dumps(data), encoding="utf-8")
        sums = data["sha256"] | {checkpoint.META: file_hash(meta)}
        (meta.parent / SUMS).write_text(sums_text(sums), encoding="utf-8")
        with pytest.raises(ValueError, match="does not say what was spent"):
            train(config, tmp_path / "run", resume=True)


def test_a_widening_live_gap_is_said_aloud(source, tmp_path, monkeypatch):
    def widened(*args, **options):
        bpb = evaluate(*args, **options)
        return replace(bpb, decoded=bpb.merged + 0.5)

    monkeypatch.setattr("lrt.training.session.evaluate", widened)
    heard = []
    train(tiny(cpu_demo(), source, steps=2), tmp_path / "run", sinks=[heard.append])
    assert any(e["kind"] == "warning" and "live gap 0.500" in e["text"] for e in heard)


@pytest.mark.parametrize(
    ("base", "schedule", "options", "names"),
    [
        (cpu_demo_plain, "settled-2", {}, "has no recurrence.*parallel"),
        (cpu_demo_plain, "interleaved-2", {}, "repeat"),
        (cpu_demo_shift, "settled-1", {}, "has no recurrence.*parallel"),
        (cpu_demo_plain, "parallel@0.5,hop-1", {}, "hop-1 repeat"),
        (cpu_demo, "refinement-1:weights=1/0", {}, "last pass of refinement-1:weights=1/0"),
        (cpu_demo, "parallel", {"consistency": 1.0}, "train.consistency is 1.0.*parallel"),
        (cpu_demo, "chunked-4", {"consistency": 1.0}, "train.consistency"),
        (cpu_demo_plain, "parallel", {"consistency": 1.0}, "train.consistency"),
    ],
)  # fmt: skip
def test_what_serves_nothing_is_refused_before_anything_is_written(base, schedule, options, names, source, tmp_path):
    with pytest.raises(ValueError, match=names) as error:
        train(tiny(base(), source, schedule=schedule, **options), tmp_path / "run")
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()
