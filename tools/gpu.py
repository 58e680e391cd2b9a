"""Half an hour of one GPU, in order of worth and within its minutes; started by tools/gpu.sh (docs/gpu.md).

Each stage is a process with a log of its own in the folder of results. One that reaches its share of the time, or the
deadline, is asked to end (SIGINT, then SIGTERM), and what it has written stays. A stage that fails stops no other.
Given again with the same folder it goes on: stages that ended well are left out, and nothing is written over.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PYTHON, LRT = sys.executable, [sys.executable, "-m", "lrt"]
GRACE = 30.0
"""Seconds that a stage has to end once it was asked to; kept free before the deadline."""
INTERRUPTED = "interrupted"
WELL = {"ended": "by itself", "code": 0}
SETTINGS = os.environ | {"PYTHONUNBUFFERED": "1"}
"""A stage's environment: a line is in its log as soon as it is said."""


class Stage(NamedTuple):
    """One process."""

    name: str
    command: list[str]
    share: float = 1.0
    """The most of the time that is left when it begins."""
    again: bool = False
    """Whether it runs anew though it ended well before: it reads what another stage has gone on with."""


TESTS = "-m pytest tests/test_cuda.py -v -W default -o addopts=--strict-markers --timeout 180"
STEPS = "bench train --device cuda --recipe d12 --batch 16 --compile --repeats 10 --json --schedules"
SCHEDULES = ("interleaved-2", "settled-1", "settled-2")
"""Each timed beside the plain step in a process of its own, so that what is cut off or fails takes no other along."""
DECODING = "bench decode --device cuda --recipe d12 --batches 1 8 32 --contexts 128 1024 4096 --json"
TINY_STEPS = "bench train --device cpu --depth 1 --width 32 --vocab-size 64 --batch 2 --length 16 --repeats 1"
TINY_DECODING = "bench decode --device cpu --recipe cpu_demo --batches 1 --contexts 16 --steps 1 --no-compile --json"


def stages(flags: argparse.Namespace, sweep: Path) -> list[Stage]:
    """Everything, in order of worth."""
    tests, runs = [PYTHON, *TESTS.split()], flags.out / "runs"
    tests += ["-m", "not slow", "-k", "cpu and (test_ops or test_head_loss)"] if flags.rehearse else ["-m", "cuda"]
    timed = [*LRT, *(f"{TINY_STEPS} --no-memory --json --schedules" if flags.rehearse else STEPS).split()]
    device = "cpu" if flags.rehearse else "cuda"
    flexible = Stage("bench_train_flex", [*timed, "interleaved-2", "--attention", "flex"], 0.15)  # trains on cuda alone
    return [
        Stage("tests", tests, 0.25),
        *(Stage(f"bench_train_{schedule}", [*timed, schedule], 0.15) for schedule in SCHEDULES),
        Stage("bench_decode", [*LRT, *(TINY_DECODING if flags.rehearse else DECODING).split()], 0.25),
        *([] if flags.rehearse else [flexible]),
        Stage("sweep", [*LRT, "sweep", str(sweep), "--out", str(runs), "--jobs", "1"], 0.9),
        Stage("collect", [PYTHON, __file__, "--collect", str(sweep), "--out", str(runs)], again=True),
        Stage("prefill", [PYTHON, __file__, "--prefill", str(runs), "--device", device], again=True),
    ]


def check(device: str) -> dict[str, object]:
    """What there is. SystemExit: no such device, or a torch that is too old."""
    import torch

    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 11):
        raise SystemExit(f"tools/gpu.sh: torch is {torch.__version__}; 2.11 or newer is needed")
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("tools/gpu.sh: torch sees no CUDA device; try it with --rehearse, which takes the CPU")
    found: dict[str, object] = {"torch": torch.__version__, "python": sys.version.split()[0], "device": device}
    if device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        found |= {"card": torch.cuda.get_device_name(), "capability": f"{major}.{minor}", "cuda": torch.version.cuda}
    return found


def sweep_file(flags: argparse.Namespace) -> Path:
    """The sweep, on the text that was asked for."""
    text = (ROOT / "sweeps" / ("gpu_rehearsal.toml" if flags.rehearse else "gpu.toml")).read_text("utf-8")
    if flags.books is not None:
        text = re.sub(r'source = "[^"]*"', lambda _: f"source = {json.dumps(str(flags.books.resolve()))}", text)
    path = flags.out / "sweep.toml"
    path.write_text(text, "utf-8")
    return path


