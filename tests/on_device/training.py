"""Training, and what is measured."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import events, free_port, tiny

import lrt.training.session
from lrt.benchmarks.latency import latencies
from lrt.benchmarks.profile import parts
from lrt.benchmarks.training_step import SteppedModel, measure
from lrt.config.benchmarks import DecodingBenchmark, StepBenchmark
from lrt.config.recipes import cpu_demo
from lrt.experiments.runner import at_once
from lrt.training import checkpoint
from lrt.training.checkpoint import Writer
from lrt.training.logging import Jsonl
from lrt.training.trainer import train
from lrt.utils.distributed import join
from lrt.utils.hardware import accelerator, peak_flops, peak_memory, resolve_device, resolve_dtype, synchronise
from on_device.common import CONFIG, floats

ACROSS = {"float32": 1e-3, "bfloat16": 3e-2}
"""Relative difference of losses between devices, or ways of training, that rounding explains over a few steps."""

# Training.


def trained(source: Path, run: Path, device: torch.device, **training) -> list[float]:
    """Losses of a tiny training on a device."""
    base = tiny(cpu_demo(), source, steps=6, device=device.type, log_every=1, save_every=3, eval_rows=2, **training)
    train(base, run, sinks=[Jsonl(run / "metrics.jsonl")], resume=None)
    return [e["loss"] for e in events(run, "train")]


@floats
def test_training(kind: str, source: Path, tmp_path: Path, device: torch.device):
    """Batches in page-locked memory, steps, evaluation, sample and checkpoints: the same losses as on the CPU."""
    losses = [trained(source, tmp_path / on.type, on, dtype=kind) for on in {torch.device("cpu"), device}]
    assert all(len(x) == 6 and x[-1] < x[0] for x in losses)
    torch.testing.assert_close(losses[0], losses[-1], rtol=ACROSS[kind], atol=0)
    assert json.loads((tmp_path / device.type / "result.json").read_text())["peak_memory_bytes"] > 0


@floats
def test_compiled_training(kind: str, source: Path, tmp_path: Path, compiling: torch.device):
    """`train.compile` in a whole training."""
    plain, fast = (trained(source, tmp_path / str(c), compiling, dtype=kind, compile=c) for c in (False, True))
    torch.testing.assert_close(fast, plain, rtol=ACROSS[kind], atol=0)


def test_checkpoint_across_devices(source: Path, tmp_path: Path, device: torch.device):
    """What the device trained half-way the CPU ends, and the other way round."""
    cpu = torch.device("cpu")
    whole = trained(source, tmp_path / "whole", cpu)
    for name, first, second in (("out", device, cpu), ("back", cpu, device)):
        run = tmp_path / name
        trained(source, run, first)
        shutil.rmtree(checkpoint.checkpoints(run)[-1])
        (run / "metrics.jsonl").unlink()
        loaded = checkpoint.load_model(run, second)
        assert loaded.step == 3 and loaded.model.device.type == second.type
        torch.testing.assert_close(trained(source, run, second), whole[3:], rtol=1e-3, atol=0)


class Late(Writer):
    """Writes in the background, and no sooner than it must: after the steps that come next."""

    def __init__(self, _: bool):
        super().__init__(background=True)
        self.due: threading.Event | None = None

    def submit(self, work: Callable[[], None]) -> None:
        self.wait()
        due = threading.Event()
        super().submit(lambda: work() if due.wait(60) else None)
        self.due = due

    def wait(self) -> None:
        if self.due is not None:
            self.due.set()
            self.due = None
        super().wait()


def test_background_saving(source: Path, tmp_path: Path, device: torch.device, monkeypatch):
    """A checkpoint written beside the next steps holds the weights of its own step."""
    weights = []
    for writer in (lambda _: Writer(False), Late):
        monkeypatch.setattr(lrt.training.session, "Writer", writer)
        run = tmp_path / str(len(weights))
        trained(source, run, device, keep=3)
        weights.append(checkpoint.open_checkpoint(checkpoint.checkpoints(run)[0]).weights())
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-5, atol=1e-6)


@floats
@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_process_group_of_one(mode: str, kind: str, source: Path, tmp_path: Path, device: torch.device, monkeypatch):
    """DDP and FSDP2 on one device, over nccl on cuda, lose what a plain process does."""
    if device.type == "mps":
        pytest.skip("no process group on mps")
    expected = trained(source, tmp_path / "alone", device, dtype=kind)
    launched = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    launched["MASTER_PORT"] = str(free_port())
    for name, value in launched.items():
        monkeypatch.setitem(os.environ, name, value)
    with join(device.type) as world:
        assert world.grouped and world.device.type == device.type
        losses = trained(source, tmp_path / mode, device, parallel=mode, dtype=kind)
    torch.testing.assert_close(losses, expected, rtol=ACROSS[kind], atol=0)


# What is measured.


def test_hardware(device: torch.device):
    assert resolve_device(device.type) == device
    if device.type == "cuda":
        assert resolve_device("auto").type == "cuda" and at_once() == 1
    assert resolve_dtype("auto", device) in ("bfloat16", "float32")
    most, source = peak_flops(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    assert most > 1e8 and source
    synchronise(device)
    assert bool(accelerator()) == torch.cuda.is_available()
    assert peak_memory(device) > 0


def test_benchmarks(device: torch.device):
    """`lrt bench train` with its division of a step, and the latencies of `lrt bench decode`, at tiny sizes."""
    tiny_step = StepBenchmark(
        device=device.type, depth=2, width=32, vocab_size=64, batch=2, length=32, repeats=1, memory=False,
        schedules=("interleaved-2",),
    )  # fmt: skip
    plain, interleaved = measure(tiny_step)["rows"]
    assert plain["mfu"] > 0 and interleaved["ratio"] > 0
    if device.type != "mps":
        stepped = SteppedModel(tiny_step, "interleaved-2")
        assert parts(stepped.step, stepped.model)["attention"] > 0
    settings = DecodingBenchmark(batches=(2,), contexts=(16,), steps=2, compile=False)
    (cell,) = latencies(replace(CONFIG, context=64), device, settings)
    assert cell["ms"] > 0
