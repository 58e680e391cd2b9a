"""Where training's events go: a JSONL file, and a live progress bar (or plain lines where there is no terminal)."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

Event = dict[str, Any]
RECORDED = ("start", "train", "eval", "sample", "warning", "checkpoint")


class Jsonl:
    """Appends every event but preparation's to a file, one JSON object a line."""

    def __init__(self, path: Path):
        self.path = path

    def __call__(self, event: Event) -> None:
        if event["kind"] in RECORDED:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(event) + "\n")


class Live:
    """Progress on standard error: rate, time left, losses; evaluations and warnings stay above the bar."""

    EVERY = 10.0
    """Seconds between lines where there is no terminal."""

    def __init__(self, samples: bool = True):
        self.console, self.samples = Console(stderr=True, highlight=False), samples
        columns = (TextColumn("{task.description}"), BarColumn(20), TextColumn("{task.fields[note]}"))
        self.bar = Progress(*columns, console=self.console, transient=True)
        self.task, self.last = None, 0.0

    def __enter__(self) -> Live:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def __call__(self, event: Event) -> None:
        show = {
            "prepare": self._prepare, "start": self._start, "train": self._train, "eval": self._eval,
            "sample": self._sample, "warning": self._warning,
        }  # fmt: skip
        if event["kind"] in show:
            show[event["kind"]](event)

    def _advance(self, description: str, done: float, total: float | None, note: str) -> None:
        if self.console.is_terminal:
            if self.task is None:
                self.task = self.bar.add_task("", note="")
                self.bar.start()
            self.bar.update(self.task, description=description, completed=done, total=total, note=note)
        elif time.monotonic() - self.last >= self.EVERY:
            self.last = time.monotonic()
            share = f"{done / total:4.0%}" if total else ""
            self.say(f"{description} {share} {note}")

    def say(self, text: str, style: str = "") -> None:
        """A line that stays."""
        self.console.print(text, style=style, markup=False, soft_wrap=True)

    def _prepare(self, e: Event) -> None:
        self._advance(f"data: {e['note']}", e["done"], e["total"], f"{e['done'] / 1e6:.1f} MB")

    def _start(self, e: Event) -> None:
        groups = ", ".join(f"{name} {n:,}" for name, n in e["parameters"].items() if n and name != "total")
        self.say(f"{e['name']}: {e['parameters']['total']:,} parameters ({groups})")
        where = f"{e['schedule']}, {e['steps']:,} steps from {e['step']:,}, {e['device']} {e['dtype']}"
        self.say(f"  {where}; MFU over {e['peak_flops'] / 1e9:,.0f} GFLOP/s ({e['peak_source']})")

    def _train(self, e: Event) -> None:
        passes = " ".join(f"{x:.3f}" for x in e["per_pass"][:6]) + (" ..." if len(e["per_pass"]) > 6 else "")
        left = time.strftime("%H:%M:%S" if e["seconds_left"] >= 3600 else "%M:%S", time.gmtime(e["seconds_left"]))
        note = (
            f"step {e['step']:,}/{e['steps']:,}  loss {e['loss']:.3f} (passes {passes})  "
            f"{e['tokens_per_second']:,.0f} tok/s  MFU {e['mfu']:.0%}  {left} left"
        )
        self._advance("train", e["step"], e["steps"], note)

    def _eval(self, e: Event) -> None:
        b = e["bpb"]
        residuals = " ".join(f"{r:.1e}" for r in b["residuals"][:5])
        self.say(
            f"  step {e['step']:,}: BPB decoded {b['decoded']:.4f}, merged {b['merged']:.4f}, zero memory "
            f"{b['zero_memory']:.4f}, live gap {b['live_gap']:+.4f}"
            + (f", sweep residuals {residuals}" if residuals else "")
        )

    def _sample(self, e: Event) -> None:
        if self.samples:
            text = " ".join(e["text"].split())
            self.say(f"  sample: {text[:150]}", style="dim")

    def _warning(self, e: Event) -> None:
        self.say(f"  warning: {e['text']}", style="yellow")
