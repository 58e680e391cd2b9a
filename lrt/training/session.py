"""One training process: the model, its optimizer, and where it stands; its loop is read from top to bottom."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lrt.config.decoding import SamplingParams
from lrt.config.run import RunConfig, to_dict
from lrt.data.loader import Batch, BatchShape, prefetch
from lrt.data.mixture import Mixture
from lrt.data.prepare import Prepared
from lrt.data.run_tokens import RunTokens, recorded
from lrt.data.synthetic import TaskRows, batches
from lrt.evaluation.bits_per_byte import BPB, evaluate, held_out_name, of_split, validation_rows
from lrt.evaluation.score_names import unit
from lrt.inference.chat import complete
from lrt.model.flops import parameters_by_group
from lrt.model.loss import LossOutput, ScheduledLoss, step_plan
from lrt.model.lrt import LRT
from lrt.schedule import Curriculum
from lrt.training import checkpoint
from lrt.training.adaptive import Settling, restored
from lrt.training.budget import Progress, horizon
from lrt.training.checkpoint import Checkpoint, Writer
from lrt.training.faults import Skips, Stop, finite, not_finite
from lrt.training.logging import Sink, tell
from lrt.training.optimizer import Optimizer, clip, memory_rate, rate
from lrt.training.parallel import Parallel
from lrt.training.run_lock import RunLock
from lrt.training.step_figures import StepFigures
from lrt.utils.distributed import World
from lrt.utils.dtensor import whole
from lrt.utils.files import write_json, write_sealed
from lrt.utils.hardware import keep_freed_memory, peak_flops, peak_memory
from lrt.utils.require import require

SAMPLE_TOKENS = 120


@dataclass(frozen=True)
class Result:
    """A finished training."""

    model: LRT
    prepared: Prepared
    progress: Progress
    bpb: BPB
    first: bool = True
    """Whether this is the process that reports, of those that torchrun started."""


class Session:
    """One training process: the model, its optimizer, and where it stands."""

    def __init__(
        self,
        config: RunConfig,
        lock: RunLock,
        prepared: Prepared,
        sinks: Sequence[Sink],
        started: Checkpoint | None,
        *,
        world: World | None = None,
    ):
        t = config.train
        self.config, self.lock, self.prepared, self.sinks = config, lock, prepared, sinks
        self.run = lock.run
        self.world = world = world or World(torch.device(t.device))
        self.device, self.steps = world.device, horizon(config)
        if self.device.type == "cpu":
            keep_freed_memory()
        bos = prepared.tokenizer.bos
        shape = BatchShape(batch=t.batch, length=t.length, bos=bos, seed=t.seed, rank=world.rank, world=world.size)
        self.loader = batches(prepared.train, shape)
        rows = validation_rows(prepared.val, prepared.tokenizer, rows=t.eval_rows, length=t.length)
        tokens = None if started is None else RunTokens.of(started.extra)
        text = held_out_name(config.data, tokens is not None and tokens.changed(config.data))
        self.held_out = of_split(prepared.val, rows, text, prepared.normalised)
        with torch.device("meta"):
            self.model = LRT(config.model)
        self.model.execution = t.execution
        self.plan = replace(Curriculum.parse(t.schedule), steps=self.steps)
        self.loss = ScheduledLoss(self.model, self.plan, t.seed, t.consistency)
        self.parallel = Parallel(self.loss, world, t.parallel, t.seed, t.reshard)
        if t.init_from is not None and started is None:
            self._begin_from(Path(t.init_from))
        self.dtype = torch.bfloat16 if t.dtype == "bfloat16" else torch.float32
        self.optimizer = Optimizer(self.model, config.optim, self.dtype)
        self.progress, self.settling, self.stop = Progress(), Settling(), Stop()
        self.bpb, self.scored = None, -1
        self.resumed, self.stepped = started is not None, False
        self.saved_at = time.monotonic()
        if started is not None:
            self._restore(started)
        self.skips, self.told_skipped = Skips(self.progress.skipped, self.device), self.progress.skipped
        self.logged_flops = self.progress.flops
        self.saved, self.writer = self.progress.step if started else -1, Writer(self.device.type == "cuda")
        self.peak, self.peak_source = peak_flops(self.device, self.dtype)
        self.begun = replace(self.progress)
        self._begin()

    def _begin(self) -> None:
        self.world.agree(self._take_folder)
        if self.progress.step == self.steps:  # a finished run: there is nothing to say
            return
        groups = parameters_by_group(self.config.model)
        tell(
            self.sinks, kind="start", name=self.config.name, run=str(self.run),
            step=self.progress.step, steps=self.steps, processes=self.world.size,
            parameters=groups | {"total": sum(groups.values())}, schedule=self.config.train.schedule,
            device=str(self.device), dtype=self.config.train.dtype, peak_flops=self.peak, peak_source=self.peak_source,
            text_read=self._text_read(),
        )  # fmt: skip

    def _text_read(self) -> list[float]:
        """How many times the training reads each of its sources; none of a task, which has no end."""
        stream, tokens = self.prepared.train, self.steps * self.config.train.batch * self.config.train.length
        if isinstance(stream, TaskRows):
            return []
        mixed = isinstance(stream, Mixture)
        parts = zip(stream.streams, stream.weights, strict=True) if mixed else [(stream, 1.0)]
        return [tokens * weight / len(part) for part, weight in parts]

    def _take_folder(self) -> None:
        self.run.mkdir(parents=True, exist_ok=True)
        self.lock.take()
        begun = self.resumed or not checkpoint.checkpoints(self.run)
        require(begun, f"{self.run} was trained meanwhile by another process; continue it with --resume {self.run}")
        write_json(self.run / "config.json", to_dict(self.config))
        if not self.resumed:
            self.prepared.tokenizer.save(self.run / "tokenizer")

    def _begin_from(self, run: Path) -> None:
        """Take over the weights of another run of the same model; its context may differ."""
        source, mine = checkpoint.open_checkpoint(run), self.config.model
        theirs = replace(source.config.model, context=mine.context, bos=mine.bos)
        require(theirs == mine, f"{run} is of another model than this config's; leave the model's flags to --init-from")
        checkpoint.load_weights(self.model, source.weights())

    def _restore(self, started: Checkpoint) -> None:
        data, hash_now = started.extra.get("data"), self.prepared.train.hash
        require(
            data == hash_now,
            f"{started.folder} was trained on other tokens than {self.prepared.folder}; restore its data",
        )
        checkpoint.load_weights(self.model, started.weights())
        self.optimizer.load(started.optimizer_state())
        spent: Any = started.extra.get("progress")
        names = {f.name for f in fields(Progress)}
        fine = (
            isinstance(spent, dict) and set(spent) == names and all(isinstance(x, (int, float)) for x in spent.values())
        )
        require(fine, f"{started.folder / checkpoint.META} does not say what was spent; resume an earlier checkpoint")
        self.progress = Progress(**spent)
        self.bpb, self.scored = restored_bpb(started.extra.get("bpb")), self.progress.step
        self.settling = restored(started.extra.get("settling"), self.plan, str(started.folder / checkpoint.META))

    def loop(self) -> None:
        """Run the steps that are left, with logs, evaluations and checkpoints on the way.

        Whatever ends them, nothing is read or written in the background any more: another process may go on.
        """
        steps = prefetch(self.loader, self.progress.step, self.steps, pin=self.device.type == "cuda")
        try:
            with self.stop.listening(), contextlib.closing(steps) as ready:
                self._run(ready)
            self.writer.wait()
        except BaseException:
            if problem := self.writer.settle():
                with contextlib.suppress(OSError):
                    tell(self.sinks, kind="warning", text=f"a checkpoint was not written: {problem}")
            raise

    def _run(self, ready: Iterable[Batch]) -> None:
        """A step for each batch, and what is due after it."""
        t = self.config.train
        figures = StepFigures()
        clock, cpu = time.perf_counter(), time.process_time()
        for batch in ready:
            out, norm = self.step(batch)
            self.stepped = True
            self.lock.require_place()
            now, worked = time.perf_counter(), time.process_time()
            spent = max(0.0, now - clock)
            self.progress.count(self.config, out.passes, spent, max(0.0, worked - cpu))
            figures.add(out, spent)
            done, last = self.progress.step, self.progress.step == self.steps
            logged = done % t.log_every == 0 or last
            if logged:
                self._check(batch)
                self._log(figures, norm)
                figures = StepFigures()
            if last or (t.eval_every and done % t.eval_every == 0):
                self.evaluate()
            if last or (t.save_every and done % t.save_every == 0) or self._overdue(logged):
                self.save()
            if (logged or self.world.size == 1) and self.world.any(bool(self.stop.signal)):
                self._leave()
            clock, cpu = time.perf_counter(), time.process_time()

    def _overdue(self, logged: bool) -> bool:
        """Whether the last checkpoint is `train.save_minutes` old; several processes agree on it when they log."""
        minutes = self.config.train.save_minutes
        if not minutes or not (logged or self.world.size == 1):
            return False
        return self.world.any(time.monotonic() - self.saved_at >= 60 * minutes)

    def step(self, batch: Batch) -> tuple[LossOutput, Tensor]:
        """One optimizer step, skipped unless loss and gradient are finite; the step's losses (nan where it was skipped)
        and the gradient norm.
        """
        out, norm = self.gradients(batch)
        skip = ~(out.loss.isfinite() & norm.isfinite())
        self.skips.add(skip)
        when = (self.progress.step, self.steps, self.config.optim)
        self.optimizer.step(rate(*when), skip, memory_rate(*when))
        self.settling = self.settling.follow(self.plan, self.progress.step, lambda: out.consistency.sqrt().item())
        return out._replace(loss=out.loss.masked_fill(skip, math.nan)), norm

    def gradients(self, batch: Batch) -> tuple[LossOutput, Tensor]:
        """The step's losses over all processes, and the gradient's norm before it was clipped.

        Accumulated over micro-batches; means run over the whole batch's targets, wherever they are.
        """
        t, step, world = self.config.train, self.progress.step, self.world
        tokens, targets, starts = (x.to(self.device, non_blocking=True) for x in batch)
        passes = self.settling.draw(self.plan, t.seed, step).passes(tokens.shape[1])
        plan = step_plan(targets, starts, passes)
        plan = plan._replace(counts=world.total(plan.counts))
        size, total = t.micro_batch or len(tokens), []
        out = None
        for i in range(0, len(tokens), size):
            part = slice(i, i + size)
            with self.parallel.accumulate(last=i + size >= len(tokens)):
                with self._autocast():
                    out = self.parallel.module(tokens[part], targets[part], starts[part], step, plan)
                (out.loss * world.size).backward()  # gradients are averaged over processes
            total.append(torch.cat((out.loss.detach()[None], out.consistency[None], out.per_pass)))
        assert out is not None
        self.parallel.collect()
        norm = clip(self.parallel.parameters, self.config.optim.clip)
        loss, consistency, *per_pass = world.total(torch.stack(total).sum(0))
        return out._replace(loss=loss, consistency=consistency, per_pass=torch.stack(per_pass)), norm

    def _autocast(self) -> torch.autocast:
        lower = self.dtype != torch.float32  # and no weight is kept twice where each is given back after use
        return torch.autocast(self.device.type, self.dtype, lower, cache_enabled=not self.config.train.reshard)

    def _check(self, batch: Batch) -> None:
        """Say which steps were skipped; ValueError with a diagnosis if too many were in a row."""
        self.progress.skipped, _, row = self.skips.read()
        if self.progress.skipped > self.told_skipped:
            tell(
                self.sinks, kind="warning", step=self.progress.step,
                text=f"{self.progress.skipped - self.told_skipped} steps up to {self.progress.step} skipped (loss or "
                f"gradient not finite), {self.progress.skipped} in all",
            )  # fmt: skip
        self.told_skipped = self.progress.skipped
        if row < self.config.train.max_skipped:
            return
        out, _ = self.gradients(batch)
        cause = not_finite(self.model, out.per_pass, self.world)
        self.writer.wait()
        raise ValueError(
            f"{row} steps in a row up to step {self.progress.step} had no finite loss and gradient: they were skipped; "
            f"{cause}; {self._last_good()}: lower optim.matrix_lr or the other rates, or look at the text there"
        )

    def _last_good(self) -> str:
        good = checkpoint.checkpoints(self.run)
        return f"the last good checkpoint is {good[-1] if good else 'none yet'}"

    def _leave(self) -> None:
        self.save()
        self.writer.wait()
        tell(
            self.sinks, kind="warning", text=f"stopped at step {self.progress.step}; continue with --resume {self.run}"
        )
        self.stop.leave()

    def _log(self, figures: StepFigures, norm: Tensor) -> None:
        """Say what the steps since the last time were like; the time left is at the speed of this process."""
        t, p = self.config.train, self.progress
        seconds = max(figures.seconds, 1e-9)  # the clock of a suspended machine may stand still
        speed = figures.steps * t.batch * t.length / seconds
        flops = (p.flops - self.logged_flops) / seconds
        self.logged_flops = p.flops
        a_step = (p.seconds - self.begun.seconds) / (p.step - self.begun.step)
        tell(
            self.sinks, kind="train", step=p.step, steps=self.steps, **figures.means(), gradient_norm=norm.item(),
            rate=rate(p.step - 1, self.steps, self.config.optim),
            tokens=p.tokens, token_forwards=p.token_forwards, effective_forwards=p.effective_forwards, flops=p.flops,
            seconds=p.seconds, tokens_per_second=speed, flops_per_second=flops,
            mfu=flops / self.peak / self.world.size, skipped=p.skipped, seconds_left=(self.steps - p.step) * a_step,
        )  # fmt: skip

    def evaluate(self) -> BPB:
        """BPB in every mode on the validation rows, a sample, and a warning when the live gap opens."""
        p, gap = self.progress, self.config.train.gap_warning
        rows = f"step {p.step:,}: {len(self.held_out.rows.tokens)} rows, in parallel and token by token"
        tell(self.sinks, kind="stage", what="evaluation", text=rows)
        with self.parallel.gathered():
            self.bpb = bpb = evaluate(self.model, self.loss.schedule, self.held_out, world=self.world)
            # On every process: under fsdp they gather together. Weights that are not finite say nothing.
            text = self.sample() if math.isfinite(bpb.decoded) else ""
        self.scored = p.step
        spent = {"step": p.step, "tokens": p.tokens, "effective_forwards": p.effective_forwards, "seconds": p.seconds}
        tell(self.sinks, kind="eval", **spent, bpb=bpb.as_dict())
        if bpb.live_gap > gap:
            tell(
                self.sinks, kind="warning", step=p.step,
                text=f"live gap {bpb.live_gap:.3f} {unit(bpb.as_dict())} at step {p.step}: decoding is worse than the "
                "training graph says; settle the memory before the loss (train.schedule settled-1..3)",
            )  # fmt: skip
        tell(self.sinks, kind="sample", step=p.step, text=text)
        return bpb

    def sample(self) -> str:
        """A short document, decoded with memory at temperature 0.8; nothing where the logits draw no token."""
        room = min(SAMPLE_TOKENS, self.config.model.context - 1)
        sampling = SamplingParams(max_new_tokens=room, temperature=0.8, seed=self.config.train.seed)
        try:
            return "".join(complete(self.model, self.prepared.tokenizer, "", sampling))
        except ValueError:  # logits that are not finite: what ends the training says so
            return ""

    def save(self) -> None:
        """Write a checkpoint of this moment, unless it stands there already; on cuda in the background.

        Not while steps are being skipped, or if a step has just made weights that are not finite.
        """
        p, t = self.progress, self.config.train
        p.skipped, row, _ = self.skips.read()
        if self.saved == p.step or row or self.world.any(not finite(self.model)):
            return
        self.saved, self.saved_at = p.step, time.monotonic()
        bpb = self.bpb.as_dict() if self.bpb and self.scored == p.step else None
        extra: dict[str, Any] = {"progress": dict(vars(p)), "bpb": bpb, "settling": dict(vars(self.settling))}
        extra |= recorded(self.prepared, self.run)
        weights, optimizer = self._snapshot(self.model.state_dict()), self._snapshot(self.optimizer.state())

        def write() -> None:
            step = extra["progress"]["step"]
            folder = checkpoint.save(self.run, step, self.config, weights, optimizer, extra=extra, keep=t.keep)
            tell(self.sinks, kind="checkpoint", step=step, folder=str(folder))

        if self.world.first:
            self.writer.submit(write)

    def _snapshot(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Whole tensors on the CPU, on the first process alone; copies where training goes on meanwhile."""
        gathered = ((name, whole(x).detach()) for name, x in tensors.items())
        copied = {name: x.to("cpu", copy=self.writer.background) for name, x in gathered if self.world.first}
        return copied

    def finish(self) -> Result:
        """Write the final evaluation to result.json and hand everything over."""
        bpb = self.bpb or self.evaluate()
        self.lock.require_place()
        require(
            math.isfinite(bpb.decoded) and not self.world.any(not finite(self.model)),
            f"{self.run} ended at step {self.progress.step} with weights or logits that are not finite: nothing can be "
            f"scored or decoded; {self._last_good()}: lower optim.matrix_lr or the other rates",
        )
        result = {"name": self.config.name, "progress": vars(self.progress), "bpb": bpb.as_dict()}
        result["peak_memory_bytes"] = peak_memory(self.device)
        if self.world.first and not (self.resumed and not self.stepped and (self.run / "result.json").exists()):
            write_sealed(self.run / "result.json", result)
        return Result(self.model.eval(), self.prepared, self.progress, bpb, self.world.first)


def restored_bpb(stored: Any) -> BPB | None:
    """The evaluation that a checkpoint holds; None where there is none, or it lacks a figure (null, once NaN)."""
    if not isinstance(stored, dict) or any(x is None for name, x in stored.items() if name != "share"):
        return None
    values: dict[str, Any] = {
        name: tuple(x) if isinstance(x, list) else x for name, x in stored.items() if name != "live_gap"
    }
    return BPB(**values) if values.keys() == {f.name for f in fields(BPB)} else None
