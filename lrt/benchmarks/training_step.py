"""What a training step of every schedule costs beside the plain transformer's, and beside its ideal.

All rows are timed in turns in one process, a plain step before and after every other: a ratio compares neighbours in
time, so that whatever else the machine does falls on both. Peak memory is taken from a fresh process per row.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from statistics import median
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from lrt.benchmarks.peer import PEER, nanochat
from lrt.benchmarks.profile import parts
from lrt.config.benchmarks import StepBenchmark
from lrt.config.model import MEMORY_OFF, Execution, MemoryConfig, ModelConfig
from lrt.config.recipes import recipe as find_recipe
from lrt.config.run import OptimConfig
from lrt.data.loader import BatchShape, Loader, RowSource
from lrt.model.flops import passes_flops
from lrt.model.loss import ScheduledLoss
from lrt.model.lrt import LRT
from lrt.passes import Passes, effective_cost
from lrt.schedule import Schedule
from lrt.training.budget import block_shares
from lrt.training.optimizer import Optimizer, clip
from lrt.utils.hardware import keep_freed_memory, peak_flops, peak_memory, resolve_device, resolve_dtype, synchronise

Timing = tuple[float, float]
"""Seconds of forward and backward, and of the whole step."""
LossOf = Callable[[Tensor, Tensor, Tensor], Tensor]
"""The loss of tokens, targets and starts."""
PLAIN = "plain"


def shape(settings: StepBenchmark) -> tuple[ModelConfig, int]:
    """The LRT's configuration and the length of a row."""
    if settings.recipe is None:
        memory = MemoryConfig(projection="shared")
        base, length = ModelConfig(depth=4, vocab_size=4096, context=512, memory=memory), 512
    else:
        base_recipe = find_recipe(settings.recipe)
        base, length = base_recipe.model, base_recipe.train.length
    length = settings.length or length
    sizes = {"depth": settings.depth, "width": settings.width, "vocab_size": settings.vocab_size}
    chosen = {name: size for name, size in sizes.items() if size is not None}
    return replace(base, context=max(base.context, length), **chosen), length


class SteppedModel:
    """A model under test: training steps of one schedule on random tokens, as `lrt.training.session` takes them."""

    def __init__(self, settings: StepBenchmark, name: str):
        config, length = shape(settings)
        self.config = replace(config, memory=MEMORY_OFF) if name in (PLAIN, PEER) else config
        self.device = resolve_device(settings.device)
        self.dtype = getattr(torch, resolve_dtype(settings.dtype, self.device))
        self.schedule = Schedule.parse("parallel" if name in (PLAIN, PEER) else name)
        noise = RandomTokens(self.config.vocab_size, 4 * settings.batch * length + 1)
        self.loader = Loader(noise, BatchShape(batch=settings.batch, length=length, bos=0, seed=0))
        self.steps = 0
        self.passes = self.schedule.passes(length)
        self.loss, self.update = self._peer() if name == PEER else self._ours(settings)

    def _ours(self, settings: StepBenchmark) -> tuple[LossOf, Callable[[], None]]:
        loss = ScheduledLoss(LRT(self.config, self.device), self.schedule)
        loss.model.execution = Execution(
            attention=settings.attention, recompute=settings.recompute, compile=settings.compile
        )
        optimizer = Optimizer(loss.model, OptimConfig(), self.dtype)
        self.model = loss.model

        def update() -> None:
            clip(loss.model.parameters(), 1.0)
            optimizer.step(0.0)

        return lambda tokens, targets, starts: loss(tokens, targets, starts).loss, update

    def _peer(self) -> tuple[LossOf, Callable[[], None]]:
        model = nanochat(self.config, self.device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0, fused=True)

        def update() -> None:
            optimizer.step()
            optimizer.zero_grad()

        return (
            lambda tokens, targets, _: model(tokens, shift_labels=targets, labels=targets, use_cache=False).loss,
            update,
        )

    def step(self) -> Timing:
        """One step; the weights stay (rate 0), the work is the same."""
        start = self._clock()
        with torch.profiler.record_function("data"):
            tokens, targets, starts = (x.to(self.device, non_blocking=True) for x in self.loader.batch(self.steps))
        ready = self._clock()
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            loss = self.loss(tokens, targets, starts)
        loss.backward()
        done = self._clock()
        with torch.profiler.record_function("optimizer"):
            self.update()
        self.steps += 1
        return done - ready, self._clock() - start

    def _clock(self) -> float:
        synchronise(self.device)
        return time.perf_counter()

    @property
    def flops(self) -> int:
        """Of forward and backward over a batch, every pass counted."""
        return passes_flops(self.config, self.passes) * self.loader.batch(0).tokens.shape[0]


class RandomTokens(RowSource):
    """An endless supply of nothing in particular, for the loader."""

    def __init__(self, vocab_size: int, size: int):
        self.ids = np.random.default_rng(0).integers(1, vocab_size, size)

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Ids start..stop-1."""
        return self.ids[start:stop]


def ideal(passes: Passes, source: float = 1.0, below: float = 0.0) -> float:
    """Cost over the plain step's if nothing but token forwards counted, as `effective_cost` weighs them."""
    return effective_cost(passes, source, below) / passes[0].positions.stop


