"""Training: from a configuration to a trained run. What it has to say goes to sinks, as plain dictionaries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from lrt.config.run import DataConfig, RunConfig, from_dict, require_sense
from lrt.data.prepare import Prepared, ReportProgress, prepare
from lrt.data.run_tokens import RunTokens
from lrt.training import checkpoint
from lrt.training.checkpoint import Checkpoint
from lrt.training.faults import in_one_line
from lrt.training.logging import Sink, tell
from lrt.training.run_lock import RunLock
from lrt.training.session import Result, Session
from lrt.training.trackers import Trackers
from lrt.utils.distributed import World, join
from lrt.utils.files import read_json
from lrt.utils.hardware import resolve_device, resolve_dtype
from lrt.utils.new_folder import require_makable
from lrt.utils.require import require
from lrt.utils.threads import ThreadChoice, choose_threads, threads


def resolve(config: RunConfig, prepared: Prepared) -> RunConfig:
    """The configuration with everything that depends on data and machine filled in: what is stored and resumed.

    A model that starts from another's weights keeps its vocabulary, which may be larger than the tokenizer's.
    """
    device, tokens = resolve_device(config.train.device), prepared.tokenizer.vocab_size
    size = config.model.vocab_size if config.train.init_from else tokens
    require(tokens <= size, f"the tokenizer has {tokens} tokens, the model only {size}; use the tokenizer it came with")
    prepared.tokenizer.widen(size)
    model = replace(config.model, vocab_size=size, bos=prepared.tokenizer.bos)
    train = replace(config.train, device=device.type, dtype=resolve_dtype(config.train.dtype, device))
    return replace(config, model=model, train=train)


def prepare_data(data: DataConfig, sinks: Sequence[Sink] = (), verify: str = "size") -> Prepared:
    """Tokenise the source, or reuse what an earlier run has prepared; `verify` as in `data.open_split`."""
    return prepare(data, progress=_reporting(sinks), verify=verify)


def _reporting(sinks: Sequence[Sink]) -> ReportProgress:
    def report(done: int, total: int | None, note: str) -> None:
        tell(sinks, kind="prepare", done=done, total=total, note=note)

    return report


def train(config: RunConfig, run: Path, *, resume: bool | None = False, sinks: Sequence[Sink] = ()) -> Result:
    """Train `config` in the folder `run`; with `resume`, go on from its newest valid checkpoint.

    `resume` None goes on where there is a checkpoint and begins where there is none. Under torchrun the first process
    prepares the data, writes and reports; all end together. Everything drawn (data order, random schedules,
    initialisation) is a function of the seed and the step, so a resumed run computes what an uninterrupted one does.

    Raises ValueError for bad input before anything is written, and when training cannot go on; SystemExit(143) after
    SIGTERM and KeyboardInterrupt after SIGINT, a checkpoint written.
    """
    with join(config.train.device) as world, in_one_line(config.train), RunLock(run) as lock:
        trackers = _trackers(config, run, sinks, world)
        sinks = [*sinks, trackers] if world.first else []
        started = _started(lock, resume, world, sinks)
        if started is None:
            require_sense(config)
        prepared = world.in_turn(lambda: _prepared(config, run, started, sinks, "checksum" if world.first else "size"))
        config = resolve(config, prepared)
        if started is not None and resume is None:
            checkpoint.require_same(config, started)
        config, choice = _with_threads(config, started)
        with threads(choice.threads):
            session = Session(config, lock, prepared, sinks, started, world=world)
            if world.device.type == "cpu" and session.progress.step < session.steps:
                tell(sinks, kind="note", text=_threads_note(choice))
            try:
                session.loop()
                return session.finish()
            finally:
                trackers.close()


def _prepared(config: RunConfig, run: Path, started: Checkpoint | None, sinks: Sequence[Sink], verify: str) -> Prepared:
    """The data of a new run, or the very tokens that one was begun with."""
    tokens = None if started is None else RunTokens.of(started.extra)
    data = config.data
    if started is None or tokens is None or replace(started.config.data, folder=data.folder) != data:
        return prepare_data(data, sinks, verify)  # other tokens than the checkpoint's will be refused
    prepared = tokens.find(run, data, checkpoint.run_tokenizer(started), verify, _reporting(sinks))
    if tokens.changed(data):
        text = f"the text of {data.source} has changed since, or is gone; the run goes on with its own tokens"
        tell(sinks, kind="warning", text=text)
    return prepared


def _trackers(config: RunConfig, run: Path, sinks: Sequence[Sink], world: World) -> Trackers:
    """Those of `train.log_to`, on the first process; every process learns of one that is not installed."""
    opened: list[Trackers] = []
    world.agree(lambda: opened.append(Trackers(config.train.trackers, run, list(sinks))))
    return opened[0] if opened else Trackers((), run, [])


def _with_threads(config: RunConfig, started: Checkpoint | None) -> tuple[RunConfig, ThreadChoice]:
    """The configuration with its number of CPU threads: what was asked for, what the run had before, or a choice."""
    requested, before = config.train.threads, started.config.train.threads if started else None
    if config.train.device != "cpu":
        return config, ThreadChoice(torch.get_num_threads(), "for the host's part")
    if requested or before:
        choice = ThreadChoice(requested or before or 1, "as configured" if requested else "as before")
    else:
        choice = choose_threads(config.model.d, config.train.batch * config.train.length)
    return replace(config, train=replace(config.train, threads=choice.threads)), choice


def _threads_note(choice: ThreadChoice) -> str:
    count = "1 CPU thread" if choice.threads == 1 else f"{choice.threads} CPU threads"
    return f"{count} ({choice.why}); --train.threads overrides"


def _started(lock: RunLock, resume: bool | None, world: World, sinks: Sequence[Sink]) -> Checkpoint | None:
    """The newest valid checkpoint, verified by the first process; None to begin."""
    run = lock.run

    def find() -> int:
        require_makable(run)
        if resume is False:
            taken = (run / "config.json").exists() or bool(checkpoint.checkpoints(run))
            require(not taken, f"{run} already holds a run; continue it with --resume {run}, or choose another --out")
            return -1
        if checkpoint.checkpoints(run):
            lock.take()  # before its checkpoints are looked at: another training deletes them as it goes
        newest, problems = checkpoint.newest_valid(run)
        for problem in problems if newest is not None else ():
            tell(sinks, kind="warning", text=f"{problem} (using an earlier one)")
        begin = resume is None and not problems
        reason = " ".join(problems) or "train it first"
        require(newest is not None or begin, f"{run} holds no valid checkpoint to resume; {reason}")
        if newest is None and (run / "config.json").exists():  # it will be overwritten, so it must be a run's
            from_dict(RunConfig, read_json(run / "config.json", "configuration"), str(run / "config.json"))
        brief = newest is not None and newest.stored == checkpoint.BRIEF
        require(not brief, f"{run} holds weights alone, without the optimizer's state; use --init-from {run}")
        return -1 if newest is None else checkpoint.checkpoints(run).index(newest.folder)

    place = world.agree(find)
    return None if place < 0 else checkpoint.open_checkpoint(checkpoint.checkpoints(run)[place], verify=world.first)
