"""Settings that change nothing as a run is otherwise set are told, and no others."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from lrt.cli.main import main
from lrt.cli.parse import tell_unread
from lrt.config.recipes import RECIPES, recipe
from lrt.config.run import RunConfig, from_dict, merged, to_dict
from lrt.config.unread import unread

PLAIN = "model.memory.projection=none model.memory.residual=off"
CASES = {
    "data.tokenizer=bytes": "data.vocab_size data.normalised",
    "data.tokenizer=bpe": "data.normalised",
    "data.tokenizer=bpe+pauses": "data.normalised",
    "data.tokenizer=a.json": "data.vocab_size",
    "data.source=a.txt": "data.subset data.split",
    "data.source=hf:a/b": "",
    "data.source=a.txt,hf:a/b": "",
    "data.source=task:parity": "data.text_column data.max_bytes data.folder data.vocab_size data.subset",
    "data.validation_source=b.txt": "data.validation",
    "model.window_pattern=LL": "model.window",
    "model.window_pattern=SL": "",
    "model.last_layer=S": "",
    PLAIN: "model.memory.source model.memory.shift model.memory.blocks model.memory.gate_width model.memory.start "
    "optim.memory_lr optim.memory_warmup optim.gamma_lr train.gap_warning",
    "model.memory.projection=gates model.memory.residual=off": "model.memory.source model.memory.start optim.memory_lr",
    "model.memory.source=0": "model.memory.shift train.gap_warning",
    "model.residual_scalars=off": "optim.alpha_lr optim.beta_lr",
    "optim.decay=0.0": "optim.final",
    "train.parallel=ddp": "train.reshard",
    "train.parallel=fsdp": "",
    "model.backbone.rope.kind=none": "model.backbone.rope.factor model.backbone.rope.low",
    "model.backbone.rope.kind=linear": "model.backbone.rope.low model.backbone.rope.original",
    "model.backbone.rope.kind=llama3": "",
}
"""Settings, and fields that are not looked at then."""
ALL = sorted({field for fields in CASES.values() for field in fields.split()} | {"train.seed", "optim.clip"})


def configured(settings: str) -> RunConfig:
    data = to_dict(recipe("cpu_demo"))
    for part in settings.split():
        name, _, text = part.partition("=")
        value = {"off": False, "0": 0, "0.0": 0.0}.get(text, text)
        for key in reversed(name.split(".")):
            value = {key: value}
        data = merged(data, value)
    return from_dict(RunConfig, data)


@pytest.mark.parametrize("settings", CASES)
def test_what_changes_nothing_is_told(settings: str):
    config = configured(settings)
    for field in CASES[settings].split():
        flag = f"--{field.replace('_', '-')}"
        (sentence,) = unread(config, [flag, "--train.seed"])
        assert sentence.startswith(f"{flag} changes nothing: "), sentence


def test_nothing_is_told_where_it_has_a_meaning():
    full = configured(
        "data.source=hf:a/b model.window_pattern=SL model.backbone.rope.kind=llama3 "
        "train.parallel=fsdp model.memory.projection=layerwise"
    )
    some = [field for field in ALL if field not in ("data.normalised", "data.vocab_size")]  # each is for other tokens
    assert unread(full, [f"--{field.replace('_', '-')}" for field in some]) == []
    for tokenizer, field in (("bpe", "vocab-size"), ("a.json", "normalised")):
        assert unread(configured(f"data.tokenizer={tokenizer}"), [f"--data.{field}"]) == []


def test_fields_of_rules_exist_and_recipes_ask_for_nothing_unread():
    for name in RECIPES:
        assert unread(recipe(name), ["--train.seed", "--model.depth", "--optim.matrix-lr"]) == []
    for field in ALL:
        config: object = configured("train.parallel=ddp")
        for part in field.split("."):
            config = getattr(config, part)


def test_the_command_line_tells_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lrt.cli.train._train", lambda *_: 0)
    assert main(["train", "--data.tokenizer", "bytes", "--data.vocab-size", "500", "--train.seed", "1"]) == 0
    error = capsys.readouterr().err
    assert error == "lrt train: --data.vocab-size changes nothing: it is for data.tokenizer bpe, and that is bytes\n"
    assert main(["train", "--model.bos", "3"]) == 0
    assert "--model.bos changes nothing: it is the tokenizer's" in capsys.readouterr().err


TEXTS = {
    "a.txt": "a b c\n",
    "b.md": "d e f\n",
    "in/c.txt.gz": None,
    "rows/d.jsonl": '{"text": "x"}\n',
    "rows/e.txt": "y",
}
COLUMNS = {
    "a.txt": False, "in": False, "in/*.gz": False, "python": False, "a.txt,b.md": False, "a.txt@0.5,b.md@0.5": False,
    "rows": True, "rows/*.jsonl": True, "a.txt,rows/d.jsonl": True, "a.txt@0.5,rows@0.5": True, "hf:a/b": True,
    "nothing.txt": True, "task:parity": True,
}  # fmt: skip
"""Sources, and whether they have columns; what is not there is told elsewhere, and so are tasks."""
PLAIN_TEXT = "--data.text-column changes nothing: the source is plain text, without columns"


@pytest.mark.parametrize("command", ["train", "tokenize"])
def test_a_text_column_is_for_rows(command: str, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, text in TEXTS.items():
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_bytes(gzip.compress(b"g h i") if text is None else text.encode())

    def told(source: str, *more: str) -> str:
        args = ["--data.source", source, "--data.text_column=body", *more]
        tell_unread(command, merged_data(source, *more), args)
        return capsys.readouterr().err

    for source, has_columns in COLUMNS.items():
        sentence = told(source)
        assert (PLAIN_TEXT in sentence) is not has_columns, source
        assert ("drawn as it is needed" in sentence) is source.startswith("task:")
    assert told("a.txt", "--data.validation_source=b.md") == f"lrt {command}: {PLAIN_TEXT}\n"
    assert told("a.txt", "--data.validation_source=rows") == ""


def merged_data(source: str, *more: str) -> RunConfig:
    fields = dict(arg.removeprefix("--data.").split("=") for arg in more)
    return from_dict(RunConfig, merged(to_dict(recipe("cpu_demo")), {"data": {"source": source} | fields}))
