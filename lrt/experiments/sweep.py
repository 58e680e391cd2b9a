"""Sweeps: a grid of recipe overrides and seeds, each run a process and a folder, resumable.

A sweep file:

    recipe = "cpu_demo"                      # what every run starts from
    seeds = [0, 1, 2]
    base.train.eval_every = 0                # overrides of every run, by the names that `lrt train` knows
    [grid]                                   # every combination of these
    train.horizon = ["compute=10", "compute=20"]
    [arms."settled layerwise"]               # and every arm of these, whose own values win over the grid's
    train.schedule = "settled-1..3"
    [arms.plain]
    train.schedule = "parallel"
    model.memory = { projection = "none", residual = false }
"""

from __future__ import annotations

import itertools
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lrt.config.recipes import recipe
from lrt.config.run import RunConfig, from_dict, merged, to_dict
from lrt.experiments.record import record
from lrt.experiments.runner import run_all
from lrt.training.logging import Jsonl, Live, Sink
from lrt.training.trainer import prepare_data, train
from lrt.utils.dotted import leaves, nested
from lrt.utils.file_lock import LOCK
from lrt.utils.files import is_there, read_json, read_toml, require_fields, sealed, write_jsonl, write_sealed
from lrt.utils.new_folder import require_makable
from lrt.utils.require import require

RECORD = "record.json"
KEYS: dict[str, type] = {"recipe": str, "seeds": list, "base": dict, "grid": dict, "arms": dict, "cluster": dict}


@dataclass(frozen=True)
class Run:
    """One run of a sweep."""

    name: str
    """Its folder's name."""
    arm: str
    grid: dict[str, Any]
    """The grid's values here, by dotted name."""
    config: RunConfig


def read_sweep(path: Path) -> list[Run]:
    """The runs of a sweep file: for each combination of the grid, for each seed, every arm. ValueError: bad files."""
    data = sweep_tables(path)
    seeds: list[Any] = data.get("seeds", [0])
    arms: dict[str, Any] = data.get("arms", {"run": {}})
    require(bool(seeds) and all(type(s) is int for s in seeds), f"{path}: seeds are {seeds!r}; give a list of numbers")
    require(all(isinstance(arm, dict) for arm in arms.values()), f"{path}: an arm is a table such as [arms.plain]")
    base = merged(to_dict(recipe(data.get("recipe", "cpu_demo"))), data.get("base", {}))
    runs = []
    for point, seed, (arm, changes) in itertools.product(_points(data.get("grid", {}), path), seeds, arms.items()):
        settings = merged(merged(base, nested(point.items())), changes)
        name = _slug("-".join([arm, *(str(v).replace("=", "") for v in point.values()), f"seed{seed}"]))
        settings = merged(settings, nested([("name", name), ("train.seed", seed)]))
        runs.append(Run(name, arm, point, from_dict(RunConfig, settings, f"{path}, arm {arm!r}: config")))
    names = [run.name for run in runs]
    twice = {name for name in names if names.count(name) > 1}
    require(not twice, f"{path}: {', '.join(sorted(twice))} would be run twice; name arms and seeds apart")
    return runs


def sweep_tables(path: Path) -> dict[str, Any]:
    """The tables of a sweep file. ValueError: no TOML, or other tables than KEYS."""
    require(path.is_file(), f"sweep file {path} does not exist; see sweeps/ for examples")
    data = read_toml(path, "sweep file")
    for key, value in data.items():
        require(key in KEYS, f"{path}: unknown {key}; use {', '.join(KEYS)}")
        require(isinstance(value, KEYS[key]), f"{path}: {key} is {value!r}; it must be a {KEYS[key].__name__}")
    return data


def _points(grid: dict[str, Any], path: Path) -> list[dict[str, Any]]:
    axes = dict(leaves(grid))
    for name, values in axes.items():
        require(isinstance(values, list) and bool(values), f"{path}: grid.{name} is {values!r}; give a list of values")
    return [dict(zip(axes, point, strict=True)) for point in itertools.product(*axes.values())]


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-").lower()


