"""Where training's events go: a JSONL file, and a live progress bar (or plain lines where there is no terminal)."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Column

from lrt.evaluation.score_names import LEGEND, signed, unit
from lrt.utils.files import parse_json, printable, to_json, write_whole
from lrt.utils.require import require
from lrt.utils.terminal import fitted

Event = dict[str, Any]
Sink = Callable[[Event], None]
"""Receives events by `kind`: prepare, start, note, train, stage, queue, eval, sample, warning, checkpoint."""
RECORDED = ("start", "note", "train", "eval", "sample", "warning", "checkpoint")
BARS = ("prepare", "train", "stage", "queue")
LEGENDS = {
    "start": "loss: nats per token, lower is better; passes: the same for each pass; MFU: share of the peak speed",
    "eval": f"{LEGEND}; sweep residuals: what is left to change in the memory after 1, 2, .. sweeps",
}
"""What an event's figures mean, said under the first of its kind."""


class Bar(NamedTuple):
    """What a progress bar shows."""

    activity: str
    done: float
    total: float | None
    """None: not known; the bar moves to and fro."""
    note: str


class Jsonl:
    """Appends every event but preparation's to a file, one JSON object a line.

    A resumed run goes back to its checkpoint, and so does the file: what was recorded after it is dropped, and recorded
    again.
    """

    def __init__(self, path: Path):
        self.path = path

    def __call__(self, event: Event) -> None:
        exists = self.path.exists()
        require(
            not exists or self.path.is_file(), f"{self.path} is no regular file; remove it, or choose another --out"
        )
        if event["kind"] == "start" and exists:
            self._rewind(event["step"])
        if event["kind"] in RECORDED:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(to_json(event) + "\n")

    def _rewind(self, step: int) -> None:
        kept = [line for line in self.path.read_bytes().splitlines(keepends=True) if _until(line, step)]
        write_whole(self.path, lambda aside: aside.write_bytes(b"".join(kept)))


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
        # The note takes what the line has left, and is cut at its end; name and bar stay whole.
        note = TextColumn("{task.fields[note]}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis"))
        columns = (TextColumn("{task.description}"), BarColumn(20 if self.console.width > 100 else 8), note)
        self.bar = Progress(*columns, console=self.console, transient=True, expand=True)
        self.tasks: dict[str, tuple[str, TaskID]] = {}
        """By run: what is going on, and its bar."""
        self.last: dict[str, float] = {}
        self.explained: set[str] = set()

    def __enter__(self) -> Live:
        return self

    def __exit__(self, *_: object) -> None:
        if self.tasks:
            self.bar.stop()

    def __call__(self, event: Event) -> None:
        self.show(event, "")

    def named(self, name: str) -> Callable[[Event], None]:
        """A sink for one of several runs."""
        return lambda event: self.show(event, name)

    def show(self, event: Event, name: str) -> None:
        """Show an event of the run called `name`."""
        if event["kind"] in BARS:
            bar = {"prepare": _prepared, "train": _trained, "stage": _stage, "queue": _queue}[event["kind"]](event)
            self._advance(name, bar, always=event["kind"] == "stage" or event.get("changed", False))
        lines = {"start": _start, "note": _note, "eval": _eval, "sample": _sample, "warning": _warning}
        if event["kind"] in lines and (self.samples or event["kind"] != "sample"):
            for text in lines[event["kind"]](event):
                style = {"warning": "yellow", "sample": "dim"}.get(event["kind"], "")
                self._print(f"{name + ': ' if name else ''}{text}", style)
        if event["kind"] in LEGENDS and event["kind"] not in self.explained:
            self.explained.add(event["kind"])
            self._print(f"  ({LEGENDS[event['kind']]})", "dim")

    def end(self, name: str) -> None:
        """The run called `name` is over: its bar goes."""
        if name in self.tasks:
            self.bar.remove_task(self.tasks.pop(name)[1])

    def _print(self, text: str, style: str = "") -> None:
        shown = printable(text)
        shown = fitted(shown, self.console.width) if self.console.is_terminal else shown
        self.console.print(shown, style=style, markup=False, soft_wrap=True)

    def _advance(self, name: str, bar: Bar, *, always: bool) -> None:
        """Move the bar of a run, or begin another one if it does something else now.

        Where there is no terminal: a line every now and then, or `always`.
        """
        shown = printable(f"{name}: {bar.activity}" if name else bar.activity)
        if self.console.is_terminal:
            before, task = self.tasks.get(name, ("", None))
            if task is None or before != bar.activity:
                if task is not None:
                    self.bar.remove_task(task)
                task = self.bar.add_task(shown, total=bar.total, note="")
                self.tasks[name] = (bar.activity, task)
                self.bar.start()
            self.bar.update(task, completed=bar.done, total=bar.total, note=bar.note)
        elif always or time.monotonic() - self.last.get(name, 0) >= self.EVERY:
            self.last[name] = time.monotonic()
            share = f"{bar.done / bar.total:4.0%} " if bar.total else ""
            self._print(f"{shown} {share}{bar.note}")


