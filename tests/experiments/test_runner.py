"""Several runs together: what waits, what is done, and the time left, as they are shown."""

from __future__ import annotations

import io
import os
from multiprocessing import Pipe
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from lrt.config.run import RunConfig
from lrt.experiments import runner
from lrt.experiments.runner import Queue
from lrt.training.logging import Live


def test_the_time_left_counts_what_goes_and_what_waits():
    queue = Queue(["a", "b", "c", "d"], jobs=2)
    assert [queue.begin(), queue.begin()] == ["a", "b"]
    assert queue.seconds_left() is None
    queue.seconds["a"] = (10.0, 50.0)
    assert queue.seconds_left() is None  # b has not said anything yet
    queue.seconds["b"] = (20.0, 80.0)
    assert queue.seconds_left() == (50 + 80 + 2 * (60 + 100) / 2) / 2
    queue.end("a")
    assert queue.begin() == "c" and queue.seconds_left() is None
    queue.seconds["b"], queue.seconds["c"] = (90.0, 10.0), (1.0, 200.0)
    queue.end("b")
    queue.begin()
    queue.seconds["d"] = (1.0, 5.0)
    assert queue.seconds_left() == 200  # no shorter than the longest that goes
    assert (queue.event()["done"], queue.event()["total"], queue.event()["waiting"]) == (2, 4, [])


def test_what_comes_next_is_shown_when_a_run_begins():
    queue = Queue(["a", "b"], jobs=1)
    live, said = Live(), io.StringIO()
    live.console = Console(file=said, width=200)
    queue.begin()
    live(queue.event(changed=True))
    queue.seconds["a"] = (60.0, 60.0)
    live(queue.event(changed=True))
    first, second = said.getvalue().splitlines()
    assert "0 of 2 done; next b" in first and "left" not in first
    assert "about 03:00 of training left" in second


def test_the_bar_of_a_run_that_is_over_goes():
    live = Live()
    live.console = Console(file=io.StringIO(), force_terminal=True)
    live.bar.live.console = live.console
    for name in ("a", "b"):
        live.show({"kind": "stage", "what": "evaluation", "text": "step 9"}, name)
    live.end("a")
    live.end("never begun")
    assert [task.description for task in live.bar.tasks] == ["b: evaluation"]
    live.bar.stop()


def test_a_run_that_was_interrupted_ends_without_a_traceback(tmp_path: Path, monkeypatch):
    """After Ctrl-C nobody reads its events any more, while it still writes its checkpoint and says so."""
    monkeypatch.setattr(runner, "_end_with_parent", lambda: None)
    told = []

    def work(config: RunConfig, folder: Path, tell) -> None:
        tell({"kind": "checkpoint"})
        told.append(folder)
        raise endings.pop()

    endings = [ValueError("too late"), KeyboardInterrupt()]
    for code in (130, 1):
        reads, writes = Pipe(duplex=False)
        reads.close()
        with pytest.raises(SystemExit) as end:
            runner._guarded(work, RunConfig(), tmp_path, writes)
        assert end.value.code == code
    assert told == [tmp_path, tmp_path]


def test_a_run_that_is_killed_in_the_middle_of_an_event_leaves_the_others_alone():
    """The pipe then holds the length of an event, and half of it."""
    reads, writes = Pipe(duplex=False)
    os.write(writes.fileno(), b"\0\0\1\0half")
    writes.close()
    queue, live, failed = Queue(["a", "b"], jobs=1), Live(), {}
    queue.begin()
    dead = SimpleNamespace(join=lambda: None, exitcode=-9)
    running = {reads: ("a", dead)}
    runner._take(reads, running, failed, queue, live)
    assert running == {} and failed == {"a": "its process died; out of memory?"}
    assert (queue.waiting, queue.going) == (["b"], set())
