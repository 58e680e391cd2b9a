"""What surrounds the commands: help, completion, names of runs and recipes, errors on any terminal."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from helpers import refusal

from lrt.cli.bench import KINDS
from lrt.cli.info import InfoFlags
from lrt.cli.main import COMMANDS, main
from lrt.cli.parse import early_positional, early_value, names_of, parse
from lrt.cli.plan import planned
from lrt.cli.sample import SampleFlags
from lrt.cli.short_help import SHORT_HELP
from lrt.cli.train import _placed
from lrt.config.model import ModelConfig
from lrt.config.recipes import RECIPES, recipe
from lrt.config.run import DataConfig, RunConfig, expected_vocabulary
from lrt.evaluation.score_names import signed


def printed(capsys, arguments: list[str]) -> str:
    """What a command prints that ends well."""
    code: object = None
    try:
        code = main(arguments)
    except SystemExit as end:
        code = end.code
    assert code == 0
    return capsys.readouterr().out


# Help.

ALL = [*COMMANDS, *(f"bench {kind}" for kind in KINDS)]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_before_or_after_the_command(command: str, capsys):
    texts = {printed(capsys, arguments) for arguments in ([command, "--help"], ["help", command], ["--help", command])}
    assert len(texts) == 1 and len(texts.pop()) > 100


@pytest.mark.parametrize("command", [*ALL, *(f"{name} --help-all" for name in SHORT_HELP)])
def test_help_fits_a_narrow_screen_and_flows(command: str, capsys, monkeypatch):
    """No line is wider than the screen, none ends where the source file's did, no type is spelled as Python does."""
    monkeypatch.setenv("COLUMNS", "80")
    arguments = [*shlex.split(command), *["--help"] * ("--" not in command)]
    text = printed(capsys, arguments)
    assert max(map(len, text.splitlines())) <= 80 and "{None}|" not in text
    monkeypatch.setenv("COLUMNS", "1000")
    described = [line.strip("│ ") for line in printed(capsys, arguments).splitlines() if line.startswith("│")]
    assert not [after for line, after in pairwise(described) if not line.endswith(")") and after[:1].islower()]


def test_the_overview_names_every_command_and_fits_a_small_terminal(capsys):
    text = printed(capsys, ["--help"])
    lines = text.splitlines()
    assert len(lines) <= 23 and max(map(len, lines)) <= 80
    assert text == printed(capsys, []) and all(name in text for name in COMMANDS)
    assert printed(capsys, ["--version"])


def test_an_optional_flag_takes_none_and_its_own_type_alone(capsys):
    assert parse(InfoFlags, ["--length", "None"], "info", default=InfoFlags(ModelConfig())).length is None
    assert parse(InfoFlags, ["--length", "7"], "info", default=InfoFlags(ModelConfig())).length == 7
    assert "length" in refusal(capsys, ["info", "--length", "seven"])
    parsed = parse(SampleFlags, ["run", "--stop-tokens", "1", "2"], "sample")
    assert parsed.decoding.sampling.stop_tokens == (1, 2)


@pytest.mark.parametrize("kind", ["train", "decode", "serve"])
def test_help_of_every_bench(kind: str, capsys):
    assert kind in printed(capsys, ["bench", "--help"])
    assert "--json" in printed(capsys, ["help", "bench", kind]) == printed(capsys, ["bench", kind, "--help"])


