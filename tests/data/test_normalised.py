"""Tokenizers that lose text: found at preparation, refused or named; and tokenizer files that break the library."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from helpers import lossy_tokenizer
from tokenizers import models, normalizers, pre_tokenizers

from lrt.config.run import DataConfig
from lrt.data import BPETokenizer, ByteTokenizer, PausingTokenizer, load_tokenizer, prepare, train_bpe
from lrt.data.normalised import Spelling
from lrt.data.tokenizer_trial import try_tokenizer

TEXTS = [f"The café ﬁx number {i} costs  two Euros.\n" for i in range(40)]
LOSSES = {
    "Lowercase": "the café",
    "NFKC": "fix number",
    "StripAccents": "cafe",
    "unknown words": "café",
    "WordPiece": "##",
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return file


def prepared(source: Path, tokenizer: Path | str, **options):
    base = DataConfig(source=str(source), tokenizer=str(tokenizer), validation=0.1, folder=str(source.parent / "cache"))
    return prepare(replace(base, **options))


@pytest.mark.parametrize("kind", LOSSES)
def test_what_is_lost_is_said_and_refused_unless_allowed(kind: str, source: Path, tmp_path: Path):
    folder = lossy_tokenizer(tmp_path / "given", kind, TEXTS)
    with pytest.raises(ValueError, match=r"loses text: 40 of 40 documents .* '.+' comes back as '.+'; .*normalised"):
        prepared(source, folder)
    assert not any((tmp_path / "cache").iterdir())
    data = prepared(source, folder, normalised=True)
    assert data.normalised
    ids = data.train.read(0, len(data.train))
    spelled = data.tokenizer.decode(ids.tolist())
    assert data.tokenizer.token_bytes()[ids].sum() == len(data.tokenizer.decode_bytes(ids.tolist())) > 100
    assert (LOSSES[kind] in spelled) == (kind not in ("unknown words", "WordPiece"))
    with pytest.raises(ValueError, match="cache.*: the tokenizer loses text: 40 of 40 documents"):
        prepared(source, folder)  # found again, and still refused


def test_a_tokenizer_that_loses_only_elsewhere_serves(tmp_path: Path):
    plain = tmp_path / "plain.txt"
    plain.write_text("".join(f"line {i} of plain words\n" for i in range(50)))
    folder = lossy_tokenizer(tmp_path / "given", "NFKC", TEXTS)
    assert not prepared(plain, folder).normalised
    assert not prepared(plain, folder, normalised=True).normalised


def test_tokens_that_spell_nothing_are_refused_even_so(source: Path, tmp_path: Path):
    folder = lossy_tokenizer(tmp_path / "given", "unknown words", ["other", "words"])
    with pytest.raises(ValueError, match="spell nothing of the text: 40 of 40 documents"):
        prepared(source, folder, normalised=True)


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), train_bpe(TEXTS, 300), PausingTokenizer(train_bpe(TEXTS, 300))])
def test_ours_lose_nothing(tokenizer):
    spelling = Spelling(tokenizer)
    for text in [*TEXTS, " leading", "\ufeff\0\r\n"]:
        assert spelling.add(text, tokenizer.encode(text)) == len(text.encode())
    spelling.require_same()
    assert (spelling.changed, spelling.bytes) == (0, spelling.spelled)


def test_the_example_shows_the_first_difference():
    core = tokenizers.Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "a": 2, "b": 3}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.add_special_tokens(["<unk>", "<s>"])
    spelling = Spelling(BPETokenizer(core, "<s>"))
    for text in ("a b", "a  b", "a x b"):
        spelling.add(text, spelling.tokenizer.encode(text))
    assert (spelling.documents, spelling.changed, spelling.example) == (3, 2, ("a  b", "a b"))
    assert str(spelling).startswith("2 of 3 documents do not come back from their tokens")


# --- files that break the library ----------------------------------------------------------------------------------

BROKEN: dict[str, dict[str, Any]] = {
    "aborts": {"type": "Precompiled", "precompiled_charsmap": "////////"},
    "panics": {"type": "Precompiled", "precompiled_charsmap": "AAAAAA=="},
    "panics at a text": {"type": "Replace", "pattern": {"Regex": ""}, "content": "x"},
    "doubles 40 times": {
        "type": "Sequence",
        "normalizers": [{"type": "Replace", "pattern": {"String": "l"}, "content": "ll"}] * 40,
    },
    "puts a novel in front": {"type": "Prepend", "prepend": "x" * 10**6},
    "no object": {"type": []},
    "no normaliser": {"type": "Replace", "pattern": {"String": 3}, "content": 3},
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_normaliser_that_breaks_the_library_is_one_line(kind: str, tmp_path: Path):
    train_bpe(TEXTS, 300).save(tmp_path)
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"normalizer": BROKEN[kind]}))
    with pytest.raises(ValueError, match=r"tokenizer\.json: ") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_a_trial_passes_what_is_well_made():
    core = tokenizers.Tokenizer(models.BPE())
    core.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace(" ", "▁")])
    pattern = r"(?i:'s|'t|'re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+(?!\S)|\s+"
    core.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    try_tokenizer(json.loads(core.to_str()))


def test_a_trial_ends(monkeypatch):
    import lrt.data.tokenizer_trial as module

    monkeypatch.setattr(module, "SECONDS", 1)
    monkeypatch.setattr(module, "TRIAL", "import time; time.sleep(60)")
    with pytest.raises(ValueError, match="took more than 1 seconds"):
        module._try("another content")