def measure(settings: StepBenchmark) -> dict[str, Any]:
    """Everything, as plain data: the object that `--json` prints."""
    names = (PLAIN, *([PEER] if settings.peer else []), *settings.schedules)
    peaks = (
        {name: peak(settings, name) for name in names} if settings.memory else {}
    )  # first, while this process is small
    if resolve_device(settings.device).type == "cpu":
        keep_freed_memory()  # as training does
    models = {name: SteppedModel(settings, name) for name in names}
    first = {name: model.step()[0] for name, model in models.items()}
    times = interleave({name: model.step for name, model in models.items()}, settings.repeats)
    rows = [row(name, models[name], times[name], settings, peaks) for name in names]
    plain = models[PLAIN]
    most, source = peak_flops(plain.device, plain.dtype)
    for r in rows:
        r["mfu"] = r["flops_per_second"] / most
        if settings.compile:
            r["first_seconds"] = first[r["schedule"]]
        if settings.profile and r["schedule"] != PEER:
            r["parts"] = parts(models[r["schedule"]].step, models[r["schedule"]].model)
    c, length = plain.config, plain.loader.batch(0).tokens.shape[1]
    return {
        "device": str(plain.device), "dtype": str(plain.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__, "depth": c.depth, "width": c.d, "vocab_size": c.vocab_size, "batch": settings.batch,
        "length": length, "compile": settings.compile, "attention": settings.attention,
        "recompute": settings.recompute, "repeats": settings.repeats,
        "peak_flops": most, "peak_flops_source": source, "rows": rows,
    }  # fmt: skip


def interleave(works: dict[str, Callable[[], Timing]], repeats: int) -> dict[str, list[tuple[Timing, Timing]]]:
    """Each work's timings, each with the mean of the plain step's right before and after it, from `repeats` rounds."""
    times: dict[str, list[tuple[Timing, Timing]]] = {name: [] for name in works}
    before = works[PLAIN]()
    for name in [name for _ in range(repeats) for name in works]:
        timing = works[name]()
        if name == PLAIN:
            times[name].append((timing, timing))
            before = timing
            continue
        after = works[PLAIN]()
        times[name].append((timing, ((before[0] + after[0]) / 2, (before[1] + after[1]) / 2)))
        before = after
    return times


def row(
    name: str,
    model: SteppedModel,
    times: list[tuple[Timing, Timing]],
    settings: StepBenchmark,
    peaks: dict[str, dict[str, float]],
) -> dict[str, Any]:
    """One schedule's figures. Ratios are medians over the repeats; `ms` is forward and backward."""
    seconds, step = (median(t[i] for t, _ in times) for i in range(2))
    ratio, step_ratio = (median(t[i] / p[i] for t, p in times) for i in range(2))
    least = ideal(model.passes, *block_shares(model.config))
    tokens = model.loader.batch(0).tokens.numel()
    return {
        "schedule": name, "ms": 1e3 * seconds, "ratio": ratio, "ideal": least, "ratio_over_ideal": ratio / least,
        "step_ms": 1e3 * step, "step_ratio": step_ratio, "tokens_per_second": tokens / step,
        "flops_per_second": model.flops / seconds,
    } | peaks.get(name, {})  # fmt: skip


def peak(settings: StepBenchmark, name: str) -> dict[str, float]:
    """Peak memory of two steps in a fresh process, in MB (2^20 bytes); `idle_mb` is what it held before the first."""
    freed_at_once = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # else glibc keeps freed memory, more or less of it by chance
    fresh = multiprocessing.get_context("spawn")
    with mock.patch.dict(os.environ, freed_at_once), ProcessPoolExecutor(1, fresh) as pool:
        most, before = pool.submit(_peak, settings, name).result()
    return {"peak_mb": most / 2**20, "idle_mb": before / 2**20}


def _peak(settings: StepBenchmark, name: str) -> tuple[int, int]:
    model = SteppedModel(settings, name)
    before = peak_memory(model.device)
    for _ in range(2):
        model.step()
    return peak_memory(model.device), before


def lines(result: dict[str, Any]) -> list[str]:
    """The result as a table for people."""
    setting = "depth {depth}, width {width}, vocabulary {vocab_size}, batch {batch} x {length}, {device} {dtype}"
    out = [setting.format(**result) + f", {result['threads']} threads{', compiled' if result['compile'] else ''}"]
    out.append(
        f"{'schedule':<16}{'fwd+bwd ms':>11}{'ratio':>7}{'/ideal':>8}{'step ms':>10}{'ratio':>7}"
        f"{'tokens/s':>10}{'GFLOP/s':>9}{'MFU':>7}{'peak MB':>9}"
    )
    for r in result["rows"]:
        out.append(
            f"{r['schedule']:<16}{r['ms']:>11.1f}{r['ratio']:>7.3f}{r['ratio_over_ideal']:>8.3f}{r['step_ms']:>10.1f}"
            f"{r['step_ratio']:>7.3f}{r['tokens_per_second']:>10,.0f}{r['flops_per_second'] / 1e9:>9.1f}"
            f"{r['mfu']:>7.1%}{r.get('peak_mb', float('nan')):>9.0f}"
        )
    for r in result["rows"]:
        if "parts" in r:
            out.append(f"{r['schedule']:<16}" + "  ".join(f"{part} {ms:.1f} ms" for part, ms in r["parts"].items()))
    return out
