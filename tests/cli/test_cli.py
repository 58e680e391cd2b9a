"""The command line: help reads, good input runs, bad input is one line, exit code 2, and writes nothing."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import refusal

from lrt.cli.main import main
from lrt.evaluation.bits_per_byte import bits_per_byte
from lrt.evaluation.held_out import held_out
from lrt.inference.generate import score
from lrt.inference.weights import Int8Linear
from lrt.training.checkpoint import load_model

SMALL = (
    "--model.depth 2 --model.width 32 --model.heads 2 --model.context 64 --train.length 32 --train.batch 4 "
    "--train.eval-rows 2 --train.horizon steps=3 --train.log-every 1"
)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A trained run of three steps."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n\n" * 300, encoding="utf-8")
    data = f"--data.source {folder / 'text.txt'} --data.folder {folder / 'data'}"
    assert main(shlex.split(f"train {SMALL} {data} --out {folder / 'run'}")) == 0
    return folder / "run"


def fails(capsys, command: str, *parts: str) -> str:
    """Run a command that must be refused with all these words; return the line."""
    line = refusal(capsys, shlex.split(command))
    for part in parts:
        assert part in line
    return line


BAD = [
    ("tarin", "unknown command 'tarin'", "train"),
    ("train --recipe d99", "unknown recipe 'd99'", "d12"),
    ("train --model.dept 3", "--model.dept", "--model.depth"),
    ("train --model.depth three", "--model.depth", "three"),
    ("train --model.depth 0", "at least 1 block"),
    ("train --model.width 100 --model.heads 3", "100", "3"),
    ("train --model.memory.projection both", "both", "layerwise"),
    ("train --model.memory.source 9", "block 9", "1..3"),
    ("train --train.schedule interleaved", "takes a size", "interleaved-2"),
    ("train --train.schedule settled-3..1", "3..1"),
    ("train --train.horizon soon", "soon", "ratio=20"),
    ("train --train.length 4096", "4096", "256"),
    ("train --train.device tpu", "tpu", "cpu"),
    ("train --data.source /no/such/file", "/no/such/file"),
    ("train --resume /no/such/run", "/no/such/run"),
    ("train --train.parallel both", "both", "ddp"),
    ("train --train.max-skipped 0", "train.max_skipped is 0"),
    ("train --train.micro-batch 3", "micro_batch 3", "batch 8"),
    ("train --data.tokenizer /no/such/tokenizer", "/no/such/tokenizer"),
    ("train --init-from /no/such/run", "/no/such/run"),
    ("train --resume . --or-resume --train.batch", "--train.batch"),
    ("tokenize --validation 2", "validation is 2"),
    ("plan --cluster.devices 3", "batch 8", "3 devices"),
    ("schedule sideways-3", "sideways-3", "interleaved"),
    ("info --recipe nothing", "nothing"),
    ("eval /no/such/run", "/no/such/run"),
    ("sample /no/such/run", "/no/such/run"),
    ("chat /no/such/run", "/no/such/run"),
    ("bench everything", "choose one of"),
    ("demo --compute -1 --out nowhere", "--compute"),
]


@pytest.mark.parametrize("case", BAD, ids=lambda case: case[0])
def test_bad_input_is_one_line_and_writes_nothing(case, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fails(capsys, *case)
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("empty.txt", b"", "empty"),
        ("binary.txt", b"\x00\x01\x02\xff" * 100, "binary"),
        ("latin.txt", b"caf\xe9 " * 99, "UTF-8"),
    ],
)
def test_bad_text_files(name, content, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_bytes(content)
    fails(capsys, f"train {SMALL} --data.source {name}", name, said)
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == [name]


def test_a_gigantic_line_is_text_like_any_other(capsys, tmp_path, monkeypatch):
    """Three hundred kilobytes without a space or a line break, for bytes and for a BPE."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "line.txt").write_text("".join(chr(97 + i * i % 23) for i in range(300_000)), encoding="utf-8")
    for tokenizer in ("bytes", "bpe --vocab-size 300"):
        assert main(shlex.split(f"tokenize --source line.txt --tokenizer {tokenizer} --folder data")) == 0
    assert "vocabulary" in capsys.readouterr().out


def test_info_shows_the_published_sizes(capsys):
    for recipe, projection, overhead, size in [
        ("d20_paper", "shared", 0.00307, 1.316), ("d20_paper", "layerwise", 0.0504, 1.316),
        ("d24_paper", "shared", 0.00304, 1.988), ("d24_paper", "layerwise", 0.0576, 1.988),
    ]:  # fmt: skip
        main(shlex.split(f"info --recipe {recipe} --model.memory.projection {projection} --json"))
        facts = json.loads(capsys.readouterr().out)
        assert facts["memory_overhead"] == pytest.approx(overhead, rel=2e-3)
        without = facts["parameters"]["total"] - facts["parameters"]["memory"]
        assert without / 1e9 == pytest.approx(size, abs=5e-4)
    main(["info", "--recipe", "d20_paper"])
    out = capsys.readouterr().out
    assert "0.307%" in out and "1.316 B" in out


