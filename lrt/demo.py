"""`lrt demo`: a plain transformer and two LRTs at equal effective compute, trained here and now, and compared."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lrt import accounting
from lrt.checkpoint import write_json
from lrt.config import RunConfig, require
from lrt.console import Jsonl, Live
from lrt.decode import generate
from lrt.hardware import peak_memory
from lrt.model import LRT
from lrt.recipes import cpu_demo, cpu_demo_paper, cpu_demo_plain
from lrt.report import curves, page, read_run, table
from lrt.sampling import Sampling
from lrt.text import complete
from lrt.train import Result, train

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
    """Train what is not yet trained, and report; returns the table and samples as text."""
    require(demo.compute is None or demo.compute > 0, f"--compute is {demo.compute}; it must be positive")
    started = time.perf_counter()
    rows = []
    for name, make in ARMS.items():
        folder = demo.out / name
        require(not folder.exists(), f"{folder} exists; remove it or choose another --out")
        with Live(samples=False) as live:
            config = _configure(make(), name, demo)
            result = train(config, folder, sinks=[live, Jsonl(folder / "metrics.jsonl")])
        rows.append(_row(name, config.train.schedule, result))
    return _write(demo.out, rows, time.perf_counter() - started)


def _configure(config: RunConfig, name: str, demo: Demo) -> RunConfig:
    horizon = config.train.horizon if demo.compute is None else f"compute={demo.compute}"
    training = replace(config.train, horizon=horizon, seed=demo.seed)
    return replace(config, name=name, train=training, data=replace(config.data, source=demo.source))


def _row(name: str, schedule: str, result: Result) -> dict[str, Any]:
    config, p, bpb = result.model.config, result.progress, result.bpb
    tokenizer = result.prepared.tokenizer
    prompt = Sampling(max_new_tokens=160, temperature=0.7, seed=1)
    return {
        "name": name,
        "schedule": schedule,
        "projection": config.memory.projection,
        "parameters": sum(accounting.parameters_by_group(config).values()),
        "scaling_parameters": accounting.scaling_parameters(config),
        "tokens": p.tokens,
        "token_forwards": p.token_forwards,
        "effective_compute": p.effective_forwards,
        "flops": p.flops,
        "wall_seconds": p.seconds,
        "bpb": {"zero_memory": bpb.zero_memory, "passes": bpb.passes, "merged": bpb.merged, "decoded": bpb.decoded},
        "live_gap": bpb.live_gap,
        "bpb_by_position": bpb.by_position,
        "sweep_residuals": bpb.residuals,
        "decode_tokens_per_second": decoding_speed(result.model),
        "peak_memory_bytes_of_the_process": peak_memory(result.model.device),
        "sample": PROMPT + "".join(complete(result.model, tokenizer, PROMPT, prompt)),
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
        f"third); tokens seen differ. {torch.get_num_threads()} CPU threads, evaluation in float32 on the same rows, "
        f"{seconds:.0f} s in all."
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
