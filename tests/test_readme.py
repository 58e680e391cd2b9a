"""What README and the documents say runs: the library example, every command, and every run folder they name."""

from __future__ import annotations

import contextlib
import importlib
import io
import re
import shlex
from pathlib import Path

import pytest

from lrt.cli.main import COMMANDS
from lrt.cli.parse import early_value, parse
from lrt.config.recipes import recipe
from lrt.experiments.demo import ARMS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {p.name: p for p in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))] if p.name != "log.md"}
COMMAND = re.compile(r"^ {4,}(?:[\w./-]*/)?(?:torchrun .*-m |srun .*-m )?lrt (\w+)(?= |$)(.*)$", re.M)
FOLDER = re.compile(r"(?<![\w/])runs/[\w/-]+")
DEMO = {*(f"runs/demo/{name}" for name in ARMS), "runs/demo/report"}
MADE = {"runs/data", "runs/NAME"}
"""Folders that need no command: where tokens are kept, and a placeholder."""


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


# Every command on every page, and every folder.


def commands(page: str) -> list[tuple[str, list[str]]]:
    """The commands that stand in blocks of a page, without comments: name and arguments."""
    joined = page.replace("\\\n", " ")
    return [(name, shlex.split(rest, comments=True)) for name, rest in COMMAND.findall(joined)]


def test_commands_are_found_where_they_are():
    page = "    .venv/bin/lrt eval runs/x --rows 3  # three\n\n`lrt train` text\n    lrt train: an error\n"
    page += "    torchrun --nproc-per-node 8 \\\n      -m lrt train --or-resume\n"
    assert commands(page) == [("eval", ["runs/x", "--rows", "3"]), ("train", ["--or-resume"])]
    assert sum(len(commands(p.read_text("utf-8"))) for p in PAGES.values()) > 30


@pytest.mark.parametrize("name", PAGES)
def test_every_command_on_a_page_is_understood(name: str):
    for command, args in commands(PAGES[name].read_text(encoding="utf-8")):
        assert command in COMMANDS, command
        options = {}
        if command == "train":
            base = recipe(early_value(args, "--recipe", "cpu_demo"))
            options["default"] = importlib.import_module("lrt.cli.train").TrainFlags(config=base, recipe=base.name)
        flags = importlib.import_module(f"lrt.cli.{command}").FLAGS
        parse(flags[args.pop(0)] if command == "bench" else flags, args, command, **options)


def folders_made(page: str) -> set[str]:
    """Run folders that a page's commands and calls write, or that a sweep of its name does."""
    made = set(re.findall(r"--out[ =](runs/[\w/-]+)", page))
    made |= set(re.findall(r'lrt\.train\(\s*[^,]+,\s*"(runs/.+?)"', page))
    unnamed = (args for name, args in commands(page) if name == "train" and not early_value(args, "--out", ""))
    made |= {f"runs/{early_value(args, '--recipe', 'cpu_demo')}" for args in unnamed if "--resume" not in args}
    return made | {f"runs/sweeps/{stem}" for stem in re.findall(r"lrt sweep sweeps/(\w+)\.toml", page)}


@pytest.mark.parametrize("name", PAGES)
def test_every_run_that_a_page_names_is_made_by_the_demo_or_on_the_page(name: str):
    page = PAGES[name].read_text(encoding="utf-8")
    known = DEMO | MADE | folders_made(README) | folders_made(page)
    named = set(FOLDER.findall(page)) - {"runs/demo"}
    missing = {f for f in named if not any(f == k or f.startswith(k + "/") for k in known)}
    assert not missing, f"{name} names {missing}, which nothing on the page makes"
