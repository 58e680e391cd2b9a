"""`lrt plan`: what a recipe needs on a cluster."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import tyro

from lrt.cli.parse import early_value, names_of, parse
from lrt.config.benchmarks import Cluster
from lrt.config.model import require
from lrt.config.recipes import RecipeName, recipe
from lrt.config.run import RunConfig, with_vocabulary


@dataclass(frozen=True)
class PlanFlags:
    """What a recipe needs on a cluster: memory, time and communication per step, days, for DDP and FSDP.

    Every field of the recipe can be overridden, so that sizes without a recipe can be planned, too.
    """

    config: Annotated[RunConfig, tyro.conf.arg(name="")]
    cluster: Cluster = field(default_factory=Cluster)
    recipe: RecipeName = "cpu_demo"
    """Recipe to start from."""
    json: bool = False
    """Print one JSON object."""


FLAGS = PlanFlags


def main(args: list[str]) -> int:
    """Run the command; returns the exit code."""
    base = recipe(early_value(args, "--recipe", "cpu_demo"))
    flags = parse(PlanFlags, args, "plan", default=PlanFlags(base, recipe=base.name))

    from lrt.benchmarks.cluster import plan

    config = planned(flags.config, args)
    facts = plan(config, flags.cluster)
    print(json.dumps(facts) if flags.json else "\n".join(lines(flags.recipe, config, flags.cluster, facts)))
    return 0


def planned(config: RunConfig, args: Sequence[str]) -> RunConfig:
    """`config` with the vocabulary that its training will have.

    ValueError: the arguments ask for another than the tokenizer's.
    """
    fitted = with_vocabulary(config)
    refused = "--model.vocab-size" in names_of(args) and fitted != config
    require(not refused, "--model.vocab-size is what the tokenizer has; set --data.vocab-size, or leave it out")
    return fitted


def lines(name: str, config: RunConfig, c: Cluster, facts: dict[str, Any]) -> Iterable[str]:
    """The plan as a table for people."""
    m, t = config.model, config.train
    yield (
        f"{name}: depth {m.depth}, width {m.d}, {facts['parameters']['total'] / 1e9:.3f} B parameters; "
        f"batch {t.batch} x {t.length}, {t.horizon}; {c.devices} devices of {c.memory / 1e9:.0f} GB, "
        f"{c.flops * c.efficiency / 1e12:.4g} TFLOP/s reached"
    )
    yield f"decoding: {facts['cache_bytes_per_row'] / 1e6:,.1f} MB of cache and memory for a row of {m.context} tokens"
    yield (
        f"{'schedule':<16}{'parallel':<14}{'rows':>5}{'state GB':>10}{'activ. GB':>10}{'gathers':>8}{'sent GB':>9}"
        f"{'step s':>18}{'comm.':>7}{'steps':>10}{'days':>9}"
    )
    for r in facts["rows"]:
        low, high = r["seconds"]
        yield (
            f"{r['schedule']:<16}{r['parallel']:<14}{r['micro_batch'] or '-':>5}"
            f"{sum(r['state_bytes'].values()) / 1e9:>10,.2f}{r['activation_bytes'] / 1e9:>10,.2f}{r['gathers']:>8.1f}"
            f"{r['sent_bytes'] / 1e9:>9,.2f}{f'{low:,.3f} to {high:,.3f}':>18}{r['communication_share']:>7.0%}"
            f"{r['steps']:>10,}{r['days']:>9,.2f}{'' if r['fits'] else '  does not fit'}"
        )
    yield "step: communication hidden behind computing, to none hidden; days: none hidden; rows: of one micro-batch"
