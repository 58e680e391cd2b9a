"""`lrt plan`: what a recipe needs on a cluster."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Annotated, Any, TypeAlias

import tyro

from lrt.cli.parse import early_value, names_of, parse
from lrt.config.benchmarks import Cluster
from lrt.config.recipes import RecipeName, recipe
from lrt.config.run import RunConfig, with_vocabulary
from lrt.utils.require import require
from lrt.utils.terminal import show

Units: TypeAlias = tuple[tuple[float, str], ...]
SIZES: Units = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
TIMES: Units = ((86400, "days"), (3600, "h"), (1, "s"), (1e-3, "ms"), (1e-6, "us"))
"""Units and their size in bytes and in seconds, largest first."""


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
        f"  {'parallel':<12}{'rows':>4}{'state':>8}{'activ.':>8}{'gathers':>8}{'sent':>8}{'step':>15}{'comm.':>6}"
        f"{'in all':>9}"
    )
    for (schedule, steps), rows in groupby(facts["rows"], key=lambda r: (r["schedule"], r["steps"])):
        yield f"{schedule}, {steps:,} steps"
        yield from map(_row, rows)
    yield (
        "rows: of one micro-batch; state: weights, gradients and optimizer; activ.: kept for the backward pass; "
        "gathers: of a weight per step; sent: by a device per step; step: communication all hidden behind computing, "
        "to none hidden; comm.: its share then; in all: the training, none hidden"
    )


def _row(r: dict[str, Any]) -> str:
    """One way of sharing a schedule's steps among the devices."""
    low, high = r["seconds"]
    size, unit = _unit(high, TIMES[2:])
    step = f"{low / size:.3g}-{high / size:.3g} {unit}"
    return (
        f"  {r['parallel']:<12}{r['micro_batch'] or '-':>4}{_short(sum(r['state_bytes'].values()), SIZES):>8}"
        f"{_short(r['activation_bytes'], SIZES):>8}{r['gathers']:>8.1f}{_short(r['sent_bytes'], SIZES):>8}"
        f"{step:>15}{r['communication_share']:>6.0%}{_short(r['days'] * 86400, TIMES) if r['fits'] else 'no fit':>9}"
    )


def _unit(value: float, units: Units) -> tuple[float, str]:
    """The largest unit that `value` holds at least once; the smallest there is for less."""
    return next((one for one in units if value >= one[0]), units[-1])


def _short(value: float, units: Units) -> str:
    """Three digits in a unit that suits them: 12.5 GB, 3.2 days."""
    size, unit = _unit(value, units)
    return f"{value / size:.3g} {unit}" if value < 1000 * size else f"{value / size:,.0f} {unit}"
