"""A thousand lists of arguments drawn at random: a result or one line, never a traceback, never a hang."""

from __future__ import annotations

import io
import os
import random
import re
from pathlib import Path

import pytest
from breaking import ends_plainly, every_time
from serving import make_run

from lrt.cli.main import COMMANDS, main

MANY = 1000
VALUES = [
    "", "0", "-1", "1", "2", "0.5", "-0.0", "nan", "inf", "-inf", "1e-400", "1e400", "1e20", "2147483648",
    "9223372036854775808", "-18446744073709551616", "None", "none", "true", "False", "[]", "{}", "1,2", "1..3",
    "3..1", "a=b", "=", "--", "-", "'", "\"", "\\", "~", "~nobody", "..", "/", "/dev/null", "/proc/self/mem", "*",
    "run", "text.txt", "empty", "nowhere/at/all", "cpu", "cuda", "cuda:7", "meta", "auto", "exact", "jacobi",
    "interleaved-8", "interleaved-0", "settled-1..3", "settled-9..1", "hop-2", "parallel", "steps=1", "steps=-1",
    "tokens=nan", "ratio=", "hf:", "hf:a/b", "http://x", "\xe9", "\u202e", "\u001b[31m", "\ud800", "x" * 5000,
    "9" * 400, "%s%n", "\u0000", "\n", "cpu_demo", "d24_paper", "bytes", "bpe", "bpe+pauses", "llama", "bfloat16",
    "float8", "1e308", "-1e-320", "1_000", "\u0663", "+5", " 5", "5 ", "0x10", "1,5", "\u201c4\u201d", "\u2013rows",
    "settled-1..99999999999", "refinement-99999999", "chunked-3:weights=1e308/1e308", "parallel@0.5,settled-1..3",
    "text.txt@0.5", "text.txt@1e308,empty@1e308", "text.txt,text.txt", "**", "[", "link", "pipe", "file:///etc/passwd",
    "a\nb", "a" * 300, "text.txt/in", "/proc/self/fd/0", "/dev/full", "task:parity", "parity-0", "mqar-8-8",
]  # fmt: skip
LONG = [
    "lrt.training.trainer.train", "lrt.experiments.demo.run_demo", "lrt.experiments.sweep.run_sweep",
    "lrt.serve.server.run", "lrt.benchmarks.training_step.measure", "lrt.benchmarks.latency.run",
    "lrt.benchmarks.server_load.measure",
]  # fmt: skip
"""What would work for long: it is left out, so that the arguments alone are tried."""
NAMES = [*(name for name in COMMANDS if name != "bench"), "bench train", "bench decode", "bench serve"]


@pytest.fixture
def flags(capfd) -> dict[str, list[str]]:
    """Every flag that a command's help names."""
    known = {}
    for name in NAMES:
        with pytest.raises(SystemExit):
            main([*name.split(), "--help-all"])
        known[name] = sorted(set(re.findall(r"--[a-z][\w.-]*", capfd.readouterr().out)))
    return known


def drawn(name: str, flags: list[str], chance: random.Random) -> list[str]:
    """A command with up to six flags and values, some misspelt, some without a value, some twice."""
    words = name.split() + (["run"] if chance.random() < 0.5 else [])
    for _ in range(chance.randrange(7)):
        flag = chance.choice([*flags, "--no-such-flag", "-x", ""])
        flag = flag[:-1] if chance.random() < 0.1 else flag
        value = chance.choice(VALUES)
        words += chance.choice([[flag, value], [flag, value], [f"{flag}={value}"], [flag], [value]])
    return words


@pytest.mark.slow
def test_random_arguments_end_plainly(flags, tmp_path: Path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO())
    make_run(tmp_path / "run", context=64)
    (tmp_path / "text.txt").write_text("some words of a text\n" * 300)
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("nowhere_at_all")
    os.mkfifo(tmp_path / "pipe")

    def nothing(*_: object, **__: object) -> None:
        raise ValueError("it would work now")

    for place in LONG:
        monkeypatch.setattr(place, nothing)

    def one(chance: random.Random) -> None:
        name = chance.choice(NAMES)
        words = drawn(name, flags[name], chance)
        try:
            ends_plainly(words, capfd)
        except AssertionError as error:
            raise AssertionError(f"lrt {' '.join(words)!r:.300}: {error}") from None

    assert not every_time(MANY, one)
