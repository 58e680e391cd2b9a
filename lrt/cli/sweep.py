"""`lrt sweep`: a grid of recipe overrides and seeds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from lrt.cli.parse import parse
from lrt.utils.require import require, require_at_least
from lrt.utils.terminal import show


@dataclass(frozen=True)
class SweepFlags:
    """Train every run of a sweep file that is not finished, then write OUT/results.jsonl, one line per run."""

    file: Positional[Path]
    """The sweep file (TOML; see sweeps/)."""
    out: Path | None = None
    """Folder of the runs; by default runs/sweeps/NAME."""
    cluster: str | None = None
    """Submit the runs as a job array instead: slurm, or submitit's local or debug executor. A [cluster] table in the
    file holds the executor's parameters, such as timeout_min or slurm_partition."""
    jobs: int | None = None
    """Runs at a time, each a process with one thread; by default one per core, or one on the GPU."""


FLAGS = SweepFlags


def main(args: list[str]) -> int:
    """Run the command; returns the exit code."""
    flags = parse(SweepFlags, args, "sweep")
    require_at_least(1, jobs=flags.jobs)
    executors = (None, "slurm", "local", "debug")
    shared = flags.cluster is None or flags.jobs is None
    require(shared, "--jobs is for runs on this machine; leave it out with --cluster, whose executor says how many run")
    require(flags.cluster in executors, f"--cluster is {flags.cluster}; use slurm, local, debug")

    from lrt.experiments.runner import at_once
    from lrt.experiments.sweep import read_sweep, run_sweep, sweep_tables

    runs, out = read_sweep(flags.file), flags.out or Path("runs/sweeps") / flags.file.stem
    resources = sweep_tables(flags.file).get("cluster", {}) if flags.cluster else {}
    show(run_sweep(runs, out, flags.jobs or at_once(), flags.cluster, **resources))
    return 0