def _prepared(e: Event) -> Bar:
    """Totals are estimates, so that a bar ends where the text does."""
    total = e["total"] and max(e["total"], e["done"])
    return Bar(f"data: {e['note']}", e["done"], total, f"{e['done'] / 1e6:.1f} MB")


def _trained(e: Event) -> Bar:
    """What a reader looks for first stands first: a narrow terminal cuts the end."""
    passes = " ".join(f"{x:.3f}" for x in e["per_pass"][:6]) + (" ..." if len(e["per_pass"]) > 6 else "")
    note = (
        f"step {e['step']:,}/{e['steps']:,}  {_duration(e['seconds_left'])} left  loss {e['loss']:.3f}  "
        f"{e['tokens_per_second']:,.0f} tok/s  MFU {e['mfu']:.0%}  passes {passes}"
    )
    return Bar("train", e["step"], e["steps"], note)


def _duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return (f"{hours}:" if hours else "") + f"{rest // 60:02}:{rest % 60:02}"


def _queue(e: Event) -> Bar:
    parts = [f"{e['done']} of {e['total']} done"]
    parts += [f"about {_duration(e['seconds_left'])} of training left"] if e["seconds_left"] is not None else []
    parts += [f"next {', '.join(e['waiting'][:4])}{', ...' * (len(e['waiting']) > 4)}"] if e["waiting"] else []
    return Bar("all runs", e["done"], e["total"], "; ".join(parts))


def _stage(e: Event) -> Bar:
    return Bar(e["what"], 0, None, e["text"])


def _note(e: Event) -> list[str]:
    return [f"  {e['text']}"]


def _start(e: Event) -> list[str]:
    groups = ", ".join(f"{name} {n:,}" for name, n in e["parameters"].items() if n and name != "total")
    where = f"{e['schedule']}, {e['steps']:,} steps from {e['step']:,}, {e['device']} {e['dtype']}"
    peak = f"MFU over {e['peak_flops'] / 1e9:,.0f} GFLOP/s ({e['peak_source']})"
    times = [f"{times:,.3g}" for times in e.get("text_read", ())]
    read = [f"  its text is read {', '.join(times)} times"] if times else []
    return [f"{e['parameters']['total']:,} parameters ({groups})", f"  {where}; {peak}", *read]


def _eval(e: Event) -> list[str]:
    b = e["bpb"]
    residuals = " ".join(f"{r:.1e}" for r in b["residuals"][:5])
    text = (
        f"  step {e['step']:,}: {unit(b)} decoded {b['decoded']:.4f}, merged {b['merged']:.4f}, zero memory "
        f"{b['zero_memory']:.4f}, live gap {signed(b['live_gap'])}"
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
