"""Completion: what may come next, and that bash, zsh and fish offer it, paths with blanks among them."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from lrt.cli.bench import KINDS as BENCHES
from lrt.cli.completion import SCRIPTS
from lrt.cli.main import COMMANDS, main
from lrt.cli.words import LIKELY, MODES, PATHS, SCHEDULES, next_words
from lrt.config.decoding import PrefillOptions
from lrt.config.recipes import RECIPES
from lrt.data.synthetic import task_kind
from lrt.evaluation.open_suite import FROM_FILES
from lrt.schedule import KINDS, Curriculum


def offered(line: str) -> list[str]:
    """What may come next on a line; a blank at its end begins a new word."""
    return [word.text for word in next_words(line.split(" ")[1:])]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("lrt tra", ["train"]),
        ("lrt --traceback tra", ["train"]),
        ("lrt --v", ["--version"]),
        ("lrt bench ", [*BENCHES]),
        ("lrt help ex", ["export"]),
        ("lrt help bench d", ["decode"]),
        ("lrt train --recipe ", [*RECIPES]),
        ("lrt train --recipe=d2", ["d20_paper", "d24_paper"]),
        ("lrt train --recipe = d2", ["d20_paper", "d24_paper"]),
        ("lrt train --recipe =", [*RECIPES]),
        ("lrt train --train.sched", ["--train.schedule"]),
        ("lrt train --data.source ", ["python", PATHS]),
        ("lrt train --out ", [PATHS]),
        ("lrt train --train.batch ", []),
        ("lrt train --or-resume --dat", []),
        ("lrt export runs/x --to q", ["qwen2", "qwen3"]),
        ("lrt eval ", [PATHS]),
        ("lrt eval --json ", [PATHS]),
        ("lrt report a.jsonl ", [PATHS]),
        ("lrt core x --bundle ", [PATHS]),
        ("lrt schedule int", ["interleaved-2"]),
        ("lrt completion ", [*SCRIPTS]),
        ("lrt bench train --schedules hop-1 para", ["parallel"]),
        ("lrt nothing ", []),
        ("lrt bench nothing ", []),
    ],
)
def test_what_may_come_next(line: str, words: list[str]):
    if line.endswith("--dat"):
        words = [flag for flag in offered("lrt train --") if flag.startswith("--dat")]
    assert offered(line) == words


def test_first_come_all_commands():
    assert offered("lrt ")[: len(COMMANDS)] == [*COMMANDS]


@pytest.mark.parametrize("command", [*(c for c in COMMANDS if c != "bench"), *(f"bench {kind}" for kind in BENCHES)])
def test_every_flag_of_the_help_is_offered_and_no_other(command: str, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main([*command.split(), "--help-all"])
    spelled = re.findall(r"^[ │] (--[a-z].*?)(?:  | ?│|$)", capsys.readouterr().out, re.M)
    in_help = {flag for line in spelled for flag in re.findall(r"--[a-z][\w.-]*", line)}
    flags = set(offered(f"lrt {command} --")) - {"--help", "--help-all"}
    assert flags <= in_help
    opposites = {re.sub(r"(?<=[.-])no-", "", flag, count=1) for flag in in_help if "no-" in flag}
    unoffered = in_help - flags
    assert not [flag for flag in unoffered if flag not in opposites and "no-" not in flag]


def test_words_that_are_likely_are_understood():
    assert {name.partition("-")[0] for name in SCHEDULES} == set(KINDS)
    assert all(Curriculum.parse(name) for name in SCHEDULES) and all(map(PrefillOptions.parse, MODES[:-1]))
    assert set(FROM_FILES) <= set(LIKELY["suite"])
    assert all(task_kind(f"{name}") for name in LIKELY["suite"] if name not in FROM_FILES)


# In the shells themselves.

BASH = "source {script}; COMP_WORDS=({words}); COMP_CWORD={last}\n_lrt; printf '%s\\n' \"${{COMPREPLY[@]}}\""
ZSH = """
compdef() {{ }}; compset() {{ }}; _files() {{ print -rl -- *(N) }}; _describe() {{ print -rl -- "${{(@P)2}}" }}
source {script}
words=({words}); CURRENT=$(({last} + 1)); PREFIX=$words[-1]; _lrt
"""
FISH = "source {script}; complete -C '{words}'"
SHELLS = {"bash": BASH, "zsh": ZSH, "fish": FISH}
NO_RC = {"bash": ["--norc"], "zsh": ["-f"], "fish": ["--no-config"]}


@pytest.fixture(params=SHELLS)
def in_shell(request, capsys, tmp_path: Path, monkeypatch):
    """What a shell offers for the last of some words, where a folder `my texts` lies."""
    shell = request.param
    if shutil.which(shell) is None:
        pytest.skip(f"needs {shell}")
    folder = tmp_path / "here"
    (folder / "my texts").mkdir(parents=True)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    assert main(["completion", shell]) == 0
    script = tmp_path / "script"
    script.write_text(capsys.readouterr().out, encoding="utf-8")
    monkeypatch.chdir(folder)

    def ask(words: str) -> set[str]:
        place = {"words": words if shell == "fish" else re.sub(" $", " ''", words), "last": words.count(" ")}
        code = SHELLS[shell].format(script=script, **place)
        run = subprocess.run([shell, *NO_RC[shell], "-c", code], capture_output=True, text=True)
        assert (run.returncode, run.stderr) == (0, "")
        return {re.split(r"[\t:]|/$", line)[0] for line in run.stdout.splitlines()}

    return ask


def test_shells_offer_commands_choices_and_paths(in_shell):
    assert in_shell("lrt tra") == {"train"}
    assert in_shell("lrt export --to q") == {"qwen2", "qwen3"}
    assert in_shell("lrt eval ") == {"my texts"}
