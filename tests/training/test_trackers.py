"""Trackers get the figures of metrics.jsonl; one that is missing is told at once, one that fails ends nothing."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import PowerCut, events, power_cut, tiny

from lrt.config.recipes import cpu_demo
from lrt.config.run import TrainConfig
from lrt.training import trackers
from lrt.training.logging import Jsonl
from lrt.training.trackers import Tracker, Trackers, figures_of
from lrt.training.trainer import train


def short(source: Path, log_to: str, **options):
    return tiny(cpu_demo(), source, steps=8, log_to=log_to, eval_rows=1, **options)


def recorded(run: Path) -> dict[tuple[str, int], float]:
    """Every figure of metrics.jsonl by name and step."""
    lines = [*events(run, "train"), *events(run, "eval")]
    return {(name, e["step"]): value for e in lines for name, value in figures_of(e).items()}


def test_tensorboard_has_every_figure_of_the_metrics(source: Path, tmp_path: Path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "run"
    train(short(source, "tensorboard"), run, sinks=[Jsonl(run / "metrics.jsonl")])
    events_of = EventAccumulator(str(run / "tensorboard"))
    events_of.Reload()
    shown = {(name, e.step): e.value for name in events_of.Tags()["scalars"] for e in events_of.Scalars(name)}
    wanted = recorded(run)
    assert shown.keys() == wanted.keys() and len(wanted) > 30
    assert all(shown[key] == pytest.approx(value, rel=1e-6, nan_ok=True) for key, value in wanted.items())
    assert {name.split("/")[0] for name, _ in wanted} == {"train", "eval"}


@pytest.mark.slow
def test_wandb_records_offline(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = tmp_path / "run"
    train(short(source, "wandb"), run, sinks=[Jsonl(run / "metrics.jsonl")])
    wandb.teardown()  # its own process writes the file to its end
    (kept,) = (run / "wandb").glob("offline-run-*/run-*.wandb")
    content = kept.read_bytes()
    assert all(name.encode() in content for name, _ in recorded(run)) and b"settled-1..3" in content


def test_wandb_goes_on_in_a_resumed_run_and_begins_anew_in_a_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    ids: list[str] = []
    told: list[int] = []
    run = SimpleNamespace(log=lambda figures, step: told.append(step))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **how: ids.append(how["id"]) or run))
    for begun, steps in ((0, (0, 4, 8)), (4, (4, 8, 12)), (0, (4,))):  # stopped after 8, resumed from 4
        tracker = trackers.WandB(tmp_path)
        tracker.open("name", {}, begun)
        for step in steps:
            tracker.record("train", step, {"loss": 1.0})
    first, resumed, new = ids
    assert first == resumed != new
    assert told == [0, 4, 8, 12, 4]


def stopped_and_resumed(source: Path, run: Path, name: str) -> dict[tuple[str, int], float]:
    """A training that is killed at its step 8, and does step 6 again from its checkpoint of step 4; its figures."""
    config = short(source, name, save_every=4, log_every=2)

    with pytest.raises(PowerCut):
        train(config, run, sinks=[Jsonl(run / "metrics.jsonl"), power_cut(8)])
    train(config, run, resume=True, sinks=[Jsonl(run / "metrics.jsonl")])
    return recorded(run)


@pytest.mark.slow
def test_mlflow_goes_on_in_the_same_run_and_has_each_step_once(source, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri((tmp_path / "mlruns").as_uri())
    wanted = stopped_and_resumed(source, tmp_path / "run", "mlflow")
    client = mlflow.MlflowClient()
    (kept,) = client.search_runs([client.get_experiment_by_name("lrt").experiment_id])
    assert kept.info.status == "FINISHED" and kept.data.params["train.seed"] == "0"
    shown = [
        (name, m.step, m.value) for name in kept.data.metrics for m in client.get_metric_history(kept.info.run_id, name)
    ]
    check(shown, wanted)


@pytest.mark.slow
def test_trackio_goes_on_in_the_same_run_and_has_each_step_once(source, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    SQLiteStorage = pytest.importorskip("trackio.sqlite_storage").SQLiteStorage
    wanted = stopped_and_resumed(source, tmp_path / "run", "trackio")
    (kept,) = SQLiteStorage.get_runs("lrt")
    logs = SQLiteStorage.get_logs("lrt", kept)
    check([(name, e["step"], v) for e in logs for name, v in e.items() if "/" in name], wanted)


def check(shown: list[tuple[str, int, float]], wanted: dict[tuple[str, int], float]) -> None:
    """Each figure once, as it was recorded; but for seconds, which a resumed training spends again."""
    assert len(shown) == len(wanted) == len({(name, step) for name, step, _ in shown}) > 30
    for name, step, value in shown:
        if not name.endswith(("seconds", "per_second", "mfu")):
            assert value == pytest.approx(wanted[name, step], rel=1e-6, nan_ok=True), (name, step)


def test_trackers_are_off_by_default_and_unknown_ones_named():
    assert TrainConfig().trackers == ()
    assert TrainConfig(log_to="wandb, tensorboard").trackers == ("wandb", "tensorboard")
    with pytest.raises(ValueError, match=r"train\.log_to.*'neptune'.*tensorboard, wandb, trackio, mlflow"):
        TrainConfig(log_to="tensorboard,neptune")


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio", "mlflow"])
def test_one_that_is_not_installed_is_told_before_anything_is_written(name, source, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, trackers.TRACKERS[name].package, None)
    with pytest.raises(
        ValueError, match=rf"train\.log_to names {name}, which is not installed: pip install '.*{name}\]'"
    ):
        train(short(source, name), tmp_path / "run")
    assert not (tmp_path / "run").exists()


class Failing(Tracker):
    """A tracker whose network is gone after the first figures."""

    package = "json"
    ended = logged = 0

    def begin(self, name, config, step, known):
        assert name == "cpu_demo" and config["train"]["seed"] == 0 and step == 0 and known is None
        return name

    def log(self, step, figures):
        Failing.logged += 1
        if Failing.logged == 2:
            raise ConnectionError("the network\nis gone")

    def end(self):
        Failing.ended += 1


def test_a_tracker_that_fails_is_told_and_ends_nothing(source, tmp_path, monkeypatch):
    monkeypatch.setitem(trackers.TRACKERS, "mlflow", Failing)
    run = tmp_path / "run"
    result = train(replace(short(source, "mlflow"), name="cpu_demo"), run, sinks=[Jsonl(run / "metrics.jsonl")])
    assert result.progress.step == 8
    (warned,) = [e["text"] for e in events(run, "warning") if "mlflow" in e["text"]]
    assert warned.startswith("mlflow has failed and is left out from here on (the network is gone)")
    assert (Failing.logged, Failing.ended) == (2, 0)


def test_events_without_figures_reach_no_tracker(tmp_path: Path):
    sink = Trackers((), tmp_path, [])
    sink({"kind": "note", "text": "nothing"})
    sink.close()
    assert figures_of({"kind": "warning"}) == {} and sink.running == {}