def run(stage: Stage, out: Path, deadline: float) -> dict[str, object]:
    """Run a stage within its share of the time; what came of it."""
    begun = time.monotonic()
    left = deadline - begun - GRACE
    if left <= 0:
        return {"stage": stage.name, "ended": "no time was left"}
    with open(out / f"{stage.name}.log", "ab") as log:
        process = started(stage.command, log)
        try:
            ended = "by itself" if waited(process, left * stage.share) else stopped(process, "at its time")
        except KeyboardInterrupt:
            ended = stopped(process, INTERRUPTED)
    seconds = round(time.monotonic() - begun, 1)
    return {"stage": stage.name, "ended": ended, "code": process.returncode, "seconds": seconds}


def started(command: list[str], log: Any) -> subprocess.Popen[bytes]:
    """A process in a group of its own, which writes to `log`."""
    return subprocess.Popen(
        command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, env=SETTINGS
    )


def waited(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Whether it ends within so many seconds."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def stopped(process: subprocess.Popen[bytes], why: str) -> str:
    """Ask the stage's first process to end, then all of them, then end them; `why`."""
    process.send_signal(signal.SIGINT)
    for how in (signal.SIGTERM, signal.SIGKILL):
        if waited(process, GRACE / 2):
            break
        os.killpg(process.pid, how)
    process.wait()
    return why


def ended_well(log: Path) -> set[str]:
    """The stages that have ended by themselves and without a fault, in earlier calls with this folder."""
    lines = [json.loads(line) for line in log.read_text("utf-8").splitlines()] if log.exists() else []
    return {line["stage"] for line in lines if WELL.items() <= line.items()}


def collect(sweep: Path, out: Path) -> None:
    """Write the records of the sweep's finished runs."""
    from lrt.experiments.sweep import collect, read_sweep

    print(f"{len(collect(read_sweep(sweep), out))} runs in {out / 'results.jsonl'}")


def prefill(runs: Path, device: str) -> int:
    """Time prefill and scoring on the last finished run with a recurrence, the largest there is."""
    done = [json.loads(line) for line in (runs / "results.jsonl").read_text("utf-8").splitlines()]
    arms = [record["name"] for record in done if record["arm"] in ("default", "paper")]
    if not arms:
        print("no run with a recurrence has ended")
        return 0
    length = str(min(1024, json.loads((runs / arms[-1] / "config.json").read_text("utf-8"))["train"]["length"]))
    grid = ["--batches", "1", "--contexts", length, "--lengths", length, "--steps", "1", "--no-compile"]
    return subprocess.run(
        [*LRT, "bench", "decode", "--checkpoint", runs / arms[-1], "--device", device, *grid]
    ).returncode


def parsed(arguments: list[str]) -> argparse.Namespace:
    """The flags of tools/gpu.sh, and of its own stages."""
    parser = argparse.ArgumentParser(prog="tools/gpu.sh", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("minutes", nargs="?", type=float, default=30.0)
    parser.add_argument("--books", type=Path, help="a parquet or text file to train on, in place of Python sources")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "gpu")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument("--collect", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--prefill", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)
    flags = parser.parse_args(arguments)
    if not 0 < flags.minutes < 24 * 60:
        parser.error(f"minutes are {flags.minutes:g}; give a number between 0 and 1440")
    if flags.books is not None and not flags.books.is_file():
        parser.error(f"--books {flags.books} is no file")
    return flags


def main(arguments: list[str]) -> int:
    """All stages; 0 unless one that ended by itself failed, 130 if they were interrupted."""
    flags, begun = parsed(arguments), time.monotonic()
    if flags.collect or flags.prefill:
        return prefill(flags.prefill, flags.device) if flags.prefill else collect(flags.collect, flags.out) or 0
    deadline = begun + 60 * flags.minutes
    flags.out.mkdir(parents=True, exist_ok=True)
    found = check("cpu" if flags.rehearse else "cuda")
    print(json.dumps(found), flush=True)
    for how in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # SIGINT too: what & has started would ignore it
        signal.signal(how, signal.default_int_handler)
    return carried_out(flags, found, deadline)


def carried_out(flags: argparse.Namespace, found: dict[str, object], deadline: float) -> int:
    """Run the stages that have not ended well yet, and note what came of each as it ends; the exit code."""
    failed, before = 0, ended_well(flags.out / "stages.jsonl")
    with open(flags.out / "stages.jsonl", "a", encoding="utf-8") as log:
        print(json.dumps(found), file=log, flush=True)
        for stage in stages(flags, sweep_file(flags)):
            if stage.name in before and not stage.again:
                print(f"{stage.name} has ended well before: see {flags.out / stage.name}.log", flush=True)
                continue
            result = run(stage, flags.out, deadline)
            failed += result["ended"] == WELL["ended"] and result["code"] != WELL["code"]
            for to in (log, sys.stdout):
                print(json.dumps(result), file=to, flush=True)
            if result["ended"] == INTERRUPTED:
                return 130
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
