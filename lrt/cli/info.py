"""`lrt info`: what the model of a recipe or a run costs."""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tyro.conf import Positional

from lrt.cli.parse import early_positional, early_value, names_of, parse
from lrt.config.model import ModelConfig
from lrt.config.recipes import RECIPES, RecipeName, recipe
from lrt.evaluation.score_names import unit
from lrt.utils.files import expand_home
from lrt.utils.require import require, require_at_least
from lrt.utils.terminal import show

if TYPE_CHECKING:
    from lrt.training.checkpoint import Checkpoint

INFO_SCHEDULES = ("parallel", "interleaved-2", "interleaved-4", "refinement-1", "refinement-3", "settled-1..3")


@dataclass(frozen=True)
class InfoFlags:
    """What a model costs: parameters by group, FLOPs per token of every schedule, cache bytes."""

    model: ModelConfig
    """The model; flags override what the recipe or the run says."""
    run: Positional[Path | None] = None
    """Run folder, or one of its checkpoints; without one the recipe's model is described."""
    recipe: RecipeName = "cpu_demo"
    """Recipe to start from."""
    length: int | None = None
    """Row length for the FLOP figures; by default the one trained with."""
    json: bool = False
    """Print one JSON object."""


FLAGS = InfoFlags


def main(args: list[str]) -> int:
    """Run the command; returns the exit code."""
    run = early_positional(args, ("--json", "--no-json"))
    run_checkpoint = None if run is None else _checkpoint_of(run)
    base = recipe(early_value(args, "--recipe", "cpu_demo")) if run_checkpoint is None else run_checkpoint.config
    flags = parse(InfoFlags, args, "info", default=InfoFlags(base.model, length=base.train.length))

    from lrt.model.flops import describe

    length = flags.length if flags.length is not None else base.train.length
    require_at_least(1, length=length)
    require(flags.run is None or run is not None, f"{flags.run} is neither a flag nor a run; see lrt info --help")
    require(run is None or "--recipe" not in names_of(args), "give a run or --recipe, not both")
    facts = describe(flags.model, length, dict.fromkeys((*INFO_SCHEDULES, base.train.schedule)))
    if run_checkpoint is None:
        described, trained = {"recipe": flags.recipe}, []
    else:
        described = {"run": str(flags.run), "step": run_checkpoint.step, "source": base.data.source}
        trained = _trained(run_checkpoint)
    text = "\n".join([*trained, _info_text(str(flags.run or flags.recipe), flags.model, facts)])
    if flags.json:
        print(json.dumps(described | facts))
    else:
        show(text)
    return 0


def _checkpoint_of(run: str) -> Checkpoint:
    from lrt.training.checkpoint import open_checkpoint

    folder = expand_home(run)
    named = difflib.get_close_matches(run, RECIPES, 1) if not folder.exists() else []
    require(not named, f"{run} does not exist; of a recipe say lrt info --recipe {''.join(named)}")
    return open_checkpoint(folder, verify=False)


def _trained(run_checkpoint: Checkpoint) -> list[str]:
    """How far a run has come, on what, and how well it scored there."""
    train, bpb = run_checkpoint.config.train, run_checkpoint.extra.get("bpb")
    lines = [f"trained {run_checkpoint.step:,} steps on {run_checkpoint.config.data.source} by {train.schedule}"]
    if isinstance(bpb, dict) and isinstance(bpb.get("decoded"), float):
        before = "" if run_checkpoint.stored == "float32" else f" before the weights were {run_checkpoint.stored}"
        of = f"decoded {unit(bpb)} of its held-out text{before}"
        lines.append(f"{of} {bpb['decoded']:.4f} (bits per byte, lower is better)")
    return lines


def _info_text(name: str, m: ModelConfig, facts: dict) -> str:
    p = facts["parameters"]
    total, without = p["total"], p["total"] - p["memory"]
    shape = f"{name}: depth {m.depth}, width {m.d}, {m.h} heads ({m.k} key/value), vocabulary {m.vocab_size}"
    lines = [shape, f"memory: {m.memory_text}", ""]
    lines += [f"{name:<18}{n:>16,}" for name, n in p.items() if name != "total"]
    lines.append(f"{'total':<18}{total:>16,}  ({_short(total)})")
    lines.append(f"{'without memory':<18}{without:>16,}  ({_short(without)})")
    lines.append(f"{'memory adds':<18}{facts['memory_overhead']:>16.3%}")
    lines.append(
        f"{'scaling parameters':<18}{facts['scaling_parameters']:>16,}  (matrices + head; R counts tokens per one)"
    )
    lines += [
        "",
        f"FLOPs per token of training, rows of {facts['length']} (backward twice the forward)",
    ]
    plain = facts["train_flops_per_token"]["parallel"]
    wide = max(map(len, facts["train_flops_per_token"]))
    for name, flops in facts["train_flops_per_token"].items():
        lines.append(f"  {name:<{wide}}{flops:>12.4g}  {flops / plain:.2f} x parallel")
    lines += ["FLOPs of one decoded token"]
    for position, flops in facts["decode_flops_per_token"].items():
        lines.append(f"  {f'after {position} tokens':<{wide}}{flops:>12.4g}")
    cache, memory = facts["cache_bytes_per_token"], facts["memory_bytes_per_sequence"]
    lines += ["", f"cache {cache:,} bytes per token, memory {memory:,} bytes per sequence (bfloat16)"]
    return "\n".join(lines)


def _short(count: int) -> str:
    """212,998 as 0.213 M, 1,200,000,000 as 1.200 B."""
    return f"{count / 1e9:.3f} B" if count >= 1e8 else f"{count / 1e6:.3f} M"