@pytest.mark.parametrize("command", ALL)
def test_help_is_one_screen_and_all_of_it_is_behind(command: str, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    short, whole = printed(capsys, [*command.split(), "--help"]), printed(capsys, [*command.split(), "--help-all"])
    lines = short.splitlines()
    assert len(lines) <= 23 and max(map(len, lines)) <= 80
    if command in SHORT_HELP:
        known = set(re.findall(r"--[\w.-]+", whole.replace("--data.", "--") + whole))
        named = set(re.findall(r"--[\w.-]+", short)) - {"--help-all"}
        assert f"lrt {command} --help-all" in short and len(named) >= 5 and named <= known
        assert len(whole.splitlines()) > len(lines)
    else:
        assert short == whole


def test_recipes_are_named_where_one_can_be_chosen(capsys):
    for command in ("train", "info", "plan", "bench train", "bench decode"):
        short = printed(capsys, [*command.split(), "--help"])
        assert all(name in short for name in RECIPES)


def test_arguments_told_by_place_are_called_by_name_and_nothing_is_no_default(capsys):
    assert printed(capsys, ["export", "--help"]).startswith("usage: lrt export [-h] [OPTIONS] RUN FOLDER\n")
    text = " ".join(printed(capsys, ["eval", "--help-all"]).replace("│", " ").split())
    assert "default: None" not in text and "default: )" not in text and "(default: 64)" in text
    assert "by default the one trained with. --" in text


@pytest.mark.parametrize(
    "arguments",
    ["sample", "export", "sweep", "eval x --rows three", "info --recpie d4", "train --model.memory.projection big"],
)
def test_errors_say_the_same_on_a_terminal_that_has_colours(arguments: str, capsys, monkeypatch):
    """tyro paints its message boxes where standard output is a terminal."""
    plain = refusal(capsys, arguments.split())
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert refusal(capsys, arguments.split()) == plain and plain.isprintable()


def test_what_is_missing_is_named(capsys):
    assert "RUN is missing: Run folder, or one of its checkpoints; see lrt sample --help" in refusal(capsys, ["sample"])
    assert "--out PATH is missing: Folder of the new run" in refusal(capsys, ["convert", "x"])
    assert "bash, zsh or fish" in refusal(capsys, ["completion"])


def test_a_run_says_how_far_it_has_come(random_run: Path, capsys):
    said = printed(capsys, ["info", str(random_run)])
    assert said.startswith("trained 1 steps on python by settled-1..3\n") and "after 0 tokens" in said
    facts = json.loads(printed(capsys, ["info", str(random_run), "--json"]))
    assert (facts["run"], facts["step"], facts["source"]) == (str(random_run), 1, "python")


def test_a_folder_that_is_no_run_leads_to_those_it_holds(random_run: Path, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(random_run, "runs/demo/lrt")
    for command in ("info", "eval", "sample", "chat", "serve", "analyze"):
        assert "runs/demo holds the run runs/demo/lrt; choose one" in refusal(capsys, [command, "runs/demo"])
    assert "runs holds the run runs/demo/lrt; choose one" in refusal(capsys, ["chat", "runs"])
    assert "did you mean runs/demo/lrt?" in refusal(capsys, ["chat", "demo/lrt"])
    assert "did you mean runs/demo/lrt?" in refusal(capsys, ["chat", "runs/demo/ltr"])
    assert refusal(capsys, ["chat", "nothing"]).startswith("lrt chat: nothing does not exist; give")
    assert "did you mean" not in refusal(capsys, ["chat", "nothing"])


SLIPS = [
    ("train book.txt", "book.txt: a text is given as --data.source book.txt"),
    ("train --data.sorce book.txt", "unknown flag --data.sorce; did you mean --data.source? See lrt train --help"),
    ("tokenize book.txt out", "book.txt, out: a text is given as --data.source book.txt"),
    ("demo now", "now: the command takes no more words"),
    ("demo --fast --quiet", "unknown flags --fast, --quiet"),
    ("completion fihs", "shell is 'fihs'; choose one of 'bash', 'zsh', 'fish'"),
    ("train --data.source", "--data.source is without a value"),
    ("info cpu_dem", "cpu_dem does not exist; of a recipe say lrt info --recipe cpu_demo"),
    ("--hlep", "did you mean --help?"),
    (r"chat C:\models\books", r"C:\models\books does not exist"),
]


@pytest.mark.parametrize(("command", "answer"), SLIPS, ids=[command for command, _ in SLIPS])
def test_slips_of_the_first_minute_are_answered_by_what_was_meant(command, answer, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "book.txt").write_text("a book", encoding="utf-8")
    assert answer in refusal(capsys, command.split())


def test_report_of_a_folder_leads_to_its_records(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("runs/mine/metrics.jsonl", "runs/sweep/results.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("{}\n", encoding="utf-8")
    said = refusal(capsys, ["report", "runs"])
    assert "runs is a folder, not a file of records; give runs/sweep/results.jsonl" in said
    assert "of one run lrt eval gives scores" in refusal(capsys, ["report", "runs/mine"])


def test_a_run_in_a_folder_whose_name_has_spaces(random_run: Path, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(random_run, "my runs/a b")
    assert printed(capsys, ["info", "my runs/a b"]).startswith("trained 1 steps")
    assert "my runs holds the run my runs/a b; choose one" in refusal(capsys, ["info", "my runs"])


def test_completion_and_help_of_any_command_need_no_torch():
    code = "import sys; from lrt.cli.main import COMMANDS, main\n"
    code += "import lrt.cli.words\n"
    code += "for command in COMMANDS:\n    try: main([command, '--help'])\n    except SystemExit: pass\n"
    code += "assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


# Figures.


def test_a_difference_of_nothing_has_no_sign():
    assert [signed(x) for x in (-0.00004, 0.0, 0.00006, -0.5)] == ["0.0000", "0.0000", "+0.0001", "-0.5000"]
    assert (signed(-0.0004, 3), signed(float("nan")), signed(float("-inf"))) == ("0.000", "+nan", "-inf")


def test_a_plan_has_units_that_suit_and_fits_a_narrow_screen(capsys):
    small, large = (printed(capsys, ["plan", "--recipe", name]) for name in ("cpu_demo", "d20_paper"))
    assert " us " in small and " MB " in small and " h\n" not in small
    assert " GB " in large and (" h\n" in large or " days\n" in large)
    rows = [line for text in (small, large) for line in text.splitlines() if line.startswith("  ")]
    assert len(rows) > 30 and max(map(len, rows)) <= 80


# Arguments that are read before the rest.


def test_arguments_are_read_early_as_tyro_reads_them():
    args = ["--recipe", "d4", "--out=x", "--recipe=d8", "--or_resume", "run"]
    assert early_value(args, "--recipe", "cpu_demo") == "d8"
    assert early_value(["--recipe"], "--recipe", "cpu_demo") == "cpu_demo"
    assert names_of(args) == ["--recipe", "--out", "--recipe", "--or-resume"]
    assert early_positional(["--json", "run", "--length", "3"], ["--json"]) == "run"
    assert early_positional(["--length", "3", "--json"], ["--json"]) is None
    assert early_positional(["--length=3", "run"], []) == "run"


@pytest.mark.parametrize(
    ("flags", "culprit"),
    [
        (["--resume=RUN", "--train.batch", "64"], "--train.batch"),
        (["--resume", "RUN", "--train.batch=64"], "--train.batch"),
        (["--train.batch=64", "--resume=RUN"], "--train.batch"),
        (["--resume=RUN", "--or-resume"], "--or-resume"),
        (["--resume=RUN", "--model.memory.no-residual"], "--model.memory.no-residual"),
        (["--resume=RUN", "--out", "elsewhere"], "--out"),
    ],
)
def test_resuming_drops_no_flag(flags: list[str], culprit: str, capsys):
    assert culprit in refusal(capsys, ["train", *flags])


@pytest.mark.parametrize(
    "arguments",
    [
        "info --length 0", "schedule interleaved-2 --length 0", "eval RUN --length 0", "eval RUN --rows 0",
        "eval RUN --limit 0", "core RUN --bundle x --limit 0", "sample RUN --samples 0", "sweep x.toml --jobs 0",
        "serve RUN --threads 0", "serve RUN --threads -1", "bench train --length 0", "bench decode --steps 0",
        "bench decode --batches 0", "analyze RUN --rows 0",
    ],
)  # fmt: skip
def test_zero_is_a_number_and_not_the_default(arguments: str, capsys):
    *_, flag, value = arguments.split()
    line = refusal(capsys, arguments.split())
    assert flag in line and value in line, line


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_says_the_vocabulary_that_its_training_has(name: str, capsys):
    config = recipe(name)
    assert expected_vocabulary(config.data) == config.model.vocab_size
    facts = json.loads(printed(capsys, ["info", "--recipe", name, "--json"]))
    assert facts["parameters"]["head"] == config.data.vocab_size * config.model.d


def test_a_plan_follows_the_tokenizer():
    config = recipe("cpu_demo")
    larger = RunConfig(data=DataConfig(tokenizer="bpe", vocab_size=1000))
    assert planned(larger, []).model.vocab_size == 1000
    assert planned(RunConfig(data=DataConfig(tokenizer="bytes+pauses")), []).model.vocab_size == 258
    assert planned(config, ["--model.vocab-size", "512"]) == config
    with pytest.raises(ValueError, match=r"set --data\.vocab-size"):
        planned(larger, ["--model.vocab-size=32768"])


def test_a_run_is_called_after_its_folder_unless_it_is_named():
    config = recipe("cpu_demo")
    assert _placed(config, None, []) == (config, Path("runs/cpu_demo"))
    assert _placed(config, Path("somewhere/mine"), [])[0].name == "mine"
    assert _placed(config, Path("somewhere/mine"), ["--name=other"])[0].name == "cpu_demo"


# Errors on any terminal.


def shell(*arguments: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """A command in a process of its own."""
    command = [sys.executable, "-m", "lrt", *arguments]
    return subprocess.run(command, capture_output=True, env=os.environ | environment)


def test_errors_are_short_and_hold_no_control_characters(capsys):
    for hostile in ("\x1b[31mred\x1b[0m\x07", "x" * 5000, "a\nb\tc", "\u202egnp", "\udcff"):
        for arguments in (["info", f"--{hostile}"], [hostile], ["info", "--recipe", hostile], ["sample", hostile]):
            line = refusal(capsys, arguments)
            assert len(line) <= 300 and line.isprintable(), line
    done = shell("\x1b[31mred\x1b[0m\udcff")
    (line,) = done.stderr.decode().splitlines()
    assert done.returncode == 2 and line.isprintable()


def test_output_that_cannot_spell_a_character_shows_another():
    done = shell("schedule", "interleaved-2:weights=0/1", PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, b"")
    drawing = done.stdout.decode("ascii")
    assert "?" not in drawing and all(sign in drawing for sign in "#+.")
    assert shell("info", "--recipe", "é", PYTHONIOENCODING="ascii").returncode == 2


def test_a_reader_that_leaves_and_a_full_disk_are_no_traceback():
    command = shlex.join([sys.executable, "-m", "lrt"])
    for redirected, code in ((" | true", 0), (" > /dev/full", 2), (" >&-", 0)):
        ask = f"set -o pipefail; {command} --help{redirected}"
        done = subprocess.run(["bash", "-c", ask], capture_output=True, text=True)
        assert (done.returncode, "Traceback" in done.stderr, "Exception" in done.stderr) == (code, False, False)


def test_closed_streams_are_open_on_nothing(random_run: Path, tmp_path: Path):
    """Also the numbers are taken: a file that got number 1 would be printed into."""
    for ask in (f"chat {random_run} <&-", f"schedule interleaved-2 --out {tmp_path / 'x.svg'} <&- >&-"):
        done = subprocess.run(["bash", "-c", f"{sys.executable} -m lrt {ask}"], capture_output=True, text=True)
        assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr
    assert (tmp_path / "x.svg").read_text().rstrip().endswith("</svg>")
    done = subprocess.run(["bash", "-c", f"{sys.executable} -m lrt info {tmp_path} 2>&-"], capture_output=True)
    assert (done.returncode, done.stdout) == (2, b"")  # an error is no output


def test_numbers_that_no_machine_holds_are_refused(capsys):
    for arguments in (
        ["sample", "RUN", "--seed", str(10**20)], ["demo", "--seed", str(10**20)], ["train", "--train.seed", "1" * 40],
        ["convert", "X", "--out", "Y", "--memory", "shared", "--start", "small", "--seed", "9223372036854775808"],
        ["info", "--length", str(10**30)],
    ):  # fmt: skip
        line = refusal(capsys, arguments)
        assert "seed" in line or "length" in line
        assert "64 bits" in line or "at most" in line
    assert "temperature" in refusal(capsys, ["sample", "RUN", "--temperature", "nan"])


def test_home_is_expanded_in_every_path(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for arguments in (["sample", "~/none"], ["info", "~/none"], ["train", "--resume=~/none"]):
        assert str(tmp_path / "none") in refusal(capsys, arguments)
    for arguments in (
        ["sample", "~nobody-of-this-name/run"], ["info", "~nobody-of-this-name"],
        ["train", "--data.source", "~nobody-of-this-name"], ["train", "--data.tokenizer", "~nobody-of-this-name/x"],
        ["tokenize", "--source", "~nobody-of-this-name"], ["train", "--init-from=~nobody-of-this-name"],
    ):  # fmt: skip
        assert "~nobody-of-this-name" in refusal(capsys, arguments)
