"""What a training says: means over the same steps, time left at this process's speed, bars that end."""

from __future__ import annotations

import io
import itertools
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import events, tiny
from rich.console import Console

from lrt.config.recipes import cpu_demo
from lrt.config.run import DataConfig
from lrt.data.prepare import prepare
from lrt.model.loss import LossOutput
from lrt.schedule import Schedule
from lrt.training import session, trainer
from lrt.training.logging import Jsonl, Live
from lrt.training.step_figures import StepFigures
from lrt.training.trainer import train
from lrt.utils.threads import ThreadChoice


def figures(*steps: tuple[str, list[float]]) -> StepFigures:
    """Of steps that are given by their schedules and the losses of their passes."""
    found = StepFigures()
    for schedule, losses in steps:
        per_pass = torch.tensor(losses)
        found.add(LossOutput(per_pass.mean(), per_pass, torch.tensor(0.5), Schedule.parse(schedule).passes(4)), 1.0)
    return found


def test_loss_and_losses_per_pass_are_of_the_same_steps():
    said = figures(("interleaved-2", [3.0, 2.0, 1.0]), ("interleaved-2", [6.0, 5.0, 4.0])).means()
    assert said["loss"] == 3.5 and said["per_pass"] == [4.5, 3.5, 2.5]
    assert said["loss"] == pytest.approx(sum(said["per_pass"]) / 3)
    assert said["passes"] == ["0:4", "0:3:2", "1:4:2"]


def test_a_skipped_step_counts_in_no_mean():
    said = figures(("parallel", [3.0]), ("parallel", [math.nan])).means()
    assert said["loss"] == 3.0 and said["per_pass"] == [3.0]


def test_passes_that_only_some_steps_have_are_averaged_over_those():
    said = figures(("parallel", [3.0]), ("refinement-1", [5.0, 1.0])).means()
    assert said["per_pass"] == [4.0, 1.0] and said["passes"] == ["0:4", "0:4"]


def test_a_training_logs_the_means_of_its_steps(source: Path, tmp_path: Path):
    base = tiny(cpu_demo(), source, steps=4, schedule="interleaved-2", threads=1)
    logged = []
    for every in (1, 4):
        run = tmp_path / f"every{every}"
        train(replace(base, train=replace(base.train, log_every=every)), run, sinks=[Jsonl(run / "metrics.jsonl")])
        logged.append(events(run, "train"))
    single, (together,) = logged
    assert together["loss"] == pytest.approx(sum(e["loss"] for e in single) / 4)
    for k in range(3):
        assert together["per_pass"][k] == pytest.approx(sum(e["per_pass"][k] for e in single) / 4)


def test_the_time_left_is_at_this_processs_speed(source: Path, tmp_path: Path, monkeypatch):
    config = tiny(cpu_demo(), source, steps=6, log_every=1, save_every=2, threads=1)
    run, said = tmp_path / "run", []

    def stop(event: dict) -> None:
        if event["kind"] == "checkpoint":
            raise RuntimeError

    clock = itertools.count(step=50)  # a slow machine: a step takes 50 s
    slow = SimpleNamespace(perf_counter=lambda: next(clock), process_time=lambda: 0.0, monotonic=lambda: 0.0)
    monkeypatch.setattr(session, "time", slow)
    with pytest.raises(RuntimeError):
        train(config, run, sinks=[said.append, stop])
    monkeypatch.undo()
    assert next(e for e in said if e["kind"] == "train")["seconds_left"] == 5 * 50
    said.clear()
    train(config, run, resume=True, sinks=[said.append])
    first = next(e for e in said if e["kind"] == "train")
    assert first["step"] == 3 and first["seconds"] > 100 and first["seconds_left"] < 50


# Threads. They are not really started here: on a busy machine two are many times slower than one.


@pytest.fixture
def taken(monkeypatch) -> list[int]:
    """The numbers of threads that trainings ran with; a measurement would choose 2."""
    found: list[int] = []

    @contextmanager
    def recorded(count: int) -> Iterator[None]:
        found.append(count)
        yield

    monkeypatch.setattr(trainer, "threads", recorded)
    monkeypatch.setattr(trainer, "choose_threads", lambda width, positions: ThreadChoice(2, "measured"))
    return found


@pytest.mark.parametrize(("asked", "has", "says"), [(None, 2, "measured"), (3, 3, "as configured")])
def test_threads_are_chosen_and_said(asked, has, says, source: Path, tmp_path: Path, taken: list[int]):
    said: list[dict] = []
    train(tiny(cpu_demo(), source, steps=1, threads=asked), tmp_path / "run", sinks=[said.append])
    (note,) = (e["text"] for e in said if e["kind"] == "note")
    assert taken == [has] and note == f"{has} CPU threads ({says}); --train.threads overrides"


def test_a_resumed_run_keeps_its_threads(source: Path, tmp_path: Path, taken: list[int], monkeypatch):
    config, run = tiny(cpu_demo(), source, steps=1), tmp_path / "run"
    train(config, run)
    monkeypatch.setattr(trainer, "choose_threads", lambda width, positions: ThreadChoice(1, "measured"))
    train(config, run, resume=None)
    assert taken == [2, 2]