def test_schedule_is_drawn_as_text_and_svg(capsys, tmp_path):
    assert main(shlex.split(f"schedule interleaved-4 --length 16 --out {tmp_path / 's.svg'}")) == 0
    out = capsys.readouterr().out
    assert "█···█···█···█···" in out and "exact prefix 4" in out
    svg = (tmp_path / "s.svg").read_text(encoding="utf-8")
    assert "<svg" in svg and svg.count("#2f6fde") >= 16 + 16
    main(["schedule", "settled-1..3", "--length", "8"])
    assert "no gradient" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "means"),
    [
        ("hop-0..2:p=0.7/0.2/0.1", "mean of the draws: 2.40 token forwards, 2.13 effective at most (hop-0 70%"),
        ("settled-1..3:tolerance=0.1:budget=1.5", "if every budget is used up: 2.50 token forwards, 1.50 effective"),
    ],
)
def test_a_range_is_drawn_at_its_upper_end_with_the_mean_of_its_draws(name, means, capsys):
    assert main(["schedule", name, "--length", "8"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{name.partition('-')[0]}-{name.partition('..')[2][0]} over 8") and means in out
    main(["schedule", "hop-1", "--length", "8"])
    assert "mean" not in capsys.readouterr().out


def test_eval_reports_every_mode(run, capsys):
    assert main(["eval", str(run), "--rows", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["live_gap"] == pytest.approx(found["decoded"] - found["merged"])
    assert {"zero_memory", "passes", "by_position", "residuals", "schedule", "dtype", "step"} <= set(found)
    assert {"contraction", "kv_errors", "argmax_agreement", "kl"} <= set(found)
    assert main(["eval", str(run), "--rows", "2", "--source", str(run.parent / "text.txt"), "--length", "16"]) == 0
    out = capsys.readouterr().out
    assert "decoded (exact)" in out and "sweeps contract by" in out and "argmax agrees" in out


def test_matrices_in_8_bits_are_scored_and_served(run, capsys, monkeypatch):
    monkeypatch.setattr("lrt.inference.weights.LEAST", 32 * 32)
    scored = {}
    for weights in ("full", "int8"):
        assert main(["eval", str(run), "--rows", "2", "--json", "--weights", weights]) == 0
        scored[weights] = json.loads(capsys.readouterr().out)
        assert scored[weights]["weights"] == weights
    assert scored["int8"]["decoded"] != scored["full"]["decoded"]
    assert scored["int8"]["decoded"] == pytest.approx(scored["full"]["decoded"], rel=0.01)
    assert main(["eval", str(run), "--rows", "2", "--weights", "int8"]) == 0
    assert "float32, matrices in 8 bits" in capsys.readouterr().out
    fails(capsys, f"eval {run} --suite parity --weights int8", "--weights is for bits per byte", "leave it out")
    served = []
    monkeypatch.setattr("lrt.serve.server.run", lambda server, listener: served.append(server.served))
    monkeypatch.setattr("sys.setswitchinterval", lambda seconds: None)
    for weights in ("full", "int8"):
        assert main(shlex.split(f"serve {run} --port 0 --threads 1 --weights {weights}")) == 0
    assert [isinstance(one.model.head, Int8Linear) for one in served] == [False, True]


def test_rows_beyond_the_context_are_scored_and_named(run, capsys):
    """The recurrence has no longest row; what a score was measured on stands beside it."""
    source = run.parent / "text.txt"
    assert main(["eval", str(run), "--rows", "2", "--source", str(source), "--length", "100"]) == 0
    assert "100 tokens each (beyond its context of 64)" in capsys.readouterr().out
    assert main(["eval", str(run), "--rows", "2", "--source", str(source), "--length", "100", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert (figures["length"], figures["context"]) == (100, 64)
    loaded = load_model(run)
    rows = held_out(loaded, str(source), rows=2, length=100).rows
    nats = score(loaded.model, rows.tokens, rows.targets, mode="exact").nats
    assert figures["decoded"] == pytest.approx(bits_per_byte(nats, rows.bytes), rel=1e-5)
    assert main(["eval", str(run), "--rows", "2", "--source", str(source), "--length", "64"]) == 0
    assert "beyond" not in capsys.readouterr().out


def test_sample_is_a_function_of_the_seed(run, capsys):
    texts = []
    for seed in (1, 1, 2):
        assert main(shlex.split(f"sample {run} --prompt 'the quick' --max-new-tokens 20 --seed {seed}")) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]
    assert texts[0].startswith("the quick")


def test_a_sample_that_fails_is_shown_as_far_as_it_came(run, capsys, monkeypatch):
    def fails_after(*_: object, **__: object) -> Iterator[str]:
        yield " jum"
        raise ValueError("no token can be drawn")

    monkeypatch.setattr("lrt.inference.chat.complete", fails_after)
    assert main(["sample", str(run), "--prompt", "the fox"]) == 2
    assert capsys.readouterr() == ("the fox jum\n", "lrt sample: no token can be drawn\n")


def test_sample_refuses_what_does_not_fit(run, capsys):
    fails(capsys, f"sample {run} --prompt {'x' * 70}", "71 tokens", "64")
    fails(capsys, f"sample {run} --temperature -1", "temperature")
    fails(capsys, f"sample {run} --prefill sideways", "sideways", "jacobi")


def test_train_refuses_to_overwrite_and_resumes_to_nothing_left(run, capsys):
    line = fails(capsys, f"train {SMALL} --data.source {run.parent / 'text.txt'} --out {run}", "already holds a run")
    assert "--resume" in line
    assert main(["train", "--resume", str(run)]) == 0
    assert "decoded BPB" in capsys.readouterr().out


def test_tokenize_prints_the_folder(run, capsys):
    text, folder = run.parent / "text.txt", run.parent / "data2"
    assert main(shlex.split(f"tokenize --source {text} --folder {folder}")) == 0
    assert "training and" in capsys.readouterr().out
    assert list(folder.rglob("manifest.json"))
