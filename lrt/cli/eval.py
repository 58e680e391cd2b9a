"""`lrt eval`: bits per byte of a run in every mode, a suite of tasks, or lm-eval's tasks."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from tyro.conf import Positional

from lrt.cli.parse import parse
from lrt.config.decoding import DEFAULT_MODE, Weights
from lrt.config.model import MOST
from lrt.config.run import Device
from lrt.evaluation.score_names import LEGEND, share_text, signed, unit
from lrt.schedule import Curriculum
from lrt.utils.files import to_json
from lrt.utils.require import require, require_at_least, require_at_most
from lrt.utils.terminal import show

if TYPE_CHECKING:
    from lrt.evaluation.bits_per_byte import BPB
    from lrt.evaluation.suite import Suite
    from lrt.inference.loaded import Loaded


@dataclass(frozen=True)
class EvalFlags:
    """Bits per byte of a run on its validation text (or another text), in every mode; or, with --suite, tasks."""

    run: Positional[Path]
    """Run folder, or one of its checkpoints."""
    source: str | None = None
    """Score this text source instead of the run's validation split."""
    normalised: bool = False
    """Score the text even if the tokens lose some of it; figures are of the normalised text then."""
    rows: int = 64
    """Rows to score."""
    length: int | None = None
    """Row length; by default the one trained with. It may exceed the model's context; the score then says so."""
    schedule: str | None = None
    """Schedule of the per-pass and merged figures; by default the one trained with."""
    tasks: tuple[str, ...] = ()
    """Run these lm-eval tasks instead (separated by commas or spaces), scored by the decoding engine."""
    include_path: Path | None = None
    """Folder with task files of your own; the harness's are then left out."""
    suite: str | None = None
    """Score a suite instead: core (CORE's tasks), blimp (minimal pairs), or a synthetic task by length, such as parity,
    sums, s5, a5, parity_check, mqar-8-8192 or pointers-2."""
    suite_data: Annotated[Path | None, tyro.conf.arg(aliases=["--bundle"])] = None
    """Folder of the files of core or blimp on this disk; nothing is downloaded. Of core it is the published evaluation
    bundle (core.yaml, eval_meta_data.csv and eval_data/), or task files as the gauntlet lays them out."""
    lengths: tuple[int, ...] = ()
    """Lengths of a synthetic task's rows; by default 1, 2, 4 and 8 times the trained length."""
    arm: str | None = None
    """What tables call the run; by default its name without the seed."""
    out: Path | None = None
    """Folder of a suite's record, SUITE-MODE.jsonl, which `lrt report` reads; by default RUN/suites."""
    mode: str | None = None
    """How tasks are scored: exact, jacobi, interleaved-G or zero_memory; by default synthetic tasks exactly, others by
    interleaved-8."""
    limit: int | None = None
    """Examples of each task."""
    weights: Weights = "full"
    """Large matrices as they are, or in 8 bits, as `lrt sample`, `chat` and `serve` decode with; for bits per byte."""
    device: Device = "auto"
    """cpu, cuda, mps (untested) or auto."""
    json: bool = False
    """Print one JSON object."""


FLAGS = EvalFlags
READERS = {
    "source": ("bits per byte",), "rows": ("bits per byte",), "length": ("bits per byte",),
    "schedule": ("bits per byte",), "weights": ("bits per byte",), "include_path": ("--tasks",),
    "suite_data": ("--suite",), "lengths": ("--suite",), "arm": ("--suite",), "out": ("--suite",),
    "mode": ("--suite", "--tasks"), "limit": ("--suite", "--tasks"),
}  # fmt: skip
"""What each flag is for, of those that not every kind of score looks at."""


def main(args: list[str], command: str = "eval") -> int:
    """Run the command; returns the exit code."""
    flags = parse(EvalFlags, args, command)
    require_at_least(1, rows=flags.rows, limit=flags.limit)
    require_at_least(2, length=flags.length)
    require_at_most(MOST, length=flags.length)
    require(not (flags.tasks and flags.suite), "--tasks are lm-eval's, --suite ours; give one of them")
    _require_heeded(flags)

    from lrt.evaluation.bits_per_byte import evaluate as score_rows
    from lrt.evaluation.held_out import held_out
    from lrt.evaluation.open_suite import published_suite
    from lrt.inference.weights import with_weights
    from lrt.training.checkpoint import load_model
    from lrt.utils.distributed import join

    # What is wrong with a suite's files is told before a model is loaded.
    published = published_suite(flags.suite, flags.suite_data, flags.lengths) if flags.suite else None
    with join(flags.device) as world:  # under torchrun each process scores its share of the rows
        loaded = load_model(flags.run, world.device)
        with_weights(loaded.model, flags.weights)
        if flags.tasks or flags.suite:
            require(world.size == 1, "--suite and --tasks are scored by one process; start them without torchrun")
            print(score_suite(flags, loaded, published) if flags.suite else _tasks(flags, loaded))
            return 0
        length = loaded.config.train.length if flags.length is None else flags.length
        curriculum = Curriculum.parse(flags.schedule or loaded.config.train.schedule)
        normalised = True if flags.normalised else None
        sample = held_out(loaded, flags.source, rows=flags.rows, length=length, normalised=normalised)
        bpb = score_rows(loaded.model, curriculum, sample, world=world)
    where = {"run": str(flags.run), "step": loaded.step, "length": length, "source": flags.source or "validation"}
    where |= {
        "dtype": "float32",
        "stored": loaded.stored,
        "weights": flags.weights,
        "context": loaded.config.model.context,
    }
    if world.first:
        if flags.json:
            print(to_json(where | bpb.as_dict()))
        else:
            show(_eval_text(where, bpb))
    return 0


