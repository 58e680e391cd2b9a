"""Training: one loop, read from top to bottom. What it has to say goes to sinks, as plain dictionaries."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lrt import accounting, checkpoint
from lrt.checkpoint import Checkpoint
from lrt.config import RunConfig, to_dict
from lrt.data import Batch, Loader, Prepared, prefetch, prepare
from lrt.evals.bpb import BPB, Rows, evaluate, validation_rows
from lrt.hardware import keep_freed_memory, peak_flops, resolve_device, resolve_dtype
from lrt.loss import LossOutput, ScheduledLoss, targets_per_pass
from lrt.model import LRT
from lrt.model_config import require
from lrt.optim import Optimizer, clip, rate
from lrt.sampling import Sampling
from lrt.schedule import NO_GRAD_COST, Passes, Schedule, effective_forwards
from lrt.text import complete

Sink = Callable[[dict[str, Any]], None]
"""Receives events: `{"kind": "prepare" | "start" | "train" | "eval" | "sample" | "warning" | "checkpoint", ...}`."""

SAMPLE_TOKENS = 120


@dataclass
class Progress:
    """What has been spent so far; stored in checkpoints."""

    step: int = 0
    tokens: int = 0
    token_forwards: float = 0.0
    """Tokens times passes, all weighted 1."""
    effective_forwards: float = 0.0
    """The same with passes without gradient weighted 1/3."""
    flops: float = 0.0
    seconds: float = 0.0
    """Spent training; evaluation, samples and checkpoints not counted."""

    def count(self, config: RunConfig, passes: Passes, seconds: float) -> None:
        """Add one step over `passes`."""
        rows = config.train.batch
        self.step += 1
        self.tokens += rows * config.train.length
        self.token_forwards += rows * sum(len(p.positions) for p in passes)
        self.effective_forwards += rows * sum(len(p.positions) * (1.0 if p.grad else NO_GRAD_COST) for p in passes)
        self.flops += rows * accounting.passes_flops(config.model, passes)
        self.seconds += seconds


@dataclass(frozen=True)
class Result:
    """A finished training."""

    model: LRT
    prepared: Prepared
    progress: Progress
    bpb: BPB


def horizon(config: RunConfig) -> int:
    """Optimizer steps from steps, tokens, R or an effective-compute budget that counts every pass."""
    t = config.train
    kind, number = t.horizon_parts()
    if kind == "steps":
        return max(1, round(number))
    tokens = number if kind == "tokens" else number * accounting.scaling_parameters(config.model)
    if kind == "compute":
        tokens /= effective_forwards(Schedule.parse(t.schedule), t.length)
    return max(1, round(tokens / (t.batch * t.length)))


def resolve(config: RunConfig, prepared: Prepared) -> RunConfig:
    """The configuration with everything that depends on data and machine filled in: what is stored and resumed.

    A model that starts from another's weights keeps its vocabulary, which may be larger than the tokenizer's.
    """
    device, known = resolve_device(config.train.device), prepared.tokenizer.vocab_size
    size = config.model.vocab_size if config.train.init_from else known
    require(known <= size, f"the tokenizer has {known} tokens, the model only {size}; use the tokenizer it came with")
    prepared.tokenizer.widen(size)
    model = replace(config.model, vocab_size=size, bos=prepared.tokenizer.bos)
    train = replace(config.train, device=device.type, dtype=resolve_dtype(config.train.dtype, device))
    return replace(config, model=model, train=train)


def prepare_data(config: RunConfig, sinks: Sequence[Sink]) -> Prepared:
    """Tokenise the source, or reuse what an earlier run has prepared."""

    def report(done: int, total: int | None, note: str) -> None:
        tell(sinks, kind="prepare", done=done, total=total, note=note)

    d = config.data
    return prepare(
        source=d.source, text_column=d.text_column, subset=d.subset, split=d.split, tokenizer=d.tokenizer,
        vocab_size=d.vocab_size, validation=d.validation, max_bytes=d.max_bytes, folder=Path(d.folder), progress=report,
    )  # fmt: skip


def train(config: RunConfig, run: Path, *, resume: bool = False, sinks: Sequence[Sink] = ()) -> Result:
    """Train `config` in the folder `run`; with `resume`, go on from its newest valid checkpoint.

    Everything drawn (data order, random schedules, initialisation) is a function of the seed and the step, so a resumed
    run computes what an uninterrupted one does. Raises ValueError for bad input before anything is written.
    """
    started = None
    if resume:
        started, problems = checkpoint.newest_valid(run)
        require(
            started is not None, f"{run} holds no valid checkpoint to resume; {' '.join(problems) or 'train it first'}"
        )
        for problem in problems:
            tell(sinks, kind="warning", text=f"{problem} (using an earlier one)")
    else:
        taken = (run / "config.json").exists() or bool(checkpoint.checkpoints(run))
        require(not taken, f"{run} already holds a run; continue it with --resume {run}, or choose another --out")
    resolve_device(config.train.device)  # fails before the data is prepared
    prepared = prepare_data(config, sinks)
    config = resolve(config, prepared)
    session = Session(config, run, prepared, sinks, started)
    try:
        session.loop()
    except KeyboardInterrupt:
        session.save()
        tell(sinks, kind="warning", text=f"stopped at step {session.progress.step}; continue with --resume {run}")
        raise
    return session.finish()


class Session:
    """One training process: the model, its optimizer, and where it stands."""

    def __init__(
        self, config: RunConfig, run: Path, prepared: Prepared, sinks: Sequence[Sink], started: Checkpoint | None
    ):
        t = config.train
        self.config, self.run, self.prepared, self.sinks = config, run, prepared, sinks
        self.device, self.steps = torch.device(t.device), horizon(config)
        if self.device.type == "cpu":
            keep_freed_memory()
        bos = prepared.tokenizer.bos
        self.loader = Loader(prepared.train, batch=t.batch, length=t.length, bos=bos, seed=t.seed)
        sizes = prepared.tokenizer.token_bytes()
        self.rows: Rows = validation_rows(prepared.val, sizes, rows=t.eval_rows, length=t.length, bos=bos)
        self.model = LRT.build(config.model, self.device, t.seed)
        if t.init_from is not None and started is None:
            self._begin_from(Path(t.init_from))
        self.model.execution = t.execution
        self.dtype = torch.bfloat16 if t.dtype == "bfloat16" else torch.float32
        self.optimizer = Optimizer(self.model, config.optim, self.dtype)
        self.progress, self.bpb = Progress(), None
        if started is not None:
            self._restore(started)
        self.loss = ScheduledLoss(self.model, Schedule.parse(t.schedule), t.seed)
        self.peak, self.peak_source = peak_flops(self.device, self.dtype)
        self._begin()

    def _begin(self) -> None:
        self.run.mkdir(parents=True, exist_ok=True)
        checkpoint.write_json(self.run / "config.json", to_dict(self.config))
        self.prepared.tokenizer.save(self.run / "tokenizer")
        groups = accounting.parameters_by_group(self.config.model)
        tell(
            self.sinks, kind="start", name=self.config.name, run=str(self.run),
            step=self.progress.step, steps=self.steps,
            parameters=groups | {"total": sum(groups.values())}, schedule=self.config.train.schedule,
            device=str(self.device), dtype=self.config.train.dtype, peak_flops=self.peak, peak_source=self.peak_source,
        )  # fmt: skip

    def _begin_from(self, run: Path) -> None:
        """Take over the weights of another run of the same model; its context may differ."""
        found, mine = checkpoint.open_checkpoint(run), self.config.model
        theirs = replace(found.config.model, context=mine.context, bos=mine.bos)
        require(theirs == mine, f"{run} is of another model than this config's; leave the model's flags to --init-from")
        checkpoint.load_weights(self.model, found.model(self.device).state_dict())

    def _restore(self, started: Checkpoint) -> None:
        data, here = started.extra.get("data"), self.prepared.train.hash
        require(
            data == here, f"{started.folder} was trained on other tokens than {self.prepared.folder}; restore its data"
        )
        checkpoint.load_weights(self.model, started.model(self.device).state_dict())
        self.optimizer.load(started.optimizer_state())
        spent: Any = started.extra.get("progress")
        known = {f.name for f in fields(Progress)}
        fine = (
            isinstance(spent, dict) and set(spent) == known and all(isinstance(x, (int, float)) for x in spent.values())
        )
        require(fine, f"{started.folder / checkpoint.META} does not say what was spent; resume an earlier checkpoint")
        self.progress = Progress(**spent)

    def loop(self) -> None:
        """Run the steps that are left, with logs, evaluations and checkpoints on the way."""
        t = self.config.train
        losses: list[Tensor] = []
        clock, spent = time.perf_counter(), 0.0  # spent: seconds since the last log
        for batch in prefetch(self.loader, self.progress.step, self.steps, pin=self.device.type == "cuda"):
            out, norm = self.step(batch)
            losses.append(out.loss.detach())
            now = time.perf_counter()
            self.progress.count(self.config, out.passes, now - clock)
            spent, clock = spent + now - clock, now
            done, last = self.progress.step, self.progress.step == self.steps
            if done % t.log_every == 0 or last:
                self._log(torch.stack(losses), out, norm, spent)
                losses, spent = [], 0.0
            if last or (t.eval_every and done % t.eval_every == 0):
                self.evaluate()
            if last or (t.save_every and done % t.save_every == 0):
                self.save()
            clock = time.perf_counter()

    def step(self, batch: Batch) -> tuple[LossOutput, Tensor]:
        """One optimizer step, accumulated over micro-batches; the last one's output and the gradient norm."""
        t, step = self.config.train, self.progress.step
        tokens, targets, starts = (x.to(self.device, non_blocking=True) for x in batch)
        counts = targets_per_pass(targets, self.loss.passes(step, tokens.shape[1]))
        size, total = t.micro_batch or len(tokens), []
        out = None
        for i in range(0, len(tokens), size):
            part = slice(i, i + size)
            with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
                out = self.loss(tokens[part], targets[part], starts[part], step, counts)
            out.loss.backward()
            total.append(out)
        assert out is not None
        norm = clip(self.model.parameters(), self.config.optim.clip)
        self.optimizer.step(rate(step, self.steps, self.config.optim))
        loss = torch.stack([o.loss.detach() for o in total]).sum()
        return out._replace(loss=loss, per_pass=torch.stack([o.per_pass for o in total]).sum(0)), norm

    def _log(self, losses: Tensor, out: LossOutput, norm: Tensor, seconds: float) -> None:
        t, p = self.config.train, self.progress
        loss = losses.mean().item()
        if not math.isfinite(loss):
            raise ValueError(
                f"the loss is {loss} at step {p.step}; lower optim.matrix_lr, or resume an earlier checkpoint"
            )
        speed = len(losses) * t.batch * t.length / seconds
        flops = speed * accounting.train_flops_per_token(self.config.model, self.loss.schedule, t.length)
        tell(
            self.sinks, kind="train", step=p.step, steps=self.steps, loss=loss, per_pass=out.per_pass.tolist(),
            passes=[str(q) for q in out.passes][:8], gradient_norm=norm.item(),
            rate=rate(p.step - 1, self.steps, self.config.optim),
            tokens=p.tokens, token_forwards=p.token_forwards, effective_forwards=p.effective_forwards, flops=p.flops,
            seconds=p.seconds, tokens_per_second=speed, flops_per_second=flops, mfu=flops / self.peak,
            seconds_left=(self.steps - p.step) * p.seconds / p.step,
        )  # fmt: skip

    def evaluate(self) -> BPB:
        """BPB in every mode on the validation rows, a sample, and a warning when the live gap opens."""
        p, gap = self.progress, self.config.train.gap_warning
        self.bpb = bpb = evaluate(self.model, self.loss.schedule, self.rows)
        spent = {"step": p.step, "tokens": p.tokens, "effective_forwards": p.effective_forwards, "seconds": p.seconds}
        tell(self.sinks, kind="eval", **spent, bpb=bpb.as_dict())
        if bpb.live_gap > gap:
            tell(
                self.sinks, kind="warning", step=p.step,
                text=f"live gap {bpb.live_gap:.3f} BPB at step {p.step}: decoding is worse than the training graph "
                "says; settle the memory before the loss (train.schedule settled-1..3)",
            )  # fmt: skip
        tell(self.sinks, kind="sample", step=p.step, text=self.sample())
        return bpb

    def sample(self) -> str:
        """A short document, decoded with memory at temperature 0.8."""
        room = min(SAMPLE_TOKENS, self.config.model.context - 1)
        sampling = Sampling(max_new_tokens=room, temperature=0.8, seed=self.config.train.seed)
        return "".join(complete(self.model, self.prepared.tokenizer, "", sampling))

    def save(self) -> None:
        """Write a checkpoint of this moment."""
        p = self.progress
        extra = {"progress": vars(p), "data": self.prepared.train.hash, "bpb": self.bpb.as_dict() if self.bpb else None}
        folder = checkpoint.save(
            self.run, p.step, self.config, self.model, self.optimizer.state(), extra, self.config.train.keep
        )
        tell(self.sinks, kind="checkpoint", step=p.step, folder=str(folder))

    def finish(self) -> Result:
        """Write the final evaluation to result.json and hand everything over."""
        bpb = self.bpb or self.evaluate()
        result = {"name": self.config.name, "progress": vars(self.progress), "bpb": bpb.as_dict()}
        checkpoint.write_json(self.run / "result.json", result)
        return Result(self.model.eval(), self.prepared, self.progress, bpb)


def tell(sinks: Sequence[Sink], **event: Any) -> None:
    """Hand an event to every sink."""
    for sink in sinks:
        sink(event)
