"""`lrt core`: CORE of a run, from a local evaluation bundle; `lrt eval --suite core` in fewer words."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from lrt.cli.parse import parse
from lrt.cli.suites import SuiteRequest, score_suite
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
    out: Path | None = None
    """Folder of the record, core-MODE.jsonl, and of what is kept of an evaluation that is stopped; by default
    RUN/suites."""
    normalised: bool = False
    """Score the texts even if the tokens lose some of them; figures are of the normalised text then."""
    device: Device = "auto"
    """cpu, cuda, mps (untested) or auto."""
    json: bool = False
    """Print one JSON object."""


FLAGS = CoreFlags


def main(args: list[str]) -> int:
    """Run the command; returns the exit code."""
    flags = parse(CoreFlags, args, "core")
    require_at_least(1, limit=flags.limit)

    from lrt.evaluation.core import read_bundle
    from lrt.training.checkpoint import load_model
    from lrt.utils.hardware import resolve_device

    read_bundle(flags.bundle)  # what is wrong with it is told before a model is loaded
    loaded = load_model(flags.run, resolve_device(flags.device))
    request = SuiteRequest(
        "core", flags.bundle, mode=flags.mode, limit=flags.limit, out=flags.out, normalised=flags.normalised
    )
    print(score_suite(loaded, request, as_json=flags.json))
    return 0
