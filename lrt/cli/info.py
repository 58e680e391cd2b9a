"""`lrt info`: what the model of a recipe or a run costs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from lrt.cli.parse import early_positional, early_value, names_of, parse
from lrt.config.model import ModelConfig, require, require_at_least
from lrt.config.recipes import RecipeName, recipe
from lrt.config.run import RunConfig
from lrt.utils.files import expand_home

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
    base = recipe(early_value(args, "--recipe", "cpu_demo")) if run is None else _config_of(run)
    flags = parse(InfoFlags, args, "info", default=InfoFlags(base.model, length=base.train.length))

    from lrt.model.flops import describe

    length = flags.length if flags.length is not None else base.train.length
    require_at_least(1, length=length)
    require(flags.run is None or run is not None, f"{flags.run} is neither a flag nor a run; see lrt info --help")
    require(run is None or "--recipe" not in names_of(args), "give a run or --recipe, not both")
    facts = describe(flags.model, length, dict.fromkeys((*INFO_SCHEDULES, base.train.schedule)))
    described = {"recipe": flags.recipe} if flags.run is None else {"run": str(flags.run)}
    print(
        json.dumps(described | facts) if flags.json else _info_text(str(flags.run or flags.recipe), flags.model, facts)
    )
    return 0


def _config_of(run: str) -> RunConfig:
    """The configuration that a run was trained with."""
    from lrt.training.checkpoint import open_checkpoint

    return open_checkpoint(expand_home(run), verify=False).config


def _info_text(name: str, m: ModelConfig, facts: dict) -> str:
    p = facts["parameters"]
    total, without = p["total"], p["total"] - p["memory"]
    shape = f"{name}: depth {m.depth}, width {m.d}, {m.h} heads ({m.k} key/value), vocabulary {m.vocab_size}"
    lines = [shape, f"memory: {m.memory_text}", ""]
    lines += [f"{name:<18}{n:>16,}" for name, n in p.items()]
    lines.append(f"{'without memory':<18}{without:>16,}  ({without / 1e9:.3f} B)")
    lines.append(f"{'memory adds':<18}{facts['memory_overhead']:>16.3%}  ({total / 1e9:.3f} B)")
    lines.append(
        f"{'scaling parameters':<18}{facts['scaling_parameters']:>16,}  (matrices + head; R counts tokens per one)"
    )
    lines += [
        "",
        f"FLOPs per token, training, rows of {facts['length']} (every pass counted, backward twice the forward)",
    ]
    plain = facts["train_flops_per_token"]["parallel"]
    for name, flops in facts["train_flops_per_token"].items():
        lines.append(f"  {name:<16}{flops:>16.4g}  {flops / plain:.2f} x parallel")
    for position, flops in facts["decode_flops_per_token"].items():
        lines.append(f"  {'decode at ' + position:<16}{flops:>16.4g}")
    cache, memory = facts["cache_bytes_per_token"], facts["memory_bytes_per_sequence"]
    lines += ["", f"cache {cache:,} bytes per token, memory {memory:,} bytes per sequence (bfloat16)"]
    return "\n".join(lines)
