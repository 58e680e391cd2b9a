"""Every numeric flag of every command, found by itself, with odd numbers: accepted, or one line that names it."""

from __future__ import annotations

import dataclasses
import importlib
import io
import shutil
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_type_hints

import pytest
from breaking import ends_plainly
from serving import make_run

from lrt.cli.main import COMMANDS
from lrt.cli.parse import flag_name

NO_NUMBERS = ("", "nan", "inf", "-inf", "1e400", "1,5", "0x10", "true", "5 6", "--")
"""What no numeric flag takes."""
ODD = ("0", "-1", "1e-320", "1e308", "1e-400", "1e20", str(2**63), str(2**63 - 1), "\uff11", "1_000", "5.0")
"""What may be a number of its kind, or not."""
SMALL = (
    "--model.depth 1 --model.width 16 --model.heads 2 --model.context 32 --train.length 16 --train.batch 2 "
    "--train.eval-every 0 --train.eval-rows 1 --train.device cpu --train.horizon steps=2 --train.threads 1 "
    "--data.source text.txt --data.tokenizer bytes --data.folder data"
)
COMMAND = {
    "train": f"train {SMALL} --out new",
    "tokenize": "tokenize --data.source text.txt --data.folder new",
    "eval": "eval run --source text.txt --rows 1 --length 16 --device cpu",
    "eval suite": "eval run --suite parity --limit 1 --lengths 4 --out new --device cpu",
    "core": "core run --bundle nowhere",
    "sample": "sample run --max-new-tokens 2 --prompt ab",
    "chat": "chat run --max-new-tokens 2",
    "info": "info",
    "plan": "plan",
    "schedule": "schedule interleaved-2",
    "convert": "convert run --out new",
    "convert small": "convert plain --out new --memory shared --start small",
    "convert untrained": "convert plain --out new --memory recirculation",
    "export": "export run new",
    "report": "report results.jsonl --out new",
    "analyze": "analyze run --rows 1 --out new/picture.png",
    "demo": "demo --source text.txt --out new",
    "sweep": "sweep sweep.toml --out new",
    "serve": "serve run --port 0",
    "bench train": "bench train --depth 1 --width 16 --vocab-size 64 --batch 1 --length 8 --repeats 1 --no-memory",
    "bench decode": "bench decode --steps 1 --batches 1 --contexts 16 --no-compile --device cpu",
    "bench serve": "bench serve run",
}
"""What each command is asked beside the flag, a line for each way that reads other flags."""
WORK = (
    "lrt.training.trainer.train", "lrt.serve.server.run", "lrt.experiments.demo.run_demo",
    "lrt.experiments.sweep.run_sweep", "lrt.benchmarks.training_step.measure", "lrt.benchmarks.latency.run",
    "lrt.benchmarks.server_load.measure", "lrt.inference.chat.complete", "lrt.evaluation.bits_per_byte.evaluate",
    "lrt.cli.eval.score_suite", "lrt.evaluation.memory_analysis.analyse", "lrt.cli.chat.ChatSession.take",
    "lrt.experiments.draw.as_text", "lrt.cli.train._train",
)  # fmt: skip
"""What takes long: it is left out where the arguments alone are tried."""


class Flag(NamedTuple):
    """A numeric flag of a command."""

    command: str
    name: str
    whole: bool
    """Whether it takes whole numbers alone."""


def numbers_in(hint: Any) -> set[type]:
    """The kinds of number that a field's type holds."""
    if hint in (int, float):
        return {hint}
    return {kind for inner in get_args(hint) for kind in numbers_in(inner)}


def fields_of(cls: type, within: str = "") -> list[tuple[str, set[type]]]:
    """The numeric flags of a dataclass of flags, those of its parts included."""
    found: list[tuple[str, set[type]]] = []
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        hint, name = hints[field.name], flag_name(field, within)
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            found += fields_of(hint, name)
        elif numbers_in(hint) and name.startswith("--"):
            found.append((name, numbers_in(hint)))
    return found


def flags_of(command: str) -> list[Flag]:
    words = command.split()
    flags = importlib.import_module(f"lrt.cli.{words[0]}").FLAGS
    flags = flags[words[1]] if isinstance(flags, dict) else flags
    return [Flag(command, name, kinds == {int}) for name, kinds in fields_of(flags)]


FLAGS = [flag for command in COMMAND for flag in flags_of(command)]


def test_every_command_is_swept():
    named = {command.split()[0] for command in COMMAND}
    assert named >= set(COMMANDS) - {"completion"}
    assert {f.name for f in FLAGS if f.command == "train"} >= {"--optim.betas", "--model.memory.blocks", "--train.seed"}


def settings_of(home: Path) -> None:
    """What the commands read."""
    make_run(home / "run", context=64)
    make_run(home / "plain", context=64, projection="none", residual=False)
    (home / "text.txt").write_text("".join(f"line {i} of a text\n" for i in range(400)))
    (home / "sweep.toml").write_text('[base]\ndata = { source = "text.txt" }\n')
    (home / "results.jsonl").write_text("{}\n")


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("numbers")
    settings_of(home)
    return home


@pytest.fixture
def tried(home: Path, monkeypatch, capfd):
    """Runs a command with one more flag: what it said, which was plain. Its work is left out if `work` is."""
    monkeypatch.chdir(home)

    def run(flag: Flag, value: str, work: bool) -> str:
        shutil.rmtree("new", ignore_errors=True)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.stdin", io.StringIO("hello\n"))
            for name in () if work else WORK:
                patch.setattr(name, refuse)
            try:
                return ends_plainly([*COMMAND[flag.command].split(), f"{flag.name}={value}"], capfd, 60)
            except (Exception, AssertionError) as error:
                raise AssertionError(f"{flag.command} {flag.name}={value}: {error}") from error

    return run


def refuse(*_: object, **__: object) -> None:
    raise ValueError("it would work now")


@pytest.mark.parametrize("command", COMMAND)
def test_no_numbers_are_refused_by_name(command: str, tried):
    """A value of each kind in turn, so that every flag is tried and every kind."""
    for i, flag in enumerate(f for f in FLAGS if f.command == command):
        value = NO_NUMBERS[i % len(NO_NUMBERS)]
        errors = tried(flag, value, work=False)
        assert flag.name.strip("-").replace("-", "_") in errors.replace("-", "_"), (flag, value, errors)
        assert "it would work now" not in errors, (flag, value)


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMAND)
def test_odd_numbers_end_plainly(command: str, tried):
    """Every value on every flag; what is refused is named."""
    for flag in (f for f in FLAGS if f.command == command):
        for value in (*ODD, *NO_NUMBERS):
            errors = tried(flag, value, work=False)
            assert "it would work now" not in errors or value not in NO_NUMBERS, (flag, value)


@pytest.mark.slow
def test_odd_numbers_that_a_training_takes_end_plainly(tried):
    """Trained with, but for the sizes, which would be what they say."""
    taken = 0
    for flag in (f for f in FLAGS if f.command == "train"):
        for value in ("0", "1e-30", "1e20", str(2**63 - 1)):
            if "it would work now" in tried(flag, value, work=False):
                taken += 1
                tried(flag, value, work=True)
    assert taken > 30
