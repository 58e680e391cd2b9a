"""Several runs at a time, each in a process of its own, shown together."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import threading
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from lrt.config.run import RunConfig
from lrt.training.logging import Event, Live, Sink

Work = Callable[[RunConfig, Path, Sink], None]
"""What is done with a run: its configuration, its folder, and where its events go."""


def at_once() -> int:
    """Runs at a time: one per core, or one on the GPU."""
    return 1 if torch.cuda.is_available() else os.cpu_count() or 1


class Queue:
    """Runs that wait, go and are over, and how long they will still take."""

    def __init__(self, names: list[str], jobs: int):
        self.waiting, self.going, self.total, self.jobs = names, set[str](), len(names), jobs
        self.seconds: dict[str, tuple[float, float]] = {}
        """By run: seconds of training spent and left, as it last said."""

    def begin(self) -> str:
        """The next run."""
        name = self.waiting.pop(0)
        self.going.add(name)
        return name

    def end(self, name: str) -> None:
        """A run is over."""
        self.going.discard(name)

    def seconds_left(self) -> float | None:
        """An estimate: what waits takes as long as the mean of what has begun. None: no run has said anything yet."""
        if not self.going <= set(self.seconds):
            return None
        left = [self.seconds[name][1] for name in self.going]
        totals = [spent + rest for spent, rest in self.seconds.values()]
        waiting = len(self.waiting) * sum(totals) / max(len(totals), 1)
        return max([*left, (sum(left) + waiting) / self.jobs])

    def event(self, changed: bool = False) -> Event:
        """What `Live` shows of it; `changed`: a run has begun."""
        done = self.total - len(self.waiting) - len(self.going)
        return {
            "kind": "queue", "done": done, "total": self.total, "waiting": list(self.waiting), "changed": changed,
            "seconds_left": self.seconds_left(),
        }  # fmt: skip


def run_all(configs: dict[str, RunConfig], out: Path, work: Work, jobs: int, live: Live) -> dict[str, str]:
    """Do `work` for every configuration, each in a process and on a core of its own; returns what failed, and why.

    Operations as small as a CPU run's gain next to nothing from a second thread, and lose much when its core is busy.
    """
    spawn = multiprocessing.get_context("spawn")
    running, failed, queue = {}, {}, Queue(list(configs), jobs)
    try:
        while queue.waiting or running:
            while queue.waiting and len(running) < jobs:
                name = queue.begin()
                ours, theirs = spawn.Pipe(duplex=False)
                process = spawn.Process(target=_guarded, args=(work, configs[name], out / name, theirs))
                process.start()
                theirs.close()  # so that the process's end is the pipe's
                running[ours] = name, process
                live(queue.event(changed=True))
            for pipe in wait(list(running)):
                _take(pipe, running, failed, queue, live)
    finally:
        for _, process in running.values():
            process.terminate()
    return failed


def _take(pipe: Any, running: dict[Any, Any], failed: dict[str, str], queue: Queue, live: Live) -> None:
    """One event of a run, or its end."""
    name, process = running[pipe]
    try:
        event = pipe.recv()
    except (EOFError, OSError):  # the latter where it was killed in the middle of an event
        process.join()
        del running[pipe]
        queue.end(name)
        live.end(name)
        if process.exitcode:
            failed.setdefault(name, "its process died; out of memory?")
        return
    if event["kind"] == "failed":
        failed[name] = event["text"]
        return
    live.show(event, name)
    if event["kind"] == "train":
        queue.seconds[name] = event["seconds"], event["seconds_left"]
        live(queue.event())


def _guarded(work: Work, config: RunConfig, folder: Path, pipe: Connection) -> None:
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        work(config, folder, partial(_tell, pipe))
    except (ValueError, OSError) as error:
        _tell(pipe, {"kind": "failed", "text": " ".join(str(error).split())})
        raise SystemExit(1) from None
    except KeyboardInterrupt:  # Ctrl-C reaches every process; the one that began the runs says so
        raise SystemExit(130) from None


def _tell(pipe: Connection, event: Event) -> None:
    """Say it, if anyone listens: who was interrupted no longer does, while the run still saves."""
    with contextlib.suppress(BrokenPipeError):
        pipe.send(event)


def _end_with_parent() -> None:
    """A sweep that was killed leaves no run behind that would write beside the next one's."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
