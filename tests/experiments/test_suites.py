"""lrt eval --suite: records, going on after an interruption, and the tables that lrt report makes of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import config, lossy_tokenizer, randomised, refusal

from lrt.cli.main import main
from lrt.config.run import DataConfig, RunConfig, TrainConfig
from lrt.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer
from lrt.evaluation import blimp
from lrt.experiments.groups import RunGroup
from lrt.experiments.report import MARKS
from lrt.experiments.suite_tables import length_table
from lrt.training import checkpoint
from lrt.utils.seals import SEAL

PAIRS = [
    {"UID": uid, "field": field, "linguistics_term": term,
     "sentence_good": f"{uid} {i} is.", "sentence_bad": f"{uid} are {i}."}
    for uid, field, term in (("a", "syntax", "islands"), ("b", "syntax", "gaps"), ("c", "semantics", "npi"))
    for i in range(3)
]  # fmt: skip
COPA = [{"query": "It rained, so", "choices": ["wet.", "dry."], "gold": i % 2} for i in range(4)]


def make_run(folder: Path, name: str, seed: int, tokenizer: Tokenizer | None = None) -> Path:
    """A random model of bytes, or of other tokens, as if it had been trained."""
    tokenizer = tokenizer or ByteTokenizer()
    model = config(vocab_size=tokenizer.vocab_size, bos=tokenizer.bos, context=48)
    settings = RunConfig(
        name=f"{name}-seed{seed}", model=model, data=DataConfig(source="task:parity"),
        train=TrainConfig(length=8, seed=seed),
    )  # fmt: skip
    run = folder / settings.name
    tokenizer.save(run / "tokenizer")
    checkpoint.save(run, 3, settings, randomised(model, seed=seed).float(), {}, extra={}, keep=1)
    return run


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "blimp").mkdir(parents=True)
    (tmp_path / "data" / "blimp" / "all.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    (tmp_path / "data" / "copa.jsonl").write_text("".join(json.dumps(item) + "\n" for item in COPA))
    for name, seed in (("plain", 0), ("plain", 1), ("lrt", 0), ("lrt", 1)):
        make_run(tmp_path, name, seed)
    return tmp_path


def evaluate(run: str, *flags: str) -> int:
    return main(["eval", run, "--device", "cpu", *flags])


def recorded(file: Path) -> dict:
    (line,) = file.read_text(encoding="utf-8").splitlines()
    return json.loads(line)


BLIMP = ["--suite", "blimp", "--suite-data", "data", "--mode", "exact"]


def test_a_record_holds_what_was_scored_and_how(place, capsys):
    assert evaluate("lrt-seed1", *BLIMP, "--limit", "2") == 0
    shown = capsys.readouterr()
    record = recorded(place / "lrt-seed1" / "suites" / "blimp-exact.jsonl")
    assert record["grid"] == {"suite": "blimp", "mode": "exact", "train.horizon": "ratio=20", "limit": 2}
    assert (record["arm"], record["seed"], record["suite"], record["of"]["step"]) == ("lrt", 1, "blimp", 3)
    assert set(record["parts"]) == {"a", "b", "c"} and record["whole"]["items"] == 6
    assert record["config"]["train"]["seed"] == 1 and record["commit"] and record["lost"] == ""
    assert "blimp 3/3 c: accuracy" in shown.err and "| islands" in shown.out and "2 items a part" in shown.out
    assert not list(place.rglob("*.parts.jsonl"))


def test_an_interrupted_evaluation_goes_on_and_ends_with_the_same_record(place, monkeypatch, capsys):
    assert evaluate("lrt-seed0", *BLIMP, "--out", "whole") == 0
    score, scored = blimp.score_pairs, []

    def interrupted(one, scorer):
        if one.phenomenon == "npi" and "gaps" in scored and len(scored) == 2:
            raise KeyboardInterrupt
        scored.append(one.phenomenon)
        return score(one, scorer)

    monkeypatch.setattr(blimp, "score_pairs", interrupted)
    assert evaluate("lrt-seed0", *BLIMP, "--out", "halves") == 130
    assert scored == ["islands", "gaps"] and not (place / "halves" / "blimp-exact.jsonl").exists()
    scored.append("from here on")
    assert evaluate("lrt-seed0", *BLIMP, "--out", "halves") == 0
    assert scored[3:] == ["npi"] and "3 parts, 2 scored before" in capsys.readouterr().err
    one, other = (recorded(place / folder / "blimp-exact.jsonl") for folder in ("whole", "halves"))
    clocks = {"score_cpu_seconds", SEAL}  # the seal is over the clock too
    assert {k: v for k, v in one.items() if k not in clocks} == {k: v for k, v in other.items() if k not in clocks}
    assert evaluate("lrt-seed0", *BLIMP, "--out", "halves") == 0  # and nothing is scored again
    assert scored[3:] == ["npi"] and "holds these figures already" in capsys.readouterr().err


def test_figures_of_something_else_are_neither_lost_nor_gone_on_with(place, capsys):
    assert evaluate("lrt-seed0", *BLIMP, "--out", "o") == 0
    file = place / "o" / "blimp-exact.jsonl"
    before = file.read_bytes()
    for flags, run, said in (
        ([*BLIMP, "--limit", "1"], "lrt-seed0", "is of another limit"),
        (BLIMP, "lrt-seed1", "is of another weights"),
    ):
        assert evaluate(run, *flags, "--out", "o") == 2
        assert said in capsys.readouterr().err
    (place / "data" / "blimp" / "all.jsonl").write_text(json.dumps(PAIRS[0]) + "\n")
    assert evaluate("lrt-seed0", *BLIMP, "--out", "o") == 2
    assert "is of another data, parts; choose another --out, or remove it" in capsys.readouterr().err
    assert file.read_bytes() == before
    (place / "p").mkdir()
    (place / "p" / "blimp-exact.parts.jsonl").write_text('{"part": "a"}\n')
    assert evaluate("lrt-seed0", *BLIMP, "--out", "p") == 2
    assert "lacks 'of'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--suite", "glue"], "there is no suite 'glue'; choose core, blimp, or a task: parity"),
        (["--suite", "blimp"], "name its folder with --suite-data"),
        (["--suite", "core", "--suite-data", "nowhere"], "nowhere is no folder"),
        (["--suite", "core", "--suite-data", "data", "--lengths", "8"], "suite core has none"),
        (["--suite", "parity", "--suite-data", "data"], "leave out --suite-data"),
        (["--suite", "parity-3"], "has 1 numbers"),
        (["--suite", "mqar-2-8192", "--lengths", "64"], "has 8193 symbols, the model 257 tokens"),
        (["--suite", "pointers-2", "--lengths", "9", "600"], "no rows of 600 positions"),
        (["--suite", "parity", "--mode", "sideways"], "prefill mode 'sideways' is unknown"),
        (["--suite", "parity", "--tasks", "copa"], "give one of them"),
        (["--lengths", "8"], "--lengths is for --suite"),
        (["--suite-data", "data", "--arm", "x"], "--suite-data is for --suite"),
    ],
)
def test_what_cannot_be_scored_is_said_in_one_line(place, flags: list[str], said: str, capsys):
    assert evaluate("plain-seed0", *flags) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not (place / "plain-seed0" / "suites").exists()


def test_a_task_is_scored_at_any_length(place, capsys):
    assert evaluate("plain-seed0", "--suite", "parity", "--limit", "32") == 0
    record = recorded(place / "plain-seed0" / "suites" / "parity-exact.jsonl")
    assert list(record["accuracy"]) == ["8", "16", "32", "64"] and record["accuracy"]["8"]["items"] == 32
    assert record["accuracy"]["64"].keys() == {"all", "last", "all_error", "last_error", "items"}
    assert "64 symbols: all / last" in capsys.readouterr().out
    assert evaluate("plain-seed0", "--suite", "sums", "--lengths", "5", "--out", "o", "--json") == 0
    assert json.loads(capsys.readouterr().out)["accuracy"].keys() == {"5"}


def test_core_goes_by_both_commands(place, capsys):
    assert main(["core", "lrt-seed0", "--bundle", "data", "--device", "cpu", "--mode", "exact"]) == 0
    shown = capsys.readouterr().out
    assert "| mean of 1 tasks" in shown and "| copa" in shown
    assert evaluate("lrt-seed0", "--suite", "core", "--suite-data", "data", "--mode", "exact") == 0
    again = capsys.readouterr()
    assert again.out == shown and "holds these figures already" in again.err


def test_the_report_sets_arms_side_by_side_with_their_intervals(place, capsys):
    files = []
    for run in ("plain-seed0", "plain-seed1", "lrt-seed0", "lrt-seed1"):
        for suite in (BLIMP, ["--suite", "core", "--suite-data", "data", "--mode", "exact"], ["--suite", "parity"]):
            assert evaluate(run, *suite) == 0
        files += sorted((place / run / "suites").glob("*.jsonl"))
    capsys.readouterr()
    page = place / "outside.md"
    page.write_text(f"# Outside\n\n{MARKS[0]}\n{MARKS[1]}\n", encoding="utf-8")
    assert main(["report", *map(str, files), "--out", "report", "--into", str(page)]) == 0
    text = page.read_text(encoding="utf-8")
    assert "### blimp-exact: BLiMP, accuracy" in text and "### core-exact: CORE, centred accuracy" in text
    assert "| 3 parts " in text and "plain, exact, 2 seeds" in text and "lrt, exact, 2 seeds" in text
    own = [recorded(place / f"lrt-seed{n}" / "suites" / "blimp-exact.jsonl")["whole"]["accuracy"] for n in (0, 1)]
    base = [recorded(place / f"plain-seed{n}" / "suites" / "blimp-exact.jsonl")["whole"]["accuracy"] for n in (0, 1)]
    deviation = abs(own[0] - own[1]) / 2**0.5
    (row,) = [line for line in text.splitlines() if line.startswith("| all ")]
    assert f"{sum(own) / 2:.1%} ± {deviation:.1%}" in row
    differences = [a - b for a, b in zip(own, base, strict=True)]
    (less,) = [line for line in text.splitlines() if line.startswith("| less plain") and "%" in line][:1]
    assert f"{sum(differences) / 2:+.1%} ± {abs(differences[0] - differences[1]) / 2**0.5:.1%}" in less
    assert "parity-exact" in text and "64 symbols: all / last" in text


def test_arms_of_other_lengths_and_parts_stand_in_one_table():
    def run(arm: str, accuracy: dict) -> RunGroup:
        return RunGroup("parity", "", arm, ({"accuracy": {n: {"all": x, "last": x} for n, x in accuracy.items()}},))

    table = length_table([run("short", {"16": 0.5, "32": 0.25}), run("long", {"32": 0.75, "64": 1.0})]).markdown()
    assert "16 symbols" in table and "64 symbols" in table
    (row,) = [line for line in table.splitlines() if line.startswith("| long")]
    assert [cell.strip() for cell in row.split("|")[4:7]] == ["/", "75.0% / 75.0%", "100.0% / 100.0%"]


def test_a_line_that_is_no_record_of_a_suite_is_named(place, capsys):
    (place / "bad.jsonl").write_text(json.dumps({"arm": "a", "grid": {}, "seed": 1, "suite": "blimp"}) + "\n")
    assert "bad.jsonl:1 is not the record of a run" in refusal(capsys, ["report", "bad.jsonl", "--out", "report"])


def test_a_suite_of_texts_that_the_tokens_lose_is_refused_or_says_so(place, capsys):
    """Whatever shows the figures; other weights than those of the run with bytes, so another folder."""
    words = lossy_tokenizer(place / "words", "Lowercase", [p["sentence_good"] for p in PAIRS])
    run = make_run(place, "lossy", 0, load_tokenizer(words))
    (place / "data" / "blimp" / "all.jsonl").write_text(
        "".join(json.dumps(p | {"sentence_bad": "A"}) + "\n" for p in PAIRS)
    )
    asked = (str(run), "--suite", "blimp", "--suite-data", "data")
    assert evaluate(*asked) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "'A' comes back as 'a'" in error and "lrt eval: --normalised" in error and len(error) < 300
    assert evaluate(*asked, "--normalised") == 0
    assert capsys.readouterr().out.startswith("Of the normalised text: 3 of 6 documents")
    assert main(["report", f"{run}/suites/blimp-interleaved-8.jsonl", "--out", "report"]) == 0
    assert "BLiMP, accuracy of the normalised text" in capsys.readouterr().out
