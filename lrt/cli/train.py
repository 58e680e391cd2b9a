"""`lrt train`: train a recipe, or resume a run."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro

from lrt.cli.parse import early_value, names_of, parse, tell_unread
from lrt.cli.plan import planned
from lrt.config.recipes import RecipeName, recipe
from lrt.config.run import RunConfig
from lrt.schedule import Curriculum
from lrt.utils.files import expand_home
from lrt.utils.require import require
from lrt.utils.terminal import command_name, show

ON_RESUME = ("--resume", "--train.device", "--data.folder")
"""Flags that go with --resume: which run, what machine it is on now, and where its token shards are."""


@dataclass(frozen=True)
class TrainFlags:
    """Train a recipe on your text. Any field of the recipe can be overridden; --resume continues a run as it was."""

    config: Annotated[RunConfig, tyro.conf.arg(name="")]
    recipe: RecipeName = "cpu_demo"
    """Recipe to start from (see docs/recipes.md)."""
    out: Path | None = None
    """Run folder, and the run's name; by default runs/NAME."""
    resume: Path | None = None
    """Continue the run in this folder from its newest valid checkpoint; of the other flags only --train.device and
    --data.folder may be given: where the run goes on, and where its token shards are now."""
    or_resume: bool = False
    """Continue the run if --out already holds a checkpoint of it, else begin: what restarted and requeued jobs need."""
    init_from: Path | None = None
    """Start from the weights of this run, of whatever step, with its model and tokenizer (see `lrt convert`)."""


FLAGS = TrainFlags


def main(args: list[str]) -> int:
    """Run the command; returns the exit code."""
    base = recipe(early_value(args, "--recipe", "cpu_demo"))
    origin = early_value(args, "--init-from", "")
    base = _from_run(base, expand_home(origin)) if origin else base
    flags = parse(TrainFlags, args, "train", default=TrainFlags(config=base, recipe=base.name))
    if flags.resume is not None:
        config, folder = _resumed(flags.resume, flags.config, args), flags.resume
    else:
        config = flags.config if origin else planned(flags.config, args)
        config, folder = _placed(config, flags.out, args)
        tell_unread("train", config, args)
    return _train(config, folder, None if flags.or_resume else flags.resume is not None)


def _train(config: RunConfig, folder: Path, resume: bool | None) -> int:
    from lrt.evaluation.score_names import signed, unit
    from lrt.training.logging import Jsonl, Live
    from lrt.training.trainer import train

    with Live() as live:
        result = train(config, folder, resume=resume, sinks=[live, Jsonl(folder / "metrics.jsonl")])
    if result.first:
        name = unit(result.bpb.as_dict())
        show(f"{folder}: decoded {name} {result.bpb.decoded:.4f}, live gap {signed(result.bpb.live_gap)}")
        run = shlex.quote(str(folder))
        follow = [f"{command_name()} {command} {run}" for command in ("sample", "chat", "eval", "serve")]
        show("\n  ".join(["next:", *follow]), sys.stderr)
    return 0


def _placed(config: RunConfig, out: Path | None, args: Sequence[str]) -> tuple[RunConfig, Path]:
    """The run's folder, and the configuration with its name: each is called after the other unless both are given."""
    folder = out or Path("runs") / config.name
    named = out is None or "--name" in names_of(args)
    return config if named else replace(config, name=folder.absolute().name), folder


def _resumed(run: Path, config: RunConfig, args: Sequence[str]) -> RunConfig:
    """The configuration that a run goes on with: its own, on the device that is asked for."""
    from lrt.training import checkpoint
    from lrt.utils.hardware import resolve_device

    others = [name for name in names_of(args) if name not in ON_RESUME]
    require(not others, f"--resume takes its settings from the run; leave out {', '.join(others)}")
    started, problems = checkpoint.newest_valid(run, verify=False)  # the training verifies
    if started is None and not problems:
        checkpoint.open_checkpoint(run)  # says what is there instead
    if started is None:
        raise ValueError(f"{run} holds no checkpoint to resume; {' '.join(problems)}")
    resumed, names = started.config, names_of(args)
    if "--train.device" in names:
        resumed = replace(resumed, train=replace(resumed.train, device=config.train.device))
    if "--data.folder" in names:
        resumed = replace(resumed, data=replace(resumed.data, folder=config.data.folder))
    try:
        resolve_device(resumed.train.device)
    except ValueError as error:
        if "--train.device" in names:
            raise
        raise ValueError(f"{run} was trained on {resumed.train.device}; {error}: add --train.device cpu") from None
    return resumed


def _from_run(base: RunConfig, run: Path) -> RunConfig:
    """`base` with what a run to start from replaces: model, tokenizer, and what must fit them."""
    from lrt.training.checkpoint import open_checkpoint

    start = open_checkpoint(run)
    tokenizer = start.folder.parent.parent / "tokenizer"
    length = min(base.train.length, start.config.model.context)
    recurrent = start.config.model.memory.recurrent  # without, sweeps would have nothing to settle
    last, _ = Curriculum.parse(base.train.schedule).stages[-1]  # what is trained has its plain steps behind it
    schedule = str(last) if recurrent else "parallel"
    return replace(
        base,
        model=start.config.model,
        data=replace(base.data, tokenizer=str(tokenizer)),
        train=replace(base.train, init_from=str(run), length=length, schedule=schedule),
    )