def _require_heeded(flags: EvalFlags) -> None:
    """ValueError: flags that what is scored does not look at; they would be dropped in silence."""
    scored = "--suite" if flags.suite else "--tasks" if flags.tasks else "bits per byte"
    defaults = {f.name: f.default for f in fields(EvalFlags)}
    for name, readers in READERS.items():
        unread = scored not in readers and getattr(flags, name) != defaults[name]
        flag = f"--{name.replace('_', '-')}"
        require(not unread, f"{flag} is for {' and '.join(readers)}, not for {scored}; leave it out")


def sweep_lines(bpb: BPB) -> list[str]:
    """A line for each pass after so many sweeps: how far it is from exact decoding."""
    if not bpb.residuals:
        return []
    lines = ["  a text taken in by so many sweeps, beside exact decoding"]
    lines.append(f"    {'sweeps':<12}{'residual':>10}{'K/V error':>11}{'argmax agrees':>15}{'KL, nats':>11}")
    for k, (kv, agree, kl) in enumerate(zip(bpb.kv_errors, bpb.argmax_agreement, bpb.kl, strict=True)):
        residual = f"{bpb.residuals[k - 1]:.1e}" if k else ""
        lines.append(f"    {k:<12}{residual:>10}{kv:>11.1e}{agree:>15.2%}{kl:>11.1e}")
    return lines


def score_suite(flags: EvalFlags, loaded: Loaded, published: Suite | None) -> str:
    """Score a suite, or go on with it, and write its record; returns it as a table or as JSON. Progress on stderr."""
    from lrt.evaluation.open_suite import default_mode, synthetic_suite
    from lrt.evaluation.suite import Scorer
    from lrt.experiments.groups import RunGroup, of_right_kinds
    from lrt.experiments.suite_run import Place, arm_of, run_suite
    from lrt.experiments.suite_tables import tables_of

    name = flags.suite or ""
    suite = published or synthetic_suite(name, flags.suite_data, flags.lengths, loaded)
    scorer = Scorer(
        model=loaded.model, tokenizer=loaded.tokenizer, mode=flags.mode or default_mode(name), limit=flags.limit,
        normalised=flags.normalised or loaded.config.data.normalised,
    )  # fmt: skip
    place = Place(flags.out or loaded.run / "suites", flags.arm or arm_of(loaded.config))
    record = run_suite(loaded, suite, scorer, place, lambda line: print(line, file=sys.stderr, flush=True))
    if flags.json:
        return json.dumps({"run": str(loaded.run), "step": loaded.step} | record)
    with of_right_kinds(place.folder):  # it may have been written before
        tables = [table.markdown() for _, table in tables_of([RunGroup(suite.name, "", record["arm"], (record,))])]
    lost = [f"Of the normalised text: {record['lost']}."] if record.get("lost") else []
    return "\n\n".join([*lost, *tables])


def _tasks(flags: EvalFlags, loaded: Loaded) -> str:
    """lm-eval's results as a table, or as one JSON object."""
    try:
        from lrt.evaluation.lm_eval import run_tasks
    except ImportError:
        raise ValueError("--tasks needs lm-eval: pip install 'latent-recurrent-transformer[eval]'") from None
    names = [name for part in flags.tasks for name in part.split(",") if name]
    done = run_tasks(
        loaded,
        names,
        mode=flags.mode or DEFAULT_MODE,
        include=flags.include_path,
        limit=flags.limit,
        normalised=flags.normalised,
    )
    if flags.json:
        return json.dumps({"run": str(loaded.run), "step": loaded.step} | done, default=str)
    of = " of the normalised text" if done["lost"] else ""
    lines = [f"{loaded.run} step {loaded.step}, scored by {done['mode']}{of}"]
    for task, metrics in done["results"].items():
        numbers = {k.partition(",")[0]: v for k, v in metrics.items() if isinstance(v, float)}
        lines.append(f"  {task:<28}" + "  ".join(f"{name} {value:.4f}" for name, value in numbers.items()))
    return "\n".join(lines)


def _eval_text(where: dict[str, Any], bpb: BPB) -> str:
    figures, weights = bpb.as_dict(), ", matrices in 8 bits" if where["weights"] == "int8" else ""
    weights += "" if where["stored"] == "float32" else f" of weights stored in {where['stored']}"
    beyond = f" (beyond its context of {where['context']})" if where["length"] > where["context"] else ""
    lines = [
        f"{where['run']} step {where['step']}, {share_text(figures)}, {where['length']} tokens each{beyond}, "
        f"float32{weights}, {unit(figures)}"
    ]
    passes = "  ".join(f"{x:.4f}" for x in bpb.passes[:8]) + ("  ..." if len(bpb.passes) > 8 else "")
    for name, text in {
        "decoded (exact)": f"{bpb.decoded:.4f}",
        "merged (parallel)": f"{bpb.merged:.4f}",
        "live gap": signed(bpb.live_gap),
        "zero memory": f"{bpb.zero_memory:.4f}",
        f"passes of {bpb.schedule}": passes,
        "sweeps contract by": f"{bpb.contraction:.3f}" if bpb.residuals else "nothing to sweep (no recurrence)",
    }.items():
        lines.append(f"  {name:<28}{text}")
    lines += sweep_lines(bpb)
    lines.append("  decoded by position")
    lines += [f"    {label:<26}{x:.4f}" for label, x in bpb.by_position.items()]
    return "\n".join([*lines, f"  ({LEGEND})"])
