"""`lrt demo`: a plain transformer and two LRTs at equal effective compute, trained here and now, and compared."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lrt import accounting
from lrt.checkpoint import load_model, read_json, write_json
from lrt.config import RunConfig
from lrt.console import Jsonl, Live
from lrt.decode import generate
from lrt.hardware import peak_memory, resolve_device
from lrt.model import LRT
from lrt.model_config import require
from lrt.recipes import cpu_demo, cpu_demo_paper, cpu_demo_plain
from lrt.report import curves, page, read_run, table
from lrt.sampling import Sampling
from lrt.schedule import Schedule
from lrt.text import complete
from lrt.train import horizon, prepare_data, train

ARMS: dict[str, Callable[[], RunConfig]] = {
    "plain": cpu_demo_plain,
    "lrt-shared-interleaved-2": cpu_demo_paper,
    "lrt-layerwise-settled-1-3": cpu_demo,
}
HEADER = (
    "method", "parameters", "tokens", "token forwards", "train s", "BPB zero memory", "merged", "decoded", "live gap",
    "decode tok/s",
)  # fmt: skip
PROMPT = "def read_lines(path):\n"


@dataclass(frozen=True)
class Demo:
    """Train three arms at equal effective compute, print one table, write report.html and report.json."""

    out: Path = Path("runs/demo")
    """Folder of the report; each arm's run is a folder in it. A finished arm is not trained again."""
    compute: float | None = None
    """Effective compute, in token forwards per scaling parameter; by default the recipe's."""
    source: str = "python"
    """Text to train on: `python` is the standard library's sources; see `lrt train --help`."""
    seed: int = 0
    """Seed of all arms."""


def run_demo(demo: Demo) -> str:
    """Train the arms, as many at a time as there are cores, and report; returns the table and samples as text."""
    require(demo.compute is None or demo.compute > 0, f"--compute is {demo.compute}; it must be positive")
    for name in ARMS:
        folder = demo.out / name
        require(not folder.exists(), f"{folder} exists; remove it or choose another --out")
    started = time.perf_counter()
    configs = {name: _configure(make(), name, demo) for name, make in ARMS.items()}
    with Live(samples=False) as live:
        prepare_data(next(iter(configs.values())), [live])
        spent = _train_all(configs, demo.out, live)
    rows = [_row(config, demo.out / name, spent[name]) for name, config in configs.items()]
    return _write(demo.out, rows, time.perf_counter() - started)


def _configure(config: RunConfig, name: str, demo: Demo) -> RunConfig:
    horizon = config.train.horizon if demo.compute is None else f"compute={demo.compute}"
    training = replace(config.train, horizon=horizon, seed=demo.seed)
    return replace(config, name=name, train=training, data=replace(config.data, source=demo.source))


def _train_all(configs: dict[str, RunConfig], out: Path, live: Live) -> dict[str, int]:
    """Train every arm in a process and on a core of its own; the peak memory of each.

    Operations this small gain next to nothing from a second thread, and lose much when its core is busy. The longest
    arms begin first. On cuda one arm has the device at a time.
    """
    spawn = multiprocessing.get_context("spawn")
    at_once = 1 if torch.cuda.is_available() else min(len(configs), os.cpu_count() or 1)
    longest = sorted(configs, key=lambda name: _flops(configs[name]), reverse=True)
    with spawn.Manager() as manager, ProcessPoolExecutor(at_once, spawn) as pool:
        events = manager.Queue()
        running = {name: pool.submit(_train_arm, configs[name], out / name, name, events) for name in longest}
        while not all(future.done() for future in running.values()) or not events.empty():
            with contextlib.suppress(queue.Empty):
                name, event = events.get(timeout=0.2)
                live.show(event, name)
            failed = [f for f in running.values() if f.done() and f.exception()]
            if failed:
                pool.shutdown(wait=True, cancel_futures=True)
                raise failed[0].exception() or AssertionError
        return {name: future.result() for name, future in running.items()}


