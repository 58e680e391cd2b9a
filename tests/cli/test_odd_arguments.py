"""Arguments as shells and web pages spoil them: one line says what is wrong, before anything is done."""

from __future__ import annotations

from pathlib import Path

import pytest

from lrt.cli.eval import EvalFlags
from lrt.cli.main import main
from lrt.cli.parse import parse


@pytest.fixture
def refusal(tmp_path, monkeypatch, capsys):
    """Runs a line in a new folder, which must be refused in one line of at most 300 characters; returns that line."""
    monkeypatch.chdir(tmp_path)

    def run(line: str) -> str:
        assert main([arg if arg != "''" else "" for arg in line.split(" ")]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and len(error) <= 300
        return error

    return run


SPOILT = {
    "eval ''": "RUN is empty; give a path",
    "sample ''": "RUN is empty",
    "export run ''": "FOLDER is empty",
    "train --resume=": "--resume is empty; give a path",
    "train --out=": "--out is empty",
    "report ''": "is empty; give a path",
    "report a.jsonl ''": "is empty; give a path",
    "eval run –rows 4": "–rows begins with a typographic dash; write --rows;",
    "eval run —rows=4": "write --rows=4;",
    "train −−train.batch 4": "write --train.batch;",
    "eval run --rows “4”": "typographic quotation marks",
    "eval run --rows=’4’": "typographic quotation marks",
    "eval run --rows 4,": "--rows is '4,'; give a whole number",
    "eval run --rows=": "--rows is ''; give a whole number",
    "sample run --temperature 0,7": "--temperature is '0,7'; give a number",
    "eval run\0x": "RUN is 'run\\x00x': it holds control characters",
    "train --optim.clip inf": "optim.clip is inf",
    "train --train.gap-warning nan": "train.gap_warning is nan",
    "train --train.gap-warning inf": "train.gap_warning is inf",
}


@pytest.mark.parametrize("line", SPOILT)
def test_spoilt_arguments_are_named_in_one_line(line: str, refusal, tmp_path: Path):
    assert SPOILT[line] in refusal(line)
    assert not list(tmp_path.iterdir())


def test_a_flag_that_is_given_twice_is_told_and_typographic_text_is_text(monkeypatch, capsys):
    assert parse(EvalFlags, ["run", "--rows", "2", "--rows=3"], "eval").rows == 3
    assert capsys.readouterr().err == "lrt eval: --rows is given more than once; the last one counts\n"
    monkeypatch.setenv("RANK", "1")
    assert parse(EvalFlags, ["run", "--rows", "2", "--rows=3"], "eval").rows == 3
    assert str(parse(EvalFlags, ["–run", "--source", "“a”"], "eval").run) == "–run"
    assert capsys.readouterr().err == ""


DROPPED = {
    "eval run --mode exact": "--mode is for --suite and --tasks, not for bits per byte",
    "eval run --limit 3": "--limit is for",
    "eval run --include-path .": "--include-path is for --tasks",
    "eval run --suite parity --rows 4": "--rows is for bits per byte, not for --suite",
    "eval run --suite parity --source text.txt": "--source is for bits per byte",
    "eval run --tasks x --length 16": "--length is for bits per byte, not for --tasks",
    "eval run --tasks x --schedule parallel": "--schedule is for",
    "eval run --tasks x --weights int8": "--weights is for",
    "eval run --lengths 16": "--lengths is for --suite",
}


@pytest.mark.parametrize("line", DROPPED)
def test_flags_that_would_be_dropped_are_refused(line: str, refusal):
    assert DROPPED[line] in refusal(line)


HUGE = {
    "plan --cluster.flops inf": "--cluster.flops is inf",
    "plan --cluster.memory 1e-320": "--cluster.memory is 1e-320; give at least 1",
    "serve run --rows 9223372036854775807": "--rows is 9223372036854775807; give at most 65,536",
    "serve run --deadline 1e308": "--deadline is 1e+308; give some seconds, at most a day",
    "serve run --tolerance inf": "tolerance inf",
    "sample run --temperature 1e-400": "--temperature is '1e-400', too small to hold",
    "sample run --samples 9223372036854775807": "--samples is 9223372036854775807; give at most 100,000",
    "bench train --repeats 9223372036854775807": "--repeats is 9223372036854775807; give at most",
    "bench decode --batches 9223372036854775807": "--batches is 9223372036854775807; give at most",
    "bench serve run --keep-mb=-1": "--keep-mb is -1; give at least 0",
    "demo --compute 0": "--compute is 0.0; it must be positive",
    "convert run --out new --start small": "--start belongs to --memory residual, shared or layerwise",
    "convert run --out new --memory shared --seed 3": "--seed belongs to --start small",
    "convert run --out new --memory-source 3": "--memory-source belongs to --memory",
    "convert run --out new --memory shared --start small --start-scale inf": "--start-scale is inf",
    "schedule refinement-99999999999": "too large",
    "schedule settled-1..99999999999999999999999": "too large",
    "schedule interleaved-1..5000": "a range at most 1,024 sizes",
    "schedule chunked-99999999999": "at most 16,777,216",
    f"schedule settled-{'9' * 5000}": "is not a number or a range",
    "schedule refinement-1:weights=1e308/1e308": "must be numbers >= 0",
    "tokenize --source text.txt --vocab-size 4000000000": "at most 16,777,216",
    "tokenize --source a@1e308,b@1e308": "the weights are too large",
    "train --data.max-bytes 99999999999999999999": "lrt train: --data.max-bytes is 9999",
    "train --optim.alpha-lr 1e308": "optim.alpha_lr is 1e+308; its size must lie between",
    "train --model.softcap 1e308": "model.softcap is 1e+308",
    "train --model.rope-theta 1e-320": "model.rope_theta is 1e-320",
    "serve run --host=": "--host is empty",
}


@pytest.mark.parametrize("line", HUGE)
def test_sizes_that_no_machine_holds_are_refused_at_once(line: str, refusal):
    Path("text.txt").write_text("some words\n" * 50)
    assert HUGE[line] in refusal(line)


@pytest.mark.parametrize("line", ["demo --out", "sweep sweep.toml --out", "report r.jsonl --out"])
@pytest.mark.parametrize("place", ["file", "file/in", "link"])
def test_a_result_that_has_no_place_is_told_before_the_work(line: str, place: str, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("mine")
    Path("link").symlink_to("nowhere")
    Path("sweep.toml").write_text('[base]\ndata = { source = "no such text" }\n')
    Path("r.jsonl").write_text("")
    assert main([*line.split(), place]) == 2
    error = capsys.readouterr().err
    assert "cannot be made; remove it, or choose another" in error and error.count("\n") == 1
    assert Path("file").read_text() == "mine" and len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"),
        RuntimeError("std::bad_alloc"), ImportError("libtorch_cpu.so: failed to map segment from shared object"),
    ],
)  # fmt: skip
def test_what_does_not_fit_into_memory_is_one_line(error: Exception, refusal, monkeypatch):
    def work(*_: object) -> None:
        raise error

    monkeypatch.setattr("lrt.cli.report.main", work)
    remedy = " to load what it needs; raise the limit" if isinstance(error, ImportError) else "; use fewer rows"
    assert f"lrt report: not enough memory{remedy}" in refusal("report a.jsonl")
    for fault in (RuntimeError("a fault of ours"), ImportError("a fault of ours")):
        monkeypatch.setattr("lrt.cli.report.main", lambda _, fault=fault: (_ for _ in ()).throw(fault))
        with pytest.raises(type(fault), match="of ours"):
            main(["report", "a.jsonl"])


@pytest.mark.parametrize("columns", ["1", "0", "-5", "abc"])
def test_help_ends_whatever_the_screen_is_said_to_be(columns: str, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", columns)
    with pytest.raises(SystemExit):
        main(["info", "--help-all"])
    assert "--recipe" in capsys.readouterr().out


def test_a_current_folder_that_is_gone_is_named(tmp_path: Path, monkeypatch, capsys):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert main(["info", str(tmp_path)]) == 2
    assert "the current folder was removed" in capsys.readouterr().err
    assert main(["--version"]) == 0
