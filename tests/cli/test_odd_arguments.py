"""Arguments as shells and web pages spoil them: one line says what is wrong, before anything is done."""

from __future__ import annotations

from pathlib import Path

import pytest

from lrt.cli.eval import EvalFlags
from lrt.cli.main import main
from lrt.cli.parse import parse

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
def test_spoilt_arguments_are_named_in_one_line(line: str, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([arg if arg != "''" else "" for arg in line.split(" ")]) == 2
    error = capsys.readouterr().err
    assert SPOILT[line] in error and error.count("\n") == 1 and len(error) < 300
    assert not list(tmp_path.iterdir())


def test_a_flag_that_is_given_twice_is_told_and_typographic_text_is_text(monkeypatch, capsys):
    assert parse(EvalFlags, ["run", "--rows", "2", "--rows=3"], "eval").rows == 3
    assert capsys.readouterr().err == "lrt eval: --rows is given more than once; the last one counts\n"
    monkeypatch.setenv("RANK", "1")
    assert parse(EvalFlags, ["run", "--rows", "2", "--rows=3"], "eval").rows == 3
    assert str(parse(EvalFlags, ["–run", "--source", "“a”"], "eval").run) == "–run"
    assert capsys.readouterr().err == ""
