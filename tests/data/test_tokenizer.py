"""Tokenizers: nothing lost, every byte accounted for, and no way for text to forge a special token."""

import json

import numpy as np
import pytest
import tokenizers
from helpers import byte_bpe
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, processors

from lrt.data.tokenizer import BPETokenizer, ByteTokenizer, PausingTokenizer, load_tokenizer, train_bpe

CORPUS = [
    "The cat sat on the mat, and the dog sat on the cat.\n" * 4,
    "def f(x):\r\n    return x + 1\n",
    "日本語 🙂 naïve",
] * 3
HARD = [
    "",
    "🙂👩‍👩‍👧",
    "日本語テキスト",
    "a\0b",
    "x\r\ny\rz",
    "   leading",
    "tail  ",
    "\ufeffmark",
    "<|bos|>",
    "a<|bos|>b",
    "\t\n ",
]
BPE = train_bpe(CORPUS, 300)
OURS = [ByteTokenizer(), BPE]
each_of_ours = pytest.mark.parametrize("tokenizer", OURS, ids=["bytes", "bpe"])


def sentencepiece_like(*, prepend: str = "always") -> tokenizers.Tokenizer:
    pieces = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)] + ["▁"] + list("Helowrd<s>/")
    core = tokenizers.Tokenizer(models.Unigram([(piece, -2.0) for piece in dict.fromkeys(pieces)], 0, True))
    core.add_special_tokens(["<unk>", "<s>", "</s>"])
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend)
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return core


def check_round_trip(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode_bytes(ids) == text.encode()
    assert tokenizer.token_bytes()[np.array(ids, dtype=int)].sum() == len(text.encode())
    assert tokenizer.bos not in ids
    assert all(0 <= token < tokenizer.vocab_size for token in ids)


@each_of_ours
@pytest.mark.parametrize("text", HARD)
def test_hard_texts_round_trip(tokenizer, text):
    check_round_trip(tokenizer, text)


@each_of_ours
@given(text=st.text(max_size=60))
def test_any_text_round_trips(tokenizer, text):
    check_round_trip(tokenizer, text)


@each_of_ours
@given(texts=st.lists(st.text(max_size=20), max_size=5))
def test_batch_is_each_alone(tokenizer, texts):
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]


@each_of_ours
@given(data=st.data())
def test_streamed_bytes_join_to_the_text(tokenizer, data):
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30))
    streamed = b"".join(tokenizer.decode_bytes([token]) for token in ids)
    assert streamed.decode("utf-8", errors="replace") == tokenizer.decode(ids)
    assert len(streamed) == sum(tokenizer.token_bytes()[token] for token in ids)


@each_of_ours
def test_special_tokens_spell_nothing(tokenizer):
    counts = tokenizer.token_bytes()
    assert counts.dtype == np.int32
    assert counts.shape == (tokenizer.vocab_size,)
    assert counts[tokenizer.bos] == 0
    assert np.count_nonzero(counts == 0) == 1
    assert tokenizer.decode([tokenizer.bos]) == ""


@each_of_ours
@pytest.mark.parametrize("outside", [-1, 10_000])
def test_ids_outside_the_vocabulary_are_named(tokenizer, outside):
    with pytest.raises(ValueError, match=f"token id {outside} is outside the vocabulary of {tokenizer.vocab_size}"):
        tokenizer.decode([outside])


def test_invalid_utf8_becomes_the_replacement_character():
    assert ByteTokenizer().decode([0x61, 0xFF, 0x62]) == "a\ufffdb"


@each_of_ours
def test_lone_surrogates_are_refused(tokenizer):
    with pytest.raises(ValueError, match="surrogates"):
        tokenizer.encode("a\ud800b")


@each_of_ours
def test_saved_and_loaded_is_equal(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "new")
    for path in (tmp_path / "new", tmp_path / "new" / "tokenizer.json"):
        loaded = load_tokenizer(path)
        assert type(loaded) is type(tokenizer)
        assert (loaded.hash, loaded.bos, loaded.vocab_size) == (tokenizer.hash, tokenizer.bos, tokenizer.vocab_size)
        assert loaded.encode("the cat 🙂") == tokenizer.encode("the cat 🙂")


def test_training_is_deterministic_and_compresses():
    again = train_bpe(iter(CORPUS), 300)
    assert again.hash == BPE.hash
    assert again.vocab_size == 300
    assert train_bpe(CORPUS, 301).hash != BPE.hash
    assert len(BPE.encode(CORPUS[0])) < len(CORPUS[0]) / 2


def test_bos_is_not_learnt_from_texts_full_of_it():
    tokenizer = train_bpe(["<|bos|><|bos|> <|bos|>"] * 50, 300)
    check_round_trip(tokenizer, "x<|bos|>y <|bos|>")
    assert tokenizer.decode_bytes(tokenizer.encode("<|bos|>")[:1]) == b"<|", "merged like any other text"


def test_a_vocabulary_below_the_bytes_is_refused():
    with pytest.raises(ValueError, match=r"vocab_size is 256 .* need 257"):
        train_bpe(CORPUS, 256)


