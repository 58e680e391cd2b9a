"""A run one step away from its initialisation, and its checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

from helpers import config, packed

from lrt.config.run import RunConfig, TrainConfig
from lrt.model.loss import ScheduledLoss
from lrt.model.lrt import LRT
from lrt.schedule import Schedule
from lrt.training import checkpoint
from lrt.training.checkpoint import META, OPTIMIZER, save, write_json
from lrt.training.optimizer import Optimizer
from lrt.utils.checksums import SUMS, file_hash, sums_text

RUN = RunConfig(model=config(), train=TrainConfig(length=8, schedule="interleaved-2"))
EXTRA = {"data": "abc", "progress": {"step": 3}, "bpb": None}


def trained() -> tuple[LRT, Optimizer]:
    """A model one step away from its initialisation, and its optimizer."""
    model = LRT(RUN.model)
    optimizer = Optimizer(model, RUN.optim)
    ids = packed(RUN.model, 2, 8)
    ScheduledLoss(model, Schedule.parse("interleaved-2"))(ids, ids.roll(-1, 1)).loss.backward()
    optimizer.step(1.0)
    return model, optimizer


MODEL_NOW, OPTIMIZER_NOW = trained()


def saved(run: Path, step: int = 3, keep: int = 2) -> Path:
    return save(run, step, RUN, MODEL_NOW, OPTIMIZER_NOW.state(), extra=EXTRA, keep=keep)


def names(run: Path) -> list[int]:
    return [int(p.name.removeprefix("step_")) for p in checkpoint.checkpoints(run)]


def edit(file: Path, **changes) -> None:
    write_json(file, json.loads(file.read_text()) | changes)
    resum(file)


def resum(file: Path) -> None:
    """Make SHA256SUMS fit a description that was changed: what is then refused is refused for what it says."""
    sums = json.loads(file.read_text())["sha256"]
    if (file.parent / SUMS).exists() and sums and isinstance(sums.get(OPTIMIZER), str):
        (file.parent / SUMS).write_text(sums_text(sums | {META: file_hash(file)}))
