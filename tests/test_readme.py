"""What README says runs: its library example, and the commands it names."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

from lrt.cli.main import COMMANDS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_library_example_trains_and_samples(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len([line for line in example.splitlines() if line.strip()]) <= 15
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(compile(f"import torch\ntorch.manual_seed(0)\n{example}", "README.md", "exec"), {})
    assert "brown fox" in said.getvalue()


def test_every_command_it_names_exists():
    pages = [README, *(p.read_text(encoding="utf-8") for p in (ROOT / "docs").glob("*.md"))]
    named = {word for page in pages for word in re.findall(r"(?:^ +|`|bin/)lrt (\w+)", page, re.M)}
    assert {"train", "eval", "sample", "schedule"} <= named <= set(COMMANDS)


def test_make_targets_it_names_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^    make ([\w.-]+)", README, re.M):
        assert re.search(rf"^{re.escape(target)}:", makefile, re.M)