def _flops(config: RunConfig) -> float:
    t = config.train
    per_token = accounting.train_flops_per_token(config.model, Schedule.parse(t.schedule), t.length)
    return per_token * horizon(config) * t.batch * t.length


def _train_arm(config: RunConfig, folder: Path, name: str, events: Any) -> int:
    torch.set_num_threads(1)
    result = train(config, folder, sinks=[lambda event: events.put((name, event)), Jsonl(folder / "metrics.jsonl")])
    return peak_memory(result.model.device)


def _row(config: RunConfig, folder: Path, peak: int) -> dict[str, Any]:
    """One arm's figures; decoding speed is measured here, once nothing else runs."""
    loaded = load_model(folder, resolve_device(config.train.device))
    result = read_json(folder / "result.json", "result")
    p, bpb, model = result["progress"], result["bpb"], loaded.model
    prompt = Sampling(max_new_tokens=100, temperature=0.7, seed=1)
    return {
        "name": config.name,
        "schedule": config.train.schedule,
        "projection": config.model.memory.projection,
        "parameters": sum(accounting.parameters_by_group(model.config).values()),
        "scaling_parameters": accounting.scaling_parameters(model.config),
        "tokens": p["tokens"],
        "token_forwards": p["token_forwards"],
        "effective_compute": p["effective_forwards"],
        "flops": p["flops"],
        "wall_seconds": p["seconds"],
        "bpb": {mode: bpb[mode] for mode in ("zero_memory", "passes", "merged", "decoded")},
        "live_gap": bpb["live_gap"],
        "bpb_by_position": bpb["by_position"],
        "sweep_residuals": bpb["residuals"],
        "decode_tokens_per_second": decoding_speed(model),
        "peak_memory_bytes": peak,
        "sample": PROMPT + "".join(complete(model, loaded.tokenizer, PROMPT, prompt)),
    }


def decoding_speed(model: LRT, tokens: int = 100) -> float:
    """Greedy tokens per second of one row, after the first few, text not included."""
    free = Sampling(max_new_tokens=tokens, temperature=0.0, stop_tokens=())
    clocks = [time.perf_counter() for _ in generate(model, [[0]], free)]
    skipped = min(10, len(clocks) - 2)
    return (len(clocks) - 1 - skipped) / (clocks[-1] - clocks[skipped])


def _write(out: Path, rows: list[dict[str, Any]], seconds: float) -> str:
    cells = [_cells(row) for row in rows]
    figure = curves([read_run(out / row["name"]) for row in rows])
    figure.savefig(out / "report.png", dpi=130)
    about = (
        f"Equal effective compute ({rows[0]['effective_compute']:,.0f} token forwards, one without gradient counted a "
        f"third); tokens seen differ. Each arm had one CPU core or the GPU; evaluation in float32 on the same rows; "
        f"decoding eager, one row; {seconds:.0f} s in all."
    )
    samples = {f"sample: {row['name']}": row["sample"] for row in rows}
    html = page("lrt demo", about, HEADER, cells, figure, samples)
    (out / "report.html").write_text(html, encoding="utf-8")
    write_json(out / "report.json", {"runs": rows, "seconds": seconds, "about": about})
    texts = [f"--- {name}\n{text}" for name, text in samples.items()]
    return "\n\n".join([table(HEADER, cells), about, *texts, f"{out / 'report.html'}, report.png, report.json"])


def _cells(row: dict[str, Any]) -> list[str]:
    bpb = row["bpb"]
    return [
        row["name"], f"{row['parameters']:,}", f"{row['tokens']:,}", f"{row['token_forwards']:,.0f}",
        f"{row['wall_seconds']:.0f}", f"{bpb['zero_memory']:.4f}", f"{bpb['merged']:.4f}", f"{bpb['decoded']:.4f}",
        f"{row['live_gap']:+.4f}", f"{row['decode_tokens_per_second']:,.0f}",
    ]  # fmt: skip
