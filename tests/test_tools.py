"""The scripts in tools/, as they are typed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parent.parent / "tools"


@pytest.mark.parametrize("name", ["house.py", "width_fit.py", "over_steps.py"])
def test_tables_may_be_cut_by_a_pipe(name: str):
    """`| head` ended them in a traceback: all that print a table end by the signal then, as `cat` does."""
    assert "\n    signal.signal(signal.SIGPIPE, signal.SIG_DFL)" in (TOOLS / name).read_text(encoding="utf-8")


def test_nobody_reads_the_figures_of_the_house(tmp_path: Path):
    package = tmp_path / "small"
    package.mkdir()
    (package / "one.py").write_text("def f():\n    return 1\n" * 2000)
    (package / "__init__.py").write_text("import small.one\n")
    process = subprocess.Popen(
        [sys.executable, "-u", TOOLS / "house.py", package], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.close()
    _, errors = process.communicate()
    assert errors == b"" and process.returncode == -13
