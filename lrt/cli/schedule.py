"""`lrt schedule`: a schedule drawn."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from lrt.cli.parse import parse
from lrt.schedule import Curriculum
from lrt.utils.require import require
from lrt.utils.terminal import show


@dataclass(frozen=True)
class ScheduleFlags:
    """Draw a schedule: passes down, positions across, the exact prefix marked."""

    name: Positional[str]
    """Such as interleaved-4, refinement-3, chunked-8, sequential, settled-1..3, hop-1, settled-1..3:p=0.8/0.1/0.1 or
    interleaved-2:weights=0/1."""
    length: int = 16
    """Positions of the row."""
    out: Path | None = None
    """Write a picture there too: .svg, .png or .pdf."""


FLAGS = ScheduleFlags


def main(args: list[str]) -> int:
    """Run the command; returns the exit code."""
    flags = parse(ScheduleFlags, args, "schedule")
    require(1 <= flags.length <= 512, f"--length is {flags.length}; a drawing takes 1 to 512 positions")

    from lrt.experiments import draw

    plan = Curriculum.parse(flags.name)
    schedule = plan.at_largest()
    if flags.out is not None:
        draw.save(schedule, flags.length, flags.out)
    drawing = "\n".join(filter(None, [draw.as_text(schedule, flags.length), draw.draws(plan, flags.length)]))
    show(drawing if _spells(drawing) else drawing.translate(draw.ASCII))
    return 0


def _spells(text: str) -> bool:
    """Whether standard output can show every character."""
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return False
    return True
