"""Where training's events go: a JSONL file, and a live progress bar (or plain lines where there is no terminal)."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from lrt.utils.files import parse_json, to_json
from lrt.utils.score_names import unit

Event = dict[str, Any]
Sink = Callable[[Event], None]
"""Receives events: `{"kind": "prepare" | "start" | "train" | "eval" | "sample" | "warning" | "checkpoint", ...}`."""
RECORDED = ("start", "train", "eval", "sample", "warning", "checkpoint")


class Jsonl:
    """Appends every event but preparation's to a file, one JSON object a line.

    A resumed run goes back to its checkpoint, and so does the file: what was recorded after it is dropped, and recorded
    again.
    """

    def __init__(self, path: Path):
        self.path = path

    def __call__(self, event: Event) -> None:
        if event["kind"] == "start" and self.path.exists():
            self._rewind(event["step"])
        if event["kind"] in RECORDED:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(to_json(event) + "\n")

    def _rewind(self, step: int) -> None:
        kept = [line for line in self.path.read_bytes().splitlines(keepends=True) if _until(line, step)]
        aside = self.path.with_name(self.path.name + ".tmp")
        aside.write_bytes(b"".join(kept))
        aside.replace(self.path)


def _until(line: bytes, step: int) -> bool:
    """Whether a recorded line is whole, and of no later step."""
    try:
        event = parse_json(line, "metrics", loose=True)
        return line.endswith(b"\n") and event.get("step", 0) <= step
    except (ValueError, AttributeError, TypeError):
        return False


class Live:
    """Progress on standard error: rate, time left, losses; evaluations and warnings stay above the bars.

    Several runs may report at once, each under a name of its own (`live.named`).
    """

    EVERY = 10.0
    """Seconds between lines of a run where there is no terminal."""

    def __init__(self, samples: bool = True):
        self.console, self.samples = Console(stderr=True, highlight=False), samples
        columns = (TextColumn("{task.description}"), BarColumn(20), TextColumn("{task.fields[note]}"))
        self.bar = Progress(*columns, console=self.console, transient=True)
        self.tasks: dict[str, TaskID] = {}
        self.last: dict[str, float] = {}

    def __enter__(self) -> Live:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def __call__(self, event: Event) -> None:
        self.show(event, "")

    def named(self, name: str) -> Callable[[Event], None]:
        """A sink for one of several runs."""
        return lambda event: self.show(event, name)

    def show(self, event: Event, name: str) -> None:
        """Show an event of the run called `name`."""
        if event["kind"] in ("prepare", "train"):
            self._advance(name, *(_prepared if event["kind"] == "prepare" else _trained)(event))
        kinds = {"start": _start, "eval": _eval, "sample": _sample, "warning": _warning}
        if event["kind"] in kinds and (self.samples or event["kind"] != "sample"):
            for text in kinds[event["kind"]](event):
                style = {"warning": "yellow", "sample": "dim"}.get(event["kind"], "")
                self.console.print(f"{name + ': ' if name else ''}{text}", style=style, markup=False, soft_wrap=True)

    def _advance(self, name: str, what: str, done: float, total: float | None, note: str) -> None:
        what = f"{name}: {what}" if name else what
        if self.console.is_terminal:
            if name not in self.tasks:
                self.tasks[name] = self.bar.add_task("", note="")
                self.bar.start()
            self.bar.update(self.tasks[name], description=what, completed=done, total=total, note=note)
        elif time.monotonic() - self.last.get(name, 0) >= self.EVERY:
            self.last[name] = time.monotonic()
            share = f"{done / total:4.0%}" if total else ""
            self.console.print(f"{what} {share} {note}", markup=False, soft_wrap=True)


def _prepared(e: Event) -> tuple[str, float, float | None, str]:
    return f"data: {e['note']}", e["done"], e["total"], f"{e['done'] / 1e6:.1f} MB"


def _trained(e: Event) -> tuple[str, float, float | None, str]:
    passes = " ".join(f"{x:.3f}" for x in e["per_pass"][:6]) + (" ..." if len(e["per_pass"]) > 6 else "")
    left = time.strftime("%H:%M:%S" if e["seconds_left"] >= 3600 else "%M:%S", time.gmtime(e["seconds_left"]))
    note = (
        f"step {e['step']:,}/{e['steps']:,}  loss {e['loss']:.3f} (passes {passes})  "
        f"{e['tokens_per_second']:,.0f} tok/s  MFU {e['mfu']:.0%}  {left} left"
    )
    return "train", e["step"], e["steps"], note


def _start(e: Event) -> list[str]:
    groups = ", ".join(f"{name} {n:,}" for name, n in e["parameters"].items() if n and name != "total")
    where = f"{e['schedule']}, {e['steps']:,} steps from {e['step']:,}, {e['device']} {e['dtype']}"
    peak = f"MFU over {e['peak_flops'] / 1e9:,.0f} GFLOP/s ({e['peak_source']})"
    return [f"{e['parameters']['total']:,} parameters ({groups})", f"  {where}; {peak}"]


def _eval(e: Event) -> list[str]:
    b = e["bpb"]
    residuals = " ".join(f"{r:.1e}" for r in b["residuals"][:5])
    text = (
        f"  step {e['step']:,}: {unit(b)} decoded {b['decoded']:.4f}, merged {b['merged']:.4f}, zero memory "
        f"{b['zero_memory']:.4f}, live gap {b['live_gap']:+.4f}"
    )
    return [text + (f", sweep residuals {residuals}" if residuals else "")]


def _sample(e: Event) -> list[str]:
    return [f"  sample: {' '.join(e['text'].split())[:150]}"]


def _warning(e: Event) -> list[str]:
    return [f"  warning: {e['text']}"]


def tell(sinks: Sequence[Sink], **event: Any) -> None:
    """Hand an event to every sink."""
    for sink in sinks:
        sink(event)
