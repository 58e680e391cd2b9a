"""Several sources: read one after the other, or drawn from by weight; and a validation source of one's own."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lrt.cli.main import main
from lrt.config.run import DataConfig
from lrt.data.loader import BatchShape
from lrt.data.mixture import PERIOD, Mixture, read_mixture
from lrt.data.prepare import prepare
from lrt.data.sources import documents, source_bytes, source_fingerprint
from lrt.data.synthetic import batches
from lrt.evaluation.bits_per_byte import held_out_name, of_split, validation_rows


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """`a.txt` holds nothing but a's and `b.txt` nothing but b's, a fifth as many."""
    (tmp_path / "a.txt").write_text("a" * 3999 + "\n")
    (tmp_path / "b.txt").write_text("b" * 799 + "\n")
    return tmp_path


def config(texts: Path, source: str, **options) -> DataConfig:
    named = ",".join(f"{texts}/{part}" for part in source.split(","))
    return DataConfig(source=named, folder=str(texts / "data"), **{"validation": 0.2} | options)


def letters(tokens: torch.Tensor) -> list[str]:
    return ["ab"[int((row == ord("b")).sum() > (row == ord("a")).sum())] for row in tokens]


def loader(stream, **options):
    return batches(stream, BatchShape(**{"batch": 10, "length": 16, "bos": 256, "seed": 3} | options))


def test_rows_come_from_each_source_as_often_as_its_weight_says_and_no_source_ends(texts: Path):
    data = prepare(config(texts, "a.txt@3,b.txt@1"))
    assert isinstance(data.train, Mixture) and data.train.weights == [0.75, 0.25]
    drawn = [letter for step in range(40) for letter in letters(loader(data.train).batch(step).tokens)]
    assert drawn.count("b") == 100 and all(abs(drawn[:n].count("b") - n / 4) <= 1 for n in range(1, len(drawn) + 1))
    for step in (0, 7):
        parts = [loader(data.train, rank=rank, world=2).batch(step).tokens for rank in (0, 1)]
        assert torch.equal(torch.cat(parts), loader(data.train).batch(step).tokens)
    rows = validation_rows(data.val, data.tokenizer, rows=8, length=16)
    assert letters(rows.tokens).count("b") == 2
    assert of_split(data.val, rows, held_out_name(config(texts, "a.txt@3,b.txt@1"))).text.name.endswith("b.txt@1")


def test_each_source_is_seen_whole_before_any_of_it_comes_again(texts: Path):
    data = prepare(config(texts, "a.txt@3,b.txt@1"))
    one = prepare(config(texts, "b.txt"))
    alone = loader(one.train)
    mixed = [row for step in range(40) for row in loader(data.train).batch(step).tokens if letters(row[None]) == ["b"]]
    plain = torch.cat([alone.batch(step).tokens for step in range(10)])
    assert torch.equal(torch.stack(mixed), plain)


def test_other_weights_are_other_data_and_a_bpe_is_trained_on_all(texts: Path):
    hashes = {prepare(config(texts, source)).train.hash for source in ("a.txt@3,b.txt@1", "a.txt@2,b.txt@1", "a.txt")}
    assert len(hashes) == 3
    data = prepare(config(texts, "a.txt@1,b.txt@1", tokenizer="bpe", vocab_size=264))
    assert [len(data.tokenizer.encode(letter * 16)) < 16 for letter in "ab"] == [True, True]
    same = config(texts, "a.txt@1,b.txt@1", tokenizer="bpe", vocab_size=264)
    again = prepare(same, progress=lambda *_: pytest.fail("prepared again"))
    assert again.train.hash == data.train.hash
    pausing = prepare(config(texts, "a.txt@1,b.txt@1", tokenizer="bpe+pauses", vocab_size=264))
    assert pausing.tokenizer.vocab_size == data.tokenizer.vocab_size + 1


def test_sources_without_weights_are_read_one_after_the_other(texts: Path):
    source = f"{texts}/a.txt,{texts}/b.txt"
    assert [doc[0] for doc in documents(source)] == ["a", "b"]
    assert source_bytes(source) == 4800
    assert source_fingerprint(source) != source_fingerprint(f"{texts}/b.txt,{texts}/a.txt")
    assert sum(len(doc) for doc in documents(source, max_bytes=4100)) == 4100
    (texts / "with, a comma@2.txt").write_text("c" * 50)
    assert list(documents(str(texts / "with, a comma@2.txt"))) == ["c" * 50]
    assert read_mixture(str(texts / "with, a comma@2.txt"))[0].weight == 1


@pytest.mark.parametrize(
    ("source", "wrong"),
    [
        ("a@0.5,b", "'b' has no weight"),
        ("a@0.5,b@x", "'b@x' has no weight|no weight above 0"),
        ("a@0,b@1", "'a@0' has no weight above 0"),
        ("a@-1,b@1", "'a@-1' has no weight above 0"),
        ("a@1,b@inf", "no weight above 0"),
        ("a@1,a@2", "named twice"),
        ("a@1,b@1e-9", "b: its weight is less than 1 in 1000"),
    ],
)
def test_weights_that_make_no_sense_are_named(source: str, wrong: str):
    with pytest.raises(ValueError, match=wrong):
        read_mixture(source)


def test_shares_hold_exactly_in_every_period(texts: Path):
    data = prepare(config(texts, "a.txt@0.7,b.txt@0.3"))
    assert np.bincount(data.train.turns).tolist() == [round(0.7 * PERIOD), round(0.3 * PERIOD)]


def test_a_validation_source_is_held_out_and_all_of_the_source_is_trained_on(texts: Path):
    base = config(texts, "a.txt")
    own = replace(base, validation_source=str(texts / "b.txt"))
    data = prepare(own)
    assert data.tokenizer.decode(data.train.read(0, len(data.train))) == (texts / "a.txt").read_text()
    assert data.tokenizer.decode(data.val.read(0, len(data.val))) == (texts / "b.txt").read_text()
    rows = validation_rows(data.val, data.tokenizer, rows=8, length=16)
    assert of_split(data.val, rows, held_out_name(own)).text.name == str(texts / "b.txt")
    (texts / "c.txt").write_text("c" * 900)
    mixed = prepare(replace(config(texts, "a.txt@1,c.txt@1"), validation_source=str(texts / "b.txt")))
    assert isinstance(mixed.train, Mixture) and set(mixed.val.read(0, len(mixed.val))) == {256, ord("b"), ord("\n")}


def test_text_that_is_trained_on_is_not_held_out_too(texts: Path):
    for source in (str(texts), str(texts / "b.txt"), f"{texts}/a.txt@1,{texts}/*.txt@1"):
        with pytest.raises(ValueError, match="b.txt: is in data.source and in data.validation_source"):
            prepare(DataConfig(source=source, validation_source=f"{texts}/b.txt", folder=str(texts / "data")))


def test_lrt_tokenize_takes_the_flags_of_lrt_train(texts: Path, capsys):
    folder = texts / "data"
    for prefix in ("--data.", "--"):
        flags = f"{prefix}source {texts}/a.txt@2,{texts}/b.txt@1 {prefix}validation=0.2 {prefix}folder {folder}"
        assert main(shlex.split(f"tokenize {flags} {prefix}no-normalised")) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == second and "training and" in first
