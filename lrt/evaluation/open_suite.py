"""The suites by name: tasks that others published or defined, as `lrt eval RUN --suite NAME` takes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from lrt.config.decoding import DEFAULT_MODE
from lrt.data.synthetic import TASKS, TaskRows, task_kind
from lrt.evaluation.blimp import blimp_suite
from lrt.evaluation.core import core_suite
from lrt.evaluation.suite import Suite
from lrt.evaluation.task_accuracy import LENGTHS, task_suite
from lrt.inference.loaded import Loaded
from lrt.utils.require import require

FROM_FILES: dict[str, Callable[[Path], Suite]] = {"core": core_suite, "blimp": blimp_suite}
"""Suites whose items somebody published, by name; they are read from a folder on this disk."""


def synthetic_suite(name: str, data: Path | None, lengths: Sequence[int], loaded: Loaded) -> Suite:
    """The synthetic task called `name` at `lengths`, by default multiples of the trained one by LENGTHS.

    ValueError: no such suite, data where none are read, or lengths that it does not take.
    """
    synthetic = name.partition("-")[0] in TASKS
    require(synthetic, f"there is no suite {name!r}; choose {', '.join(FROM_FILES)}, or a task: {', '.join(TASKS)}")
    task_kind(name)
    require(data is None, f"suite {name} is drawn as it is needed; leave out --suite-data")
    trained, task = loaded.config.train.length, TaskRows(name, 1)
    multiples = [n * trained for n in LENGTHS if task.takes(n * trained)]
    return task_suite(name, lengths or multiples, loaded.config.model.vocab_size)


def published_suite(name: str, data: Path | None, lengths: Sequence[int]) -> Suite | None:
    """The one of FROM_FILES called `name`, if there is one. ValueError: no data for it, or what is wrong with them."""
    if name not in FROM_FILES:
        return None
    require(data is not None, f"suite {name} is read from your disk; name its folder with --suite-data FOLDER")
    require(not lengths, f"--lengths are of synthetic tasks; suite {name} has none")
    assert data is not None
    return FROM_FILES[name](data)


def default_mode(name: str) -> str:
    """How a suite is scored unless told otherwise: tasks of state exactly, texts by sweeps."""
    return DEFAULT_MODE if name in FROM_FILES else "exact"
