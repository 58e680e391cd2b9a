"""`lrt demo`: four models at equal training FLOPs, trained here and now, and compared in words.

A plain transformer, the same with a token shift, our LRT (the shift, and late in training the recurrence), and the
paper's recipe.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from lrt.config.decoding import SamplingParams
from lrt.config.experiments import DemoConfig
from lrt.config.recipes import cpu_demo, cpu_demo_paper, cpu_demo_plain, cpu_demo_shift
from lrt.config.run import RunConfig
from lrt.evaluation.score_names import LEGEND, signed
from lrt.experiments.curves import curves, read_run
from lrt.experiments.pages import glossary, page
from lrt.experiments.record import record
from lrt.experiments.runner import at_once, run_all
from lrt.inference.chat import complete
from lrt.model.flops import train_flops_per_token
from lrt.schedule import Curriculum
from lrt.training.budget import horizon
from lrt.training.checkpoint import load_model
from lrt.training.logging import Jsonl, Live, Sink
from lrt.training.trainer import prepare_data, train
from lrt.utils.files import write_sealed, write_text
from lrt.utils.hardware import resolve_device
from lrt.utils.new_folder import require_makable
from lrt.utils.require import require
from lrt.utils.tables import Table
from lrt.utils.terminal import command_name

ARMS: dict[str, Callable[[], RunConfig]] = {
    "plain": cpu_demo_plain,
    "shift": cpu_demo_shift,
    "lrt": cpu_demo,
    "paper": cpu_demo_paper,
}
LINES = {
    "plain": "a plain transformer",
    "shift": "the same; each token also sees the embedding of the token before",
    "lrt": "a Latent Recurrent Transformer: each token also gets one vector that the token before has computed",
    "paper": "the same by the paper's recipe",
}
"""What each arm is, for someone who sees them for the first time."""
FIGURES: dict[str, Callable[[dict[str, Any]], str]] = {
    "parameters": lambda r: f"{r['parameters']:,}",
    "training tokens": lambda r: f"{r['tokens']:,}",
    "token forwards": lambda r: f"{r['token_forwards']:,.0f}",
    "training seconds": lambda r: f"{r['wall_seconds']:.0f}",
    "BPB, zero memory": lambda r: f"{r['bpb']['zero_memory']:.4f}",
    "BPB, merged": lambda r: f"{r['bpb']['merged']:.4f}",
    "BPB, decoded": lambda r: f"{r['bpb']['decoded']:.4f}",
    "live gap": lambda r: signed(r["live_gap"]),
    "decoded tokens/s": lambda r: f"{r['decode_tokens_per_second']:,.0f}",
}
"""The rows of the table, from an arm's record; the arms stand side by side, so that a narrow screen holds them."""
REPORT_WORDS = ("bits per byte", "decoded", "merged", "zero memory", "live gap", "token forwards", "seed")
PROMPT = "def read_lines(path):\n"


def run_demo(demo: DemoConfig) -> str:
    """Train the arms, as many at a time as there are cores, and report; returns the table and samples as text."""
    require_makable(demo.out)
    for name in ARMS:
        folder = demo.out / name
        require(not folder.exists(), f"{folder} exists; remove it or choose another --out")
    started = time.perf_counter()
    configs = {name: _configure(make(), name, demo) for name, make in ARMS.items()}
    with Live(samples=False) as live:
        for text in opening(at_once()):
            live({"kind": "note", "text": text})
        prepare_data(next(iter(configs.values())).data, [live])
        longest = sorted(configs.items(), key=lambda named: _flops(named[1]), reverse=True)
        failed = run_all(dict(longest), demo.out, _train_arm, at_once(), live)
        require(not failed, "; ".join(f"{name}: {reason}" for name, reason in failed.items()))
        rows = [_row(config, demo.out / name, live) for name, config in configs.items()]
    return _write(demo.out, rows, time.perf_counter() - started)


def opening(jobs: int) -> list[str]:
    """What will happen, before it does."""
    together = f"{jobs} at a time" if jobs > 1 else "one after the other"
    begin = f"lrt demo trains {len(ARMS)} small models for the same training FLOPs, {together}, and compares them:"
    return [begin, *(f"  {name:<6} {line}" for name, line in LINES.items()), "Then it scores them and writes a report."]