# What is shown.


def shown(terminal: bool, *said: dict) -> str:
    live = Live()
    live.console = Console(file=io.StringIO(), force_terminal=terminal, width=200)
    live.bar.live.console = live.console
    for event in said:
        live(event)
    if terminal:
        live.bar.refresh()
    live.bar.stop()
    assert isinstance(live.console.file, io.StringIO)
    return live.console.file.getvalue()


PREPARED = {"kind": "prepare", "done": 90, "total": 100, "note": "tokenizing"}
TRAINED = {
    "kind": "train", "step": 3, "steps": 9, "loss": 2.5, "per_pass": [2.5], "tokens_per_second": 10.0, "mfu": 0.1,
    "seconds_left": 60,
}  # fmt: skip
STAGE = {"kind": "stage", "what": "evaluation", "text": "step 9: 4 rows"}
SCORED = {"decoded": 2.0, "merged": 2.0, "zero_memory": 2.5, "live_gap": 0.0, "residuals": []}


@pytest.mark.parametrize("terminal", [True, False])
def test_the_last_evaluation_shows_that_it_runs(terminal: bool):
    assert "evaluation" in shown(terminal, TRAINED, STAGE) and "step 9: 4 rows" in shown(terminal, TRAINED, STAGE)


def test_the_legend_is_shown_once():
    said = shown(False, *({"kind": "eval", "step": i, "bpb": SCORED} for i in (1, 2)))
    assert said.count("live gap: decoded less merged") == 1 and said.count("BPB decoded 2.0000") == 2


START = {
    "kind": "start", "parameters": {"matrices": 5, "total": 5}, "schedule": "parallel", "step": 0, "steps": 9,
    "device": "cpu", "dtype": "float32", "peak_flops": 1e9, "peak_source": "measured",
}  # fmt: skip


def test_the_figures_of_training_are_explained_once_and_from_the_start():
    said = shown(False, START, TRAINED, START)
    assert said.count("loss: nats per token, lower is better") == 1
    assert said.index("loss: nats") < said.index("step 3/9")


def test_how_often_the_text_is_read_is_told():
    assert "its text is read 8.2, 0.05 times" in shown(False, START | {"text_read": [8.2, 0.05]})
    assert "is read" not in shown(False, START | {"text_read": []})


def test_one_bar_at_a_time_per_run():
    live = Live()
    live.console = Console(file=io.StringIO(), force_terminal=True)
    live.bar.live.console = live.console
    for event in (PREPARED, TRAINED, STAGE, TRAINED | {"step": 9}):
        live(event)
        assert len(live.bar.tasks) == 1
    assert (live.bar.tasks[0].completed, live.bar.tasks[0].total) == (9, 9)
    live.bar.stop()


def test_on_a_narrow_screen_the_time_left_of_every_run_is_seen(monkeypatch):
    """At 80 columns names and times stand in full; what is cut is the end."""
    monkeypatch.setenv("COLUMNS", "80")
    live = Live()
    live.console = live.bar.live.console = Console(file=io.StringIO(), force_terminal=True)
    paper = {"step": 1330, "steps": 1518, "seconds_left": 435, "per_pass": [3.1, 3.1, 3.1], "loss": 3.1, "mfu": 0.01}
    for name in ("plain", "paper"):
        live.show(TRAINED | paper | {"tokens_per_second": 1027}, name)
    live.show({"kind": "queue", "done": 0, "total": 4, "waiting": ["lrt", "plain"], "seconds_left": 1220}, "")
    live.bar.stop()
    screen = io.StringIO()
    Console(file=screen, width=80).print(live.bar.get_renderable())
    *runs, queue = screen.getvalue().splitlines()
    assert [len(line) for line in (*runs, queue)] == [80, 80, 80]
    for name, line in zip(("plain", "paper"), runs, strict=True):
        assert line.startswith(f"{name}: train ") and "step 1,330/1,518  07:15 left  loss 3.100" in line
    assert queue.startswith("all runs ") and "0 of 4 done; about 20:20 of training left" in queue


def test_the_data_bar_ends_at_its_end(tmp_path: Path):
    text = tmp_path / "text.txt"
    text.write_bytes(b"\xef\xbb\xbf" + "é a small text\n".encode() * 3000)  # the mark is no text: totals are estimates
    said: list[tuple] = []
    data = DataConfig(source=str(text), tokenizer="bytes", validation=0.1, folder=str(tmp_path / "data"))
    prepare(data, progress=lambda *report: said.append(report))
    done, total, note = said[-1]
    assert done == total and note == "tokenizing"


@pytest.mark.parametrize("kind", ["pipe", "folder"])
def test_metrics_go_to_a_regular_file(kind: str, tmp_path: Path):
    """Opening a pipe that nobody reads would never end."""
    file = tmp_path / "metrics.jsonl"
    os.mkfifo(file) if kind == "pipe" else file.mkdir()
    for event in ({"kind": "start", "step": 0}, {"kind": "warning", "text": "x"}):
        with pytest.raises(ValueError, match=r"metrics.jsonl is no regular file; remove it"):
            Jsonl(file)(event)