@pytest.mark.parametrize(
    ("specials", "config", "expected"),
    [
        (["<s>", "</s>"], {}, "<s>"),
        (["</s>"], {}, "</s>"),
        (["<pad>", "<|endoftext|>"], {}, "<|endoftext|>"),
        (["<|im_end|>", "<|endoftext|>"], {"bos_token": None, "eos_token": "<|im_end|>"}, "<|endoftext|>"),
        (["<open>", "<s>"], {"bos_token": {"content": "<open>"}}, "<open>"),
        (["<end>"], {"eos_token": "<end>"}, "<end>"),
    ],
)
def test_foreign_tokenizers_open_documents_with_what_they_have(tmp_path, specials, config, expected):
    core = byte_bpe(CORPUS, *specials)
    core.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.bos == core.token_to_id(expected)
    for special in specials:
        check_round_trip(tokenizer, f"a {special}🙂 b{special}")
    tokenizer.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").hash == tokenizer.hash
    assert load_tokenizer(tmp_path / "saved").bos == tokenizer.bos


def test_foreign_settings_that_add_or_drop_tokens_are_off():
    core = byte_bpe(CORPUS, "<s>")
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    core.enable_truncation(4)
    core.enable_padding(length=50)
    check_round_trip(BPETokenizer(core, "<s>"), "a rather longer text than four tokens")


def test_added_words_count_their_own_bytes():
    core = byte_bpe(CORPUS, "<s>")
    core.add_tokens(["é é"])
    tokenizer = BPETokenizer(core, "<s>")
    check_round_trip(tokenizer, "xé éy")
    assert tokenizer.token_bytes()[core.token_to_id("é é")] == 5


def test_sentencepiece_space_and_byte_fallback():
    tokenizer = BPETokenizer(sentencepiece_like(), "<s>")
    ids = tokenizer.encode("Hello 🙂\n")
    assert tokenizer.decode(ids) == "Hello 🙂\n"
    assert tokenizer.decode_bytes(ids) == " Hello 🙂\n".encode()
    check_round_trip(BPETokenizer(sentencepiece_like(prepend="never"), "<s>"), "Hello 🙂\n")


def test_a_model_that_matches_specials_in_text_is_kept_from_it():
    core = sentencepiece_like(prepend="never")
    core.encode_special_tokens = True
    assert core.token_to_id("<s>") in core.encode("we<s>we").ids, "the hazard this test is about"
    check_round_trip(BPETokenizer(core, "<s>"), "we<s>we</s><s>")


def test_an_id_beyond_all_bounds_is_refused_before_anything_is_built(tmp_path):
    """The library writes a list of every id that is not there: gigabytes, for a file of some kilobytes."""
    train_bpe(["some words of a text"] * 9, 280).save(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    content["model"]["vocab"]["far"] = 2**32 - 1
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError, match="has the id 4,294,967,295; ids below 4,194,304"):
        load_tokenizer(tmp_path)


def test_foreign_tokenizers_that_cannot_serve_are_refused(tmp_path):
    byte_bpe(CORPUS, "<pad>").save(str(tmp_path / "none.json"))
    with pytest.raises(ValueError, match=r"none\.json: no BOS token and no document separator .*: name one"):
        load_tokenizer(tmp_path / "none.json")
    with pytest.raises(ValueError, match="no token '<x>'"):
        BPETokenizer(byte_bpe(CORPUS, "<s>"), "<x>")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is not valid JSON"),
        (b"[1]", "it must be an object"),
        (b"\xff\xfe", "is not UTF-8"),
        (b"[" * 100_000, "is not valid JSON"),
        (b"{}", "not in the tokenizers format"),
        (b'{"type": "bytes", "version": 2}', "another version"),
    ],
)
def test_malformed_files_are_one_line_errors(tmp_path, content, message):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        load_tokenizer(tmp_path)
    assert str(tmp_path / "tokenizer.json") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_tokenizer_is_named(tmp_path):
    with pytest.raises(ValueError, match="no such tokenizer"):
        load_tokenizer(tmp_path)


@each_of_ours
def test_pauses_stand_after_every_token_and_spell_nothing(tokenizer, tmp_path):
    pausing = PausingTokenizer(tokenizer)
    for text in HARD:
        ids = pausing.encode(text)
        assert ids[::2] == tokenizer.encode(text)
        assert ids[1::2] == [pausing.pause] * (len(ids) // 2)
        assert pausing.decode(ids) == text == pausing.decode_bytes(ids).decode()
    assert pausing.vocab_size == tokenizer.vocab_size + 1 == pausing.pause + 1
    assert pausing.token_bytes().tolist() == [*tokenizer.token_bytes().tolist(), 0]
    pausing.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert (again.hash, again.bos, again.specials) == (pausing.hash, tokenizer.bos, pausing.specials)
    assert again.hash != tokenizer.hash
    with pytest.raises(ValueError, match=r"train without \+pauses"):
        pausing.fast()


@pytest.mark.parametrize("wrong", [{"version": 2}, {"inner": 3}, {"bos": 3}, {"bos": "<|none|>"}, {"inner": {}}])
def test_a_damaged_file_with_pauses_is_refused(wrong, tmp_path):
    PausingTokenizer(BPE).save(tmp_path)
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | wrong))
    with pytest.raises(ValueError, match=r"tokenizer\.json: "):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("wrong", [None, b"abc", ["a", "b"], ("a", "b"), 3])
@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), train_bpe(["abc abd " * 20], 270)], ids=["bytes", "bpe"])
def test_what_is_no_text_is_refused_and_not_taken_as_a_pair_or_as_letters(tokenizer, wrong):
    with pytest.raises(ValueError, match="no text to encode"):
        tokenizer.encode(wrong)
    with pytest.raises(ValueError, match="no text to encode"):
        tokenizer.encode_batch("abc")