def run_sweep(runs: list[Run], out: Path, jobs: int, cluster: str | None = None, **resources: Any) -> str:
    """Train and record what is not finished, `jobs` at a time; write results.jsonl; say what happened.

    With `cluster` the runs become a job array of submitit's executor of that name, with its parameters `resources`.
    """
    require_makable(out)
    out.mkdir(parents=True, exist_ok=True)  # before hours are spent on what could not be written
    todo = [run for run in runs if not finished(run, out / run.name)]
    print(f"{len(runs)} runs, {len(runs) - len(todo)} finished before", file=sys.stderr)
    with Live(samples=False) as live:
        for config in {to_key(run.config): run.config for run in todo}.values():
            prepare_data(config.data, [live])  # once, before processes would do it side by side
        configs = {run.name: run.config for run in todo}
        failed = _submit(configs, out, cluster, resources) if cluster else run_all(configs, out, _run_one, jobs, live)
    lines = collect(runs, out)
    if cluster in (None, "local", "debug"):
        lost = [run.name for run in todo if not (out / run.name / RECORD).exists()]
        failed |= {name: "it ended without a record" for name in lost if name not in failed}
    for name, reason in failed.items():
        print(f"{name} failed: {reason}", file=sys.stderr)
    require(not failed, f"{len(failed)} of {len(todo)} runs failed; mend them and start the sweep again")
    return f"{len(lines)} of {len(runs)} runs in {out / 'results.jsonl'}"


def _submit(configs: dict[str, RunConfig], out: Path, cluster: str, resources: dict[str, Any]) -> dict[str, str]:
    """Hand the runs to submitit; waits for its local executors, not for a cluster's queue."""
    import submitit

    executor = submitit.AutoExecutor(folder=out / "jobs", cluster=cluster)
    executor.update_parameters(**({"name": "lrt", "timeout_min": 24 * 60} | resources))
    folders = [(out / name).resolve() for name in configs]
    jobs = executor.map_array(_run_job, list(configs.values()), folders) if configs else []
    if cluster not in ("local", "debug"):
        ids = ", ".join(job.job_id for job in jobs)
        print(f"submitted {ids or 'nothing'}; when they have ended, give the same command again", file=sys.stderr)
        return {}
    errors = [(name, job.exception()) for name, job in zip(configs, jobs, strict=True)]
    return {name: str(error).strip().splitlines()[-1] for name, error in errors if error is not None}


def _run_job(config: RunConfig, folder: Path) -> None:
    _run_one(config, folder, lambda event: None)


def to_key(config: RunConfig) -> str:
    """Configurations of one key share their data."""
    return json.dumps(to_dict(config)["data"])


def finished(run: Run, folder: Path) -> bool:
    """Whether a run has been recorded; ValueError if its folder holds one of other settings."""
    if not is_there(folder / RECORD):
        return False
    stored = read_json(folder / RECORD, "record")
    require_fields(stored, {"settings": dict}, str(folder / RECORD))
    settings = stored["settings"]
    before = dict(leaves(to_dict(from_dict(RunConfig, settings, str(folder / RECORD)))))  # fields since then: defaults
    different = [name for name, value in leaves(to_dict(run.config)) if before[name] != value]
    require(not different, f"{folder} was run with another {', '.join(different)}; choose another --out or remove it")
    return True


def _run_one(config: RunConfig, folder: Path, tell: Sink) -> None:
    """Train (or go on with) one run and record it; in a process of its own."""
    names = [file.name for file in folder.iterdir()] if folder.exists() else []
    strange = [name for name in names if name != LOCK and not name.endswith(".tmp")]  # which a killed beginning leaves
    require(
        not strange or "config.json" in names,
        f"{folder} holds something else than a run; move it, or choose another --out",
    )
    train(config, folder, resume=None, sinks=[tell, Jsonl(folder / "metrics.jsonl")])
    result = record(folder)
    write_sealed(folder / RECORD, result | {"settings": to_dict(config)})


def collect(runs: list[Run], out: Path) -> list[dict[str, Any]]:
    """Write the finished runs' records to results.jsonl, in the file's order; returns them."""
    lines = []
    for run in runs:
        if (out / run.name / RECORD).exists():
            result = read_json(out / run.name / RECORD, "record")
            del result["settings"]
            lines.append({"arm": run.arm, "grid": run.grid} | result)
    write_jsonl(out / "results.jsonl", map(sealed, lines))
    return lines
