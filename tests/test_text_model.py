"""The library's three calls: a run is trained, loaded, and asked for text and scores, as the commands do it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import events, tiny

import lrt
from lrt.cli.main import main
from lrt.config.recipes import cpu_demo
from lrt.inference.generate import score


@pytest.fixture(scope="module")
def trained(source: Path, tmp_path_factory) -> lrt.TextModel:
    """A model trained for a moment, called after its folder."""
    folder = tmp_path_factory.mktemp("library") / "mine"
    return lrt.train(tiny(cpu_demo(), source), folder, progress=False, train={"horizon": "steps=3", "seed": 5})


def test_training_takes_overrides_and_leaves_a_run(trained: lrt.TextModel):
    assert (trained.config.name, trained.config.train.horizon, trained.config.train.seed) == ("mine", "steps=3", 5)
    assert [e["step"] for e in events(trained.run, "eval")][-1] == 3
    assert not trained.model.training


def test_loading_gives_the_same_model(trained: lrt.TextModel):
    again = lrt.load(str(trained.run))
    assert again.config == trained.config
    assert all(torch.equal(a, b) for a, b in zip(again.model.parameters(), trained.model.parameters(), strict=True))
    assert again.generate("def ", seed=3) == trained.generate("def ", seed=3)


def test_text_is_what_the_command_writes(trained: lrt.TextModel, capsys):
    options = {"temperature": 0.7, "max_new_tokens": 20, "seed": 2}
    flags = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    capsys.readouterr()
    assert main(["sample", str(trained.run), "--prompt", "def ", *flags]) == 0
    text = trained.generate("def ", **options)
    assert capsys.readouterr().out == f"def {text}\n"
    assert "".join(trained.stream("def ", **options)) == text != trained.generate("def ", **options | {"seed": 3})


@pytest.mark.parametrize("mode", ["exact", "zero_memory", "interleaved-2"])
def test_a_score_is_the_sum_over_the_text(mode: str, trained: lrt.TextModel):
    text = "def é(x):\n"
    ids = trained.tokenizer.encode(text)
    row = torch.tensor([[trained.tokenizer.bos, *ids]])
    found = trained.score(text, mode=mode)
    assert found.nats == pytest.approx(score(trained.model, row[:, :-1], row[:, 1:], mode=mode).nats.sum().item())
    assert (found.tokens, found.bytes) == (len(ids), len(text.encode()))
    assert found.bits_per_byte == pytest.approx(found.nats / math.log(2) / len(text.encode()))
    assert mode in found.mode


def test_wrong_calls_name_what_is_wrong(trained: lrt.TextModel, tmp_path: Path):
    for text in ("", "x" * 1000):
        with pytest.raises(ValueError, match="context"):
            trained.score(text)
    with pytest.raises(TypeError, match="temprature"):
        trained.generate("x", temprature=1)
    with pytest.raises(ValueError, match="temperature"):
        trained.generate("x", temperature=-1)
    with pytest.raises(ValueError, match="horizn"):
        lrt.train("cpu_demo", tmp_path / "a", train={"horizn": "steps=1"})
    with pytest.raises(ValueError, match="unknown recipe"):
        lrt.train("d99")
    with pytest.raises(ValueError, match="already holds a run"):
        lrt.train(trained.config, trained.run)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_runs_names_them(trained: lrt.TextModel, tmp_path: Path, capsys):
    with pytest.raises(ValueError, match="holds the run .*mine; choose one"):
        lrt.load(trained.run.parent)
    for command in (["sample"], ["info"], ["eval"], ["train", "--resume"]):
        assert main([*command, str(trained.run.parent)]) == 2
        assert "mine" in capsys.readouterr().err
    with pytest.raises(ValueError, match="holds no checkpoint"):
        lrt.load(tmp_path)


def test_a_resumed_training_goes_on(trained: lrt.TextModel):
    again = lrt.train(trained.config, trained.run, resume=True, progress=False)
    assert replace(again.config, train=trained.config.train) == trained.config


@pytest.mark.parametrize("wrong", [None, b"def ", ["def ", "class "]])
def test_a_prompt_is_one_text(wrong, trained: lrt.TextModel):
    with pytest.raises(ValueError, match="no text to encode"):
        trained.generate(wrong)
    with pytest.raises(ValueError, match="no text to encode"):
        trained.score(wrong)


def test_one_stop_text_ends_the_answer_as_a_list_of_it_does(trained: lrt.TextModel):
    text = trained.generate("def ", seed=1, max_new_tokens=40)
    stop = text[10:13]
    once = trained.generate("def ", seed=1, max_new_tokens=40, stop=stop)
    assert once == text[: text.index(stop)] == trained.generate("def ", seed=1, max_new_tokens=40, stop=[stop])
