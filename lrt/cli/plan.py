"""`lrt plan`: what a recipe needs on a cluster."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Annotated, Any

import tyro

from lrt.cli.parse import early_value, names_of, parse
from lrt.config.benchmarks import Cluster
from lrt.config.model import require
from lrt.config.recipes import RecipeName, recipe
from lrt.config.run import RunConfig, with_vocabulary
from lrt.utils.terminal import show


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
    if flags.json:
        print(json.dumps(facts))
    else:
        show("\n".join(lines(flags.recipe, config, flags.cluster, facts)))
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
        f"{name}: depth {m.depth}, width {m.d}, {facts['parameters']['total']:,} parameters; "
        f"batch {t.batch} x {t.length}, {t.horizon}; {c.devices} devices of {c.memory / 1e9:.0f} GB, "
        f"{c.flops * c.efficiency / 1e12:.4g} TFLOP/s reached"
    )
    yield f"decoding: {facts['cache_bytes_per_row'] / 1e6:,.1f} MB of cache and memory for a row of {m.context} tokens"
    yield (
        f"  {'parallel':<12}{'rows':>4}{'state GB':>9}{'activ. GB':>10}{'gathers':>8}{'sent GB':>8}{'step s':>14}"
        f"{'comm.':>6}{'days':>7}"
    )
    for (schedule, steps), rows in groupby(facts["rows"], key=lambda r: (r["schedule"], r["steps"])):
        yield f"{schedule}, {steps:,} steps"
        yield from map(_row, rows)
    yield "step: communication hidden behind computing, to none hidden; days: none hidden; rows: of one micro-batch"


def _row(r: dict[str, Any]) -> str:
    """One way of sharing a schedule's steps among the devices."""
    low, high = r["seconds"]
    return (
        f"  {r['parallel']:<12}{r['micro_batch'] or '-':>4}{sum(r['state_bytes'].values()) / 1e9:>9,.2f}"
        f"{r['activation_bytes'] / 1e9:>10,.2f}{r['gathers']:>8.1f}{r['sent_bytes'] / 1e9:>8,.2f}"
        f"{f'{low:.3f}-{high:.3f}':>14}{r['communication_share']:>6.0%}"
        f"{format(r['days'], ',.2f') if r['fits'] else 'no fit':>7}"
    )
