"""`lrt report`: tables and pictures of recorded runs."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tyro.conf import Positional

from lrt.cli.parse import names_of, parse
from lrt.utils.files import one_line
from lrt.utils.require import require
from lrt.utils.terminal import show

if TYPE_CHECKING:
    from lrt.experiments.groups import RunGroup


@dataclass(frozen=True)
class ReportFlags:
    """Tables and pictures of what `lrt sweep` recorded: OUT/report.html, and PNGs."""

    files: Positional[tuple[Path, ...]]
    """JSON-lines files, one run a line."""
    out: Path = Path("runs/report")
    """Folder of the page and the pictures."""
    baseline: str = "plain"
    """Arm that differences are taken from; where a sweep has none of that name, its first arm."""
    into: Path | None = None
    """Markdown page whose part between the lrt report marks is replaced; its pictures go to img/ beside it."""


FLAGS = ReportFlags


def main(args: list[str]) -> int:
    """Run the command; returns the exit code."""
    flags = parse(ReportFlags, args, "report")
    require(bool(flags.files), "give at least one file of records, such as runs/sweeps/NAME/results.jsonl")
    for folder in filter(Path.is_dir, flags.files):
        raise ValueError(f"{folder} is a folder, not a file of records; {_instead(folder)}")

    from lrt.experiments.groups import of_right_kinds, read_groups
    from lrt.utils.new_folder import require_makable

    require_makable(flags.out)
    groups = read_groups(flags.files)
    require(bool(groups), f"{flags.files[0]} holds no records; give a file that does")
    arms = list(dict.fromkeys(group.arm for group in groups))
    known = "--baseline" not in names_of(args) or flags.baseline in arms
    require(known, f"--baseline is {flags.baseline!r}, which is no arm; give one of {one_line(', '.join(arms), 150)}")
    with of_right_kinds(f"{flags.files[0]}{' or the other files' * (len(flags.files) > 1)}"):
        text = _report(flags, groups)
    print(text)
    show(f"written: {flags.out / 'report.html'}", sys.stderr)
    return 0


def _report(flags: ReportFlags, groups: list[RunGroup]) -> str:
    """Write the page and the pictures; the report as Markdown."""
    from lrt.experiments.pages import page
    from lrt.experiments.report import ABOUT, markdown, replace_marked, report_blocks
    from lrt.utils.files import write_text

    blocks = report_blocks(groups, flags.baseline, flags.files)
    intro = f"From {', '.join(f.name for f in flags.files)}. {ABOUT}"
    flags.out.mkdir(parents=True, exist_ok=True)
    write_text(flags.out / "report.html", page("lrt report", intro, blocks))
    pictures = flags.out if flags.into is None else flags.into.parent / "img"
    text = markdown(blocks, pictures, "img/" if flags.into else "")
    if flags.into is not None:
        replace_marked(flags.into, text)
    return text


def _instead(folder: Path) -> str:
    """What to give in a folder's place: the first files of records in it."""
    files = (str(path) for pattern in ("*.jsonl", "*/*.jsonl") for path in folder.glob(pattern))
    records = sorted(name for name in files if not name.endswith("metrics.jsonl"))
    if not records:
        return "lrt sweep records runs; of one run lrt eval gives scores"
    return f"give {' or '.join(records[:4])}"
