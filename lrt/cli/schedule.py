"""`lrt schedule`: a schedule drawn."""

from __future__ import annotations

from pathlib import Path

from tyro.conf import Positional

from lrt.cli.parse import parse
from lrt.config.model import require
from lrt.schedule import Curriculum


def main(args: list[str]) -> int:
    """Run the command; returns the exit code."""
    from lrt.experiments import draw

    def draw_schedule(name: Positional[str], /, length: int = 16, out: Path | None = None) -> None:
        """Draw a schedule: passes down, positions across, the exact prefix marked.

        Args:
            name: such as interleaved-4, refinement-3, chunked-8, sequential, settled-1..3, hop-1,
                settled-1..3:p=0.8/0.1/0.1 or interleaved-2:weights=0/1.
            length: positions of the row.
            out: write a picture there too: .svg, .png or .pdf.
        """
        require(1 <= length <= 512, f"--length is {length}; a drawing takes 1 to 512 positions")
        plan = Curriculum.parse(name)
        found = plan.at_largest()
        if out is not None:
            draw.save(found, length, out)
        print("\n".join(filter(None, [draw.as_text(found, length), draw.draws(plan, length)])))

    parse(draw_schedule, args, "schedule")
    return 0