def _configure(config: RunConfig, name: str, demo: DemoConfig) -> RunConfig:
    horizon = config.train.horizon if demo.compute is None else f"flops_of_plain={demo.compute}"
    training = replace(config.train, horizon=horizon, seed=demo.seed)
    return replace(config, name=name, train=training, data=replace(config.data, source=demo.source))


def _flops(config: RunConfig) -> float:
    t = config.train
    per_token = train_flops_per_token(config.model, Curriculum.parse(t.schedule), t.length)
    return per_token * horizon(config) * t.batch * t.length


def _train_arm(config: RunConfig, folder: Path, tell: Sink) -> None:
    train(config, folder, sinks=[tell, Jsonl(folder / "metrics.jsonl")])


def _row(config: RunConfig, folder: Path, live: Live) -> dict[str, Any]:
    """One arm's figures; decoding speed is measured here, once nothing else runs."""
    number = list(ARMS).index(config.name) + 1
    live({"kind": "stage", "what": "scoring", "text": f"{config.name}, {number} of {len(ARMS)}"})
    loaded = load_model(folder, resolve_device(config.train.device))
    prompt = SamplingParams(max_new_tokens=100, temperature=0.7, seed=1)
    sample = PROMPT + "".join(complete(loaded.model, loaded.tokenizer, PROMPT, prompt))
    return record(folder, longer=False) | {"sample": sample}


def _write(out: Path, rows: list[dict[str, Any]], seconds: float) -> str:
    table = Table(["", *ARMS], [[name, *map(text, rows)] for name, text in FIGURES.items()])
    figure = curves([read_run(out / row["name"]) for row in rows])
    figure.savefig(out / "report.png", dpi=130)
    about = (
        f"Equal training FLOPs ({rows[0]['flops'] / 1e12:.3g} TFLOP each), so the tokens seen differ. Each model had "
        f"one CPU core or the GPU. Evaluation is in float32 on the same rows; decoding is eager, one row. "
        f"{seconds:.0f} s in all."
    )
    samples = {f"sample: {row['name']}": row["sample"] for row in rows}
    name = "bits per byte of the normalised text" if rows[0]["normalised"] else "bits per byte"
    about += f" Bits per byte are of {rows[0]['scored']}."
    conclusion = verdict(rows)
    blocks = [
        ("verdict", conclusion),
        ("what the words mean", glossary(*REPORT_WORDS)),
        ("next", next_commands(out)),
        (name, table),
        ("loss and bits per byte", figure),
        *samples.items(),
    ]
    html = page("lrt demo", about, blocks)
    write_text(out / "report.html", html)
    write_sealed(out / "report.json", {"runs": rows, "seconds": seconds, "about": about, "verdict": conclusion})
    texts = [f"--- {name}\n{text}" for name, text in samples.items()]
    files = f"{out / 'report.html'}, report.png, report.json"
    return "\n\n".join([*texts, f"{table.markdown()}\n({LEGEND})", about, conclusion, next_commands(out), files])


def verdict(rows: list[dict[str, Any]]) -> str:
    """The comparison in words: who decodes best, and how far each arm is from the plain transformer."""
    bits = {row["name"]: row["bpb"]["decoded"] for row in rows}
    best = min(bits, key=lambda name: bits[name])
    others = [f"{name} {signed(bits[name] - bits['plain'], 3)}" for name in bits if name != "plain"]
    return (
        f"Verdict: {best} decodes best, {bits[best]:.3f} bits per byte (lower is better). Less the plain transformer: "
        f"{', '.join(others)}. One seed each: a difference below 0.03 is none. docs/results.md has several seeds."
    )


def next_commands(out: Path) -> str:
    """What to try next, ready to copy."""
    run, lrt = out / "lrt", command_name()
    follow = (f"chat {run}", f"sample {run} --prompt 'def '", f"serve {run}", f"analyze {run}")
    return "\n".join(["Try next:", *(f"  {lrt} {arguments}" for arguments in follow)])
