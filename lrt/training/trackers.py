"""Trackers of others as sinks: TensorBoard, Weights & Biases, Trackio and MLflow get the figures of metrics.jsonl.

Each is imported when it is asked for. One that fails while training goes on is told, and left out from then on. A
resumed training goes on in the same run, and does not tell again what it does again.
"""

from __future__ import annotations

import importlib
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, final

from lrt.config.run import TrackerName
from lrt.training.logging import Event, Sink, tell
from lrt.utils.dotted import leaves
from lrt.utils.files import one_line, read_json, write_sealed

PROJECT = "lrt"
"""Project or experiment that runs are listed under, where their tracker has such."""
TRAINED = (
    "loss", "consistency", "gradient_norm", "rate", "tokens", "token_forwards", "effective_forwards", "flops",
    "seconds", "tokens_per_second", "mfu", "skipped",
)  # fmt: skip
SCORED = ("decoded", "merged", "zero_memory", "live_gap", "contraction")
Figures = Mapping[str, float]


def figures_of(event: Event) -> dict[str, float]:
    """The numbers of an event by the names that trackers group them by; empty where it has none."""
    if event["kind"] == "train":
        each = {f"train/pass_{i}": value for i, value in enumerate(event["per_pass"], 1)}
        return {f"train/{name}": float(event[name]) for name in TRAINED} | each
    if event["kind"] == "eval":
        return {f"eval/{name}": float(event["bpb"][name]) for name in SCORED}
    return {}


class Tracker(ABC):
    """One of them: made without effect, begun with a training, ended with it. ValueError: its package is missing."""

    package: str
    rewinds = False
    """Whether the library itself hides what was recorded after the step that a training goes on from."""

    def __init__(self, run: Path) -> None:
        self.run = run
        try:
            self.library: Any = importlib.import_module(self.package)
        except ImportError:
            name = self.package.rpartition(".")[2]
            raise ValueError(
                f"train.log_to names {name}, which is not installed: "
                f"pip install 'latent-recurrent-transformer[{name}]', or leave it out"
            ) from None

        self.file = run / f"{self.package.rpartition('.')[2]}-run.json"
        """The library's name of the run, and the last step of each kind that it has."""
        self.known: dict[str, Any] = {}

    def open(self, name: str, config: dict[str, Any], step: int) -> None:
        """Open the run that a resumed training goes on in, or a new one."""
        self.known = read_json(self.file, "tracker's run") if step and self.file.is_file() else {}
        self.known["id"] = self.begin(name, config, step, self.known.get("id"))

    def record(self, kind: str, step: int, figures: Figures) -> None:
        """Record figures of a step, but those that the library has already."""
        if self.rewinds or step > self.known.get(kind, -1):
            self.log(step, figures)
            self.known[kind] = step
            write_sealed(self.file, self.known)

    @abstractmethod
    def begin(self, name: str, config: dict[str, Any], step: int, previous: str | None) -> str:
        """Open the run `previous`, or else a new one called `name`; what the library knows it by."""

    @abstractmethod
    def log(self, step: int, figures: Figures) -> None:
        """Record figures of a step."""

    @abstractmethod
    def end(self) -> None:
        """Write what is left, and close."""


@final
class TensorBoard(Tracker):
    """Event files in the run's folder; what was recorded after the step it goes on from is hidden."""

    package = "torch.utils.tensorboard"
    rewinds = True

    def begin(self, name: str, config: dict[str, Any], step: int, previous: str | None) -> str:
        self.writer = self.library.SummaryWriter(str(self.run / "tensorboard"), purge_step=step + 1 if step else None)
        self.writer.add_text("config", "\n".join(f"    {key}: {value}" for key, value in leaves(config)), step)
        return name

    def log(self, step: int, figures: Figures) -> None:
        for name, value in figures.items():
            self.writer.add_scalar(name, value, step)

    def end(self) -> None:
        self.writer.close()


@final
class WandB(Tracker):
    """A run of the project."""

    package = "wandb"

    def begin(self, name: str, config: dict[str, Any], step: int, previous: str | None) -> str:
        self.run.mkdir(parents=True, exist_ok=True)
        run_id = previous or uuid.uuid4().hex[:16]
        self.opened = self.library.init(
            project=PROJECT, name=name, config=config, dir=str(self.run), id=run_id, resume="allow"
        )
        return run_id

    def log(self, step: int, figures: Figures) -> None:
        self.opened.log(dict(figures), step=step)

    def end(self) -> None:
        self.opened.finish()


@final
class Trackio(Tracker):
    """A run of the project in Trackio's database, which knows it by its name: the run's, and a number."""

    package = "trackio"

    def begin(self, name: str, config: dict[str, Any], step: int, previous: str | None) -> str:
        run_id = previous or f"{name}-{uuid.uuid4().hex[:8]}"
        self.library.init(
            project=PROJECT, name=run_id, config=dict(leaves(config)), resume="must" if previous else "never"
        )
        return run_id

    def log(self, step: int, figures: Figures) -> None:
        self.library.log(dict(figures), step=step)

    def end(self) -> None:
        self.library.finish()


@final
class MLflow(Tracker):
    """A run of the experiment, where MLFLOW_TRACKING_URI says."""

    package = "mlflow"

    def begin(self, name: str, config: dict[str, Any], step: int, previous: str | None) -> str:
        self.library.set_experiment(PROJECT)
        opened = self.library.start_run(run_id=previous) if previous else self.library.start_run(run_name=name)
        if not previous:  # parameters of a run never change there
            self.library.log_params({key: str(value)[:500] for key, value in leaves(config)})
        return opened.info.run_id

    def log(self, step: int, figures: Figures) -> None:
        self.library.log_metrics(dict(figures), step=step)

    def end(self) -> None:
        self.library.end_run()


TRACKERS: dict[TrackerName, type[Tracker]] = {
    "tensorboard": TensorBoard, "wandb": WandB, "trackio": Trackio, "mlflow": MLflow,
}  # fmt: skip


@final
class Trackers:
    """Several trackers as one sink. ValueError: one is not installed; nothing is written before a training begins."""

    def __init__(self, names: tuple[TrackerName, ...], run: Path, others: list[Sink]) -> None:
        self.run, self.others = run, others
        self.idle: dict[TrackerName, Tracker] = {name: TRACKERS[name](run) for name in dict.fromkeys(names)}
        self.running: dict[TrackerName, Tracker] = {}

    def __call__(self, event: Event) -> None:
        if event["kind"] == "start":
            config = read_json(self.run / "config.json", "configuration")
            self.running = self.idle.copy()
            self._each(lambda tracker: tracker.open(event["name"], config, event["step"]))
        elif figures := figures_of(event):
            self._each(lambda tracker: tracker.record(event["kind"], event["step"], figures))

    def close(self) -> None:
        """End those that run."""
        self._each(lambda tracker: tracker.end())
        self.running = {}

    def _each(self, work: Callable[[Tracker], None]) -> None:
        """Do `work` with every tracker; one that fails is told and left out, for training must not end with it."""
        for name, tracker in list(self.running.items()):
            try:
                work(tracker)
            except Exception as error:  # each library, and the network behind it, raises its own
                del self.running[name]
                text = f"{name} has failed and is left out from here on ({one_line(error, 120)}); training goes on"
                tell(self.others, kind="warning", text=text)
