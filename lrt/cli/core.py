"""`lrt core`: CORE of a run, from a local evaluation bundle."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from lrt.cli.parse import parse
from lrt.config.decoding import DEFAULT_MODE
from lrt.config.model import require_at_least
from lrt.config.run import Device


@dataclass(frozen=True)
class CoreFlags:
    """CORE of a run, decoded with memory, from the published evaluation bundle on this disk."""

    run: Positional[Path]
    """Run folder, or one of its checkpoints."""
    bundle: Path
    """Folder with core.yaml, eval_meta_data.csv and eval_data/, or one of task files as the gauntlet lays them out."""
    limit: int | None = None
    """Items of each task; by default all."""
    mode: str = DEFAULT_MODE
    """How texts are taken in: exact, jacobi, interleaved-G, or zero_memory."""
    device: Device = "auto"
    """cpu, cuda or auto."""
    json: bool = False
    """Print one JSON object."""


FLAGS = CoreFlags


def main(args: list[str]) -> int:
    """Run the command; returns the exit code."""
    flags = parse(CoreFlags, args, "core")
    require_at_least(1, limit=flags.limit)

    from lrt.evaluation.core import TASKS_OF_CORE, core, read_bundle
    from lrt.training.checkpoint import load_model
    from lrt.utils.hardware import resolve_device
    from lrt.utils.tables import Table

    tasks, loaded = read_bundle(flags.bundle), load_model(flags.run, resolve_device(flags.device))

    def tell(label: str, scores: dict[str, Any]) -> None:
        print(f"{label}: centred {scores['centred']:+.4f}, {scores['items']} items", file=sys.stderr, flush=True)

    result = core(loaded.model, loaded.tokenizer, tasks, limit=flags.limit, mode=flags.mode, tell=tell)
    rows = [
        [k, f"{t['accuracy']:.4f}", f"{t['centred']:+.4f} ± {t['centred_error']:.4f}", str(t["items"])]
        for k, t in result["tasks"].items()
    ]
    whole = "CORE" if len(tasks) == TASKS_OF_CORE else f"mean of {len(tasks)} tasks"
    last = [whole, "", f"{result['core']:+.4f} ± {result['core_error']:.4f}", ""]
    table = Table(["task", "accuracy", "centred", "items"], [*rows, last])
    print(json.dumps({"run": str(flags.run), "step": loaded.step} | result) if flags.json else table.markdown())
    return 0
