"""`lrt train`: train a recipe, or resume a run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from lrt.cli.parse import early_value, parse
from lrt.config.model import require
from lrt.config.recipes import recipe
from lrt.config.run import RunConfig


@dataclass(frozen=True)
class TrainFlags:
    """Train a recipe on your text. Any field of the recipe can be overridden; --resume continues a run as it was."""

    config: Annotated[RunConfig, tyro.conf.arg(name="")]
    recipe: str = "cpu_demo"
    """Recipe to start from (see docs/recipes.md)."""
    out: Path | None = None
    """Run folder; by default runs/NAME."""
    resume: Path | None = None
    """Continue the run in this folder from its newest valid checkpoint; no other flag may be flags."""
    or_resume: bool = False
    """Continue the run if --out already holds a checkpoint of it, else begin: what restarted and requeued jobs need."""
    init_from: Path | None = None
    """Start from the weights of this run, of whatever step, with its model and tokenizer (see `lrt convert`)."""


def main(args: list[str]) -> int:
    """Run the command; returns the exit code."""
    from lrt.training import checkpoint
    from lrt.training.logging import Jsonl, Live
    from lrt.training.trainer import train as run_training
    from lrt.utils.score_names import unit

    base = recipe(early_value(args, "--recipe", "cpu_demo"))
    origin = early_value(args, "--init-from", "")
    base = replace(base, **_from_run(base, Path(origin))) if origin else base
    flags = parse(TrainFlags, args, "train", default=TrainFlags(config=base, recipe=base.name))
    folder, config = flags.out or Path("runs") / flags.config.name, flags.config
    if flags.resume is not None:
        require(len(args) == 2 or "=" in args[0], "--resume takes its settings from the run; give no other flag")
        started, problems = checkpoint.newest_valid(flags.resume, verify=False)  # the training verifies
        require(
            started is not None, f"{flags.resume} holds no checkpoint to resume; {' '.join(problems) or 'train first'}"
        )
        assert started is not None
        folder, config = flags.resume, started.config
    with Live() as live:
        resume = None if flags.or_resume else flags.resume is not None
        result = run_training(config, folder, resume=resume, sinks=[live, Jsonl(folder / "metrics.jsonl")])
    if result.first:
        name = unit(result.bpb.as_dict())
        print(f"{folder}: decoded {name} {result.bpb.decoded:.4f}, live gap {result.bpb.live_gap:+.4f}")
    return 0


def _from_run(base: RunConfig, run: Path) -> dict[str, Any]:
    """The parts of `base` that a run to start from replaces: model, tokenizer, and what must fit them."""
    from lrt.training.checkpoint import open_checkpoint

    found = open_checkpoint(run)
    length = min(base.train.length, found.config.model.context)
    schedule = (
        base.train.schedule if found.config.model.memory.on else "parallel"
    )  # sweeps would have nothing to settle
    return {
        "model": found.config.model,
        "data": replace(base.data, tokenizer=str(found.folder.parent.parent / "tokenizer")),
        "train": replace(base.train, init_from=str(run), length=length, schedule=schedule),
    }
