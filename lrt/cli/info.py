"""`lrt info`: what a recipe's model costs."""

from __future__ import annotations

import json
from dataclasses import dataclass

from lrt.cli.parse import early_value, parse
from lrt.config.model import ModelConfig
from lrt.config.recipes import recipe

INFO_SCHEDULES = ("parallel", "interleaved-2", "interleaved-4", "refinement-1", "refinement-3", "settled-1..3")


@dataclass(frozen=True)
class InfoFlags:
    """Show what a recipe's model costs: parameters by group, FLOPs per token of every schedule, cache bytes."""

    model: ModelConfig
    """The model; flags override the recipe's."""
    recipe: str = "cpu_demo"
    """Recipe to start from."""
    length: int | None = None
    """Row length for the FLOP figures; by default the recipe's."""
    json: bool = False
    """Print one JSON object."""


def main(args: list[str]) -> int:
    """Run the command; returns the exit code."""
    from lrt.model.flops import describe

    base = recipe(early_value(args, "--recipe", "cpu_demo"))
    flags = parse(InfoFlags, args, "info", default=InfoFlags(base.model, base.name, base.train.length))
    schedules = dict.fromkeys((*INFO_SCHEDULES, base.train.schedule))
    facts = describe(flags.model, flags.length or base.train.length, schedules)
    print(json.dumps({"recipe": flags.recipe} | facts) if flags.json else _info_text(flags, facts))
    return 0


def _info_text(flags: InfoFlags, facts: dict) -> str:
    m, p = flags.model, facts["parameters"]
    total, without = p["total"], p["total"] - p["memory"]
    shape = f"{flags.recipe}: depth {m.depth}, width {m.d}, {m.h} heads ({m.k} key/value), vocabulary {m.vocab_size}"
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
