"""Losses written down once, per schedule and step: a change of mathematics, drawing or data order shows here.

Everything is computed in float64, so that the figures do not depend on the processor's instructions.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import tiny

from lrt.config.model import MEMORY_OFF, MemoryConfig, ModelConfig
from lrt.config.run import OptimConfig, RunConfig
from lrt.training.run_lock import RunLock
from lrt.training.session import Session
from lrt.training.trainer import prepare_data, resolve

STEPS = 8
CLIP = 0.5
"""Low enough that every schedule's gradients exceed it."""
GOLDEN = {
    "parallel": "5.549094 5.113366 4.323009 3.601058 3.043059 2.738061 2.475006 2.316367",
    "interleaved-2": "5.549075 5.090689 4.250781 3.568187 3.039484 2.760405 2.500487 2.335107",
    "interleaved-1..4": "5.549779 5.166594 4.408686 3.678408 3.096966 2.786356 2.521307 2.348051",
    "refinement-2:weights=0.1/0.3/0.6": "5.549808 5.167188 4.387698 3.670777 3.086078 2.784057 2.513989 2.343529",
    "chunked-8": "5.549572 5.173220 4.422277 3.704958 3.100377 2.766803 2.494451 2.329486",
    "settled-1..3": "5.549841 5.160722 4.370700 3.641821 3.060039 2.765695 2.492671 2.324062",
    "settled-1:detach": "5.549848 5.163761 4.378836 3.650713 3.065170 2.769315 2.496678 2.326603",
    "parallel@0.5,settled-1..2": "5.549492 5.176720 4.420840 3.703737 3.108223 2.784826 2.500115 2.329490",
}


def golden(schedule: str) -> list[float]:
    """The losses written down, a step each."""
    return [float(x) for x in GOLDEN[schedule].split()]


MEMORY = {"parallel": MEMORY_OFF, "interleaved-2": MemoryConfig(projection="shared")}


def configured(schedule: str, source: Path, clip: float | None = CLIP) -> RunConfig:
    memory = MEMORY.get(schedule, MemoryConfig(projection="layerwise"))
    base = RunConfig(model=ModelConfig(memory=memory), optim=OptimConfig(embedding_lr=0.1, clip=clip))
    short = replace(base, train=replace(base.train, length=32))
    return tiny(short, source, steps=STEPS, schedule=schedule, batch=4, eval_rows=1, log_every=1, micro_batch=2)


def losses(config: RunConfig, run: Path) -> list[float]:
    """The loss of every step of a training in float64."""
    said: list[dict] = []
    prepared = prepare_data(config.data)
    session = Session(resolve(config, prepared), RunLock(run), prepared, [said.append], None)
    session.model.double()
    session.optimizer.muon.dtype = torch.float64
    session.loop()
    return [e["loss"] for e in said if e["kind"] == "train"]


@pytest.mark.parametrize("schedule", GOLDEN)
def test_every_step_has_the_loss_written_down(schedule: str, source: Path, tmp_path: Path):
    assert losses(configured(schedule, source), tmp_path / "run") == pytest.approx(golden(schedule), abs=1e-5)


@pytest.mark.parametrize("schedule", GOLDEN)
def test_the_figures_would_show_that_gradients_are_not_clipped(schedule: str, source: Path, tmp_path: Path):
    unclipped = losses(configured(schedule, source, clip=None), tmp_path / "run")
    assert max(abs(a - b) for a, b in zip(unclipped, golden(schedule), strict=True)) > 1e-3
