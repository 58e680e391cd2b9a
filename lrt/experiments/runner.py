"""Several runs at a time, each in a process of its own, shown together."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from lrt.config.run import RunConfig
from lrt.training.logging import Live, Sink

Work = Callable[[RunConfig, Path, Sink], None]
"""What is done with a run: its configuration, its folder, and where its events go."""


def at_once() -> int:
    """Runs at a time: one per core, or one on the GPU."""
    return 1 if torch.cuda.is_available() else os.cpu_count() or 1


def run_all(configs: dict[str, RunConfig], out: Path, work: Work, jobs: int, live: Live) -> dict[str, str]:
    """Do `work` for every configuration, each in a process and on a core of its own; returns what failed, and why.

    Operations as small as a CPU run's gain next to nothing from a second thread, and lose much when its core is busy.
    """
    spawn = multiprocessing.get_context("spawn")
    waiting, running, failed = list(configs), {}, {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                name = waiting.pop(0)
                ours, theirs = spawn.Pipe(duplex=False)
                process = spawn.Process(target=_guarded, args=(work, configs[name], out / name, theirs))
                process.start()
                theirs.close()  # so that the process's end is the pipe's
                running[ours] = name, process
            for pipe in wait(list(running)):
                _take(pipe, running, failed, live)
    finally:
        for _, process in running.values():
            process.terminate()
    return failed


def _take(pipe: Any, running: dict[Any, Any], failed: dict[str, str], live: Live) -> None:
    """One event of a run, or its end."""
    name, process = running[pipe]
    try:
        event = pipe.recv()
    except EOFError:
        process.join()
        del running[pipe]
        if process.exitcode:
            failed.setdefault(name, "its process died; out of memory?")
        return
    if event["kind"] == "failed":
        failed[name] = event["text"]
    else:
        live.show(event, name)


def _guarded(work: Work, config: RunConfig, folder: Path, pipe: Connection) -> None:
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        work(config, folder, pipe.send)
    except (ValueError, OSError) as error:
        pipe.send({"kind": "failed", "text": " ".join(str(error).split())})
        raise SystemExit(1) from None


def _end_with_parent() -> None:
    """A sweep that was killed leaves no run behind that would write beside the next one's."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
