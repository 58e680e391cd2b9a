"""Tokenizers that lose text: found at preparation, refused or named; and tokenizer files that break the library."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from helpers import lossy_tokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from lrt.config.run import DataConfig
from lrt.data.normalised import Spelling
from lrt.data.prepare import prepare
from lrt.data.tokenizer import BPETokenizer, ByteTokenizer, PausingTokenizer, load_tokenizer, train_bpe
from lrt.data.tokenizer_trial import try_tokenizer
from lrt.evaluation.bits_per_byte import target_bytes

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


# --- every kind of tokenizer, by the bytes that it stands for -------------------------------------------------------

ODD = [
    *TEXTS[:1], " leading space", "  two leading", "\nnewline first", "\ttab", "trailing \n", "UPPER lower",
    "a <unk> b", "x [X] y", "e\u0301 decomposed é", "a\u00a0b", "▁under▁score", "日本語 text", "emoji 😀!",
    "a_b", "x\r\ny", "\ufeffbom", "##hash", "end</w> x", "a \ufffd b", " ", "   ", "\n\n",
    "  [X]  z", "1 2 3", "don't", "\0nul", "", "café",
]  # fmt: skip
BYTES = {"pre": pre_tokenizers.ByteLevel(add_prefix_space=False), "dec": decoders.ByteLevel()}
LLAMA = {
    "norm": normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
    "dec": decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)
    ]),
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "bytes": BYTES,
    "bytes with a space in front": BYTES | {"pre": pre_tokenizers.ByteLevel(add_prefix_space=True)},
    "bytes, few known": BYTES | {"alphabet": []},
    "bytes, trimmed": BYTES | {"dec": decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 1)])},
    "bytes, Prepend": BYTES | {"norm": normalizers.Prepend(" ")},
    "bytes, Prepend x": BYTES | {"norm": normalizers.Prepend("x")},
    "bytes, Strip": BYTES | {"norm": normalizers.Strip()},
    "bytes, NFD": BYTES | {"norm": normalizers.NFD()},
    "bytes, added": BYTES | {"added": tokenizers.AddedToken("[X]", lstrip=True, rstrip=True)},
    "bytes, added and normalised": BYTES
    | {"norm": normalizers.Lowercase(), "added": tokenizers.AddedToken("[X]", normalized=True)},
    "Llama": LLAMA | {"fallback": True},
    "Llama without fallback": LLAMA,
    "Metaspace, always": {"pre": pre_tokenizers.Metaspace(), "dec": decoders.Metaspace()},
    "Metaspace, never": {
        "pre": pre_tokenizers.Metaspace(prepend_scheme="never"), "dec": decoders.Metaspace(prepend_scheme="never")
    },
    "collapsed": {"norm": normalizers.Replace(tokenizers.Regex(" {2,}"), " "), "pre": pre_tokenizers.Metaspace(),
                  "dec": decoders.Metaspace()},
    "another mark": {"norm": normalizers.Replace(" ", "_"), "dec": decoders.Replace("_", " ")},
    "no decoder": {"pre": pre_tokenizers.Whitespace()},
    "ends of words": {"pre": pre_tokenizers.WhitespaceSplit(), "dec": decoders.BPEDecoder("</w>")},
}  # fmt: skip


def made(kind: str) -> BPETokenizer:
    of, byte_level = KINDS[kind], kind.startswith("bytes")
    core = tokenizers.Tokenizer(models.BPE(unk_token=None if byte_level else "<unk>", byte_fallback="fallback" in of))
    for name, part in (("normalizer", "norm"), ("pre_tokenizer", "pre"), ("decoder", "dec")):
        if part in of:
            setattr(core, name, of[part])
    every = [f"<0x{byte:02X}>" for byte in range(256)] if "fallback" in of else []
    alphabet = of.get("alphabet", pre_tokenizers.ByteLevel.alphabet() if byte_level else [])
    specials = ["<s>", *([] if byte_level else ["<unk>"]), *every]
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator([*TEXTS[:2], "two words a b c d e z 1 2 3", "日本"] * 3, trainer)
    content = json.loads(core.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] not in every]
    core = tokenizers.Tokenizer.from_str(json.dumps(content))
    if "added" in of:
        core.add_tokens([of["added"]])
    return BPETokenizer(core, "<s>")


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_told_as_lost_comes_back_and_has_its_own_bytes(kind: str):
    tokenizer, unchanged = made(kind), 0
    for text in ODD:
        ids = [tokenizer.bos, *tokenizer.encode(text)]
        spelling = Spelling(tokenizer)
        spelling.add_document(text, ids[1:])
        if spelling.changed:
            continue
        unchanged += 1
        sizes = target_bytes(tokenizer, *(torch.tensor(x, dtype=torch.int64) for x in (ids[:-1], ids[1:])))
        alone = tokenizer.space_in_front and tokenizer.decode_bytes(ids[1:2]) == b" "  # counted: it has no other byte
        assert int(sizes.sum()) - alone == len(text.encode()), text
        assert tokenizer.decode(ids[1:]) == text
    assert unchanged == len(ODD) if kind in ("bytes", "bytes, Prepend", "bytes, trimmed") else 0 < unchanged < len(ODD)


def test_a_space_that_a_document_begins_with_is_lost_where_one_is_put_in_front():
    spelling = Spelling(made("bytes with a space in front"))
    for text in ("one", " one"):
        spelling.add_document(text, spelling.tokenizer.encode(text))
    assert (spelling.changed, spelling.example) == (1, (" one", "one"))
    spelling.add(" one", spelling.tokenizer.encode(" one"))  # a part of a text
    assert spelling.changed == 1


def test_another_mark_for_spaces_is_read_from_the_decoder():
    tokenizer = made("another mark")
    assert tokenizer.decode(tokenizer.encode("two words")) == "two words"


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
