"""`lrt analyze`: where a run's memory acts."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from lrt.cli.parse import parse
from lrt.config.run import Device
from lrt.utils.require import require_at_least
from lrt.utils.terminal import show


@dataclass(frozen=True)
class AnalyzeFlags:
    """Where the memory of a run acts: scalars, gates, what is lost without each part, reach, contraction."""

    run: Positional[Path]
    """Run folder, or one of its checkpoints."""
    source: str | None = None
    """Text to analyse on instead of the run's validation split."""
    rows: int = 16
    """Rows."""
    out: Path | None = None
    """PNG of the heat map by layer and head; by default RUN/analysis.png."""
    device: Device = "auto"
    """cpu, cuda, mps (untested) or auto."""
    json: bool = False
    """Print one JSON object."""


FLAGS = AnalyzeFlags


def main(args: list[str]) -> int:
    """Run the command; returns the exit code."""
    flags = parse(AnalyzeFlags, args, "analyze")
    require_at_least(1, rows=flags.rows)

    from lrt.evaluation.bits_per_byte import Rows
    from lrt.evaluation.held_out import held_out
    from lrt.evaluation.memory_analysis import analyse, heat_map, tables
    from lrt.evaluation.score_names import share_text
    from lrt.training.checkpoint import load_model
    from lrt.utils.hardware import resolve_device
    from lrt.utils.new_folder import require_makable

    require_makable((flags.out or flags.run).parent)
    loaded = load_model(flags.run, resolve_device(flags.device))
    rows, of = held_out(loaded, flags.source, rows=flags.rows, length=loaded.config.train.length)
    scored = share_text({"rows": len(rows.tokens), "text": of.name, "share": of.share})
    findings = analyse(loaded.model, Rows(*(x.to(loaded.model.device) for x in rows)))
    picture = flags.out or loaded.run / "analysis.png"
    drawn = loaded.config.model.memory.gated
    if drawn:
        heat_map(findings).savefig(picture, dpi=130)
    text = "\n\n".join([scored, *(f"{heading}\n\n{table.markdown()}" for heading, table in tables(findings))])
    about = {"run": str(flags.run), "step": loaded.step, "scored": scored}
    if flags.json:
        print(json.dumps(about | findings))
    else:
        show(text)
    no_picture = "no picture: the model has no projections of a memory, whose map it would be"
    show(f"picture: {picture}" if drawn else no_picture, sys.stderr)
    return 0
