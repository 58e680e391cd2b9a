"""Sources: every kind of input gives its documents in a fixed order, and bad input gives one helpful line."""

import json
import logging
import os
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lrt.config.run import DataConfig
from lrt.data.sources import PIECE, WHOLE, cut_pieces, documents, source_bytes, source_fingerprint


def read(source, **options):
    return list(documents(str(source), **options))


def refused(source, **options) -> str:
    with pytest.raises(ValueError) as caught:
        read(source, **options)
    assert type(caught.value) is ValueError or type(caught.value).__module__ == "lrt.data.sources"
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# --- text ----------------------------------------------------------------------------------------------------------


def test_a_small_file_is_one_document_untouched(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffone\r\n\r\ntwo 🙂\n".encode())
    assert read(tmp_path / "a.txt") == ["one\r\n\r\ntwo 🙂\n"]


def test_a_folder_is_read_in_order_without_hidden_binary_and_empty_files(tmp_path, caplog):
    for name in ("b.md", "a.txt", "sub/c.py", "sub/0.txt", ".hidden", ".git/x.txt", "__pycache__/y.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "nul.bin").write_bytes(b"a\0b")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "empty.txt").touch()
    write_lines(tmp_path / "z.jsonl", [{"text": "row"}])
    with caplog.at_level(logging.WARNING):
        assert read(tmp_path) == ["a.txt", "b.md", "row", "sub/0.txt", "sub/c.py"]
    assert "skipped 2 of 8 files" in caplog.text


def test_a_glob_is_sorted_and_recursive(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("b.txt", "a.txt", "c.md", "sub/d.txt"):
        (tmp_path / name).write_text(name)
    assert read(tmp_path / "*.txt") == ["a.txt", "b.txt"]
    assert read(tmp_path / "**" / "*.txt") == ["a.txt", "b.txt", "sub/d.txt"]


def test_a_large_file_is_cut_at_blank_lines(tmp_path):
    paragraph = "A line of the paragraph.\n" * 40 + "\n"
    text = paragraph * (WHOLE // len(paragraph) + 10)
    (tmp_path / "big.txt").write_text(text)
    docs = read(tmp_path / "big.txt")
    assert "".join(docs) == text
    assert all(doc.endswith("\n\n") for doc in docs)
    assert all(PIECE // 2 < len(doc) <= PIECE + 1 for doc in docs[:-1])


def test_a_gigantic_line_is_cut_between_characters(tmp_path):
    text = "é🙂" * (WHOLE // 4)
    (tmp_path / "line.txt").write_text(text, encoding="utf-8")
    docs = read(tmp_path / "line.txt")
    assert "".join(docs) == text
    assert len(docs) > 5


@given(text=st.text(alphabet="ab \r\n", max_size=200), sizes=st.lists(st.integers(1, 50)), piece=st.integers(4, 40))
def test_pieces_join_to_the_text(text, sizes, piece):
    blocks, at = [], 0
    for size in [*sizes, len(text)]:
        blocks.append(text[at : at + size])
        at += size
    pieces = list(cut_pieces(blocks, piece))
    assert "".join(pieces) == text
    assert all(piece // 2 < len(p) <= piece + 2 for p in pieces[:-1])
    assert pieces == list(cut_pieces([text], piece)), "the cuts depend on the text, not on how it was read"


@pytest.mark.parametrize("limit", range(1, 16))
def test_max_bytes_counts_utf8_and_cuts_at_a_character(tmp_path, limit):
    (tmp_path / "a.txt").write_text("ab🙂cd", encoding="utf-8")
    (tmp_path / "b.txt").write_text("éfg", encoding="utf-8")
    whole = "ab🙂cdéfg".encode()
    got = "".join(read(tmp_path, max_bytes=limit)).encode()
    assert whole.startswith(got)
    assert min(limit, len(whole)) - 3 <= len(got) <= limit


def test_the_standard_library_is_a_source():
    docs = documents("python")
    assert next(docs).strip()
    assert sum(len(doc.encode()) for doc in documents("python", max_bytes=200_000)) <= 200_000
    plain, more = source_bytes("python"), source_bytes("python+site-packages")
    assert plain is not None
    assert more is not None
    assert more > plain > 5_000_000


# --- rows ----------------------------------------------------------------------------------------------------------


def test_jsonl_takes_the_column_and_skips_nulls_and_blank_lines(tmp_path):
    file = write_lines(tmp_path / "a.jsonl", [{"text": "one", "n": 1}, {"text": None}, {"text": ""}, {"text": "🙂"}])
    file.write_text(file.read_text() + "\n\n" + '{"text": "\\ud83d\\ude42 \\ud800"}\n')
    assert read(file) == ["one", "🙂", "🙂 \ufffd"]
    assert read(write_lines(tmp_path / "b.jsonl", [{"body": "x"}]), text_column="body") == ["x"]


def test_bad_jsonl_names_file_and_line(tmp_path):
    file = write_lines(tmp_path / "a.jsonl", [{"text": "one"}])
    good = file.read_text()
    for bad in ("{", "\udcff", "[" * 100_000):
        file.write_text(good + bad + "\n", errors="surrogateescape")
        assert f"{file}:2 is not " in refused(file)
    file.write_text(good + "[1]\n")
    assert f"{file}:2: holds no JSON object" in refused(file)
    file.write_text(good + '{"text": 5}\n')
    assert "holds int, not text" in refused(file)
    assert "a.jsonl:1: no column 'body': set text_column to one of text" in refused(file, text_column="body")


def test_parquet_reads_the_column(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [f"row {i}" for i in range(600)]
    file = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": [*rows, None], "n": [0] * 601}), file)
    assert read(file) == rows
    assert source_bytes(str(file)) is None
    assert "set text_column to one of text, n" in refused(file, text_column="body")
    assert "holds int, not text" in refused(file, text_column="n")
    file.write_bytes(b"not a parquet file")
    assert "a.parquet: not a readable parquet file" in refused(file)


@pytest.mark.parametrize("package", ["pyarrow", "datasets"])
def test_a_missing_package_is_one_clear_line(tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / "a.parquet").write_bytes(b"x")
    source = tmp_path / "a.parquet" if package == "pyarrow" else f"hf:{tmp_path}"
    assert f"needs the package {package}: pip install 'latent-recurrent-transformer[hf]'" in refused(source)


def test_a_local_dataset_takes_the_dataset_path(tmp_path):
    pytest.importorskip("datasets")
    write_lines(tmp_path / "train.jsonl", [{"text": "one\n\ntwo"}, {"text": None}, {"text": "three"}])
    write_lines(tmp_path / "test.jsonl", [{"text": "held out"}])
    source = f"hf:{tmp_path}"
    assert read(source) == ["one\n\ntwo", "three"]
    assert read(source, split="test") == ["held out"]
    assert read(source, max_bytes=4) == ["one\n"]
    assert "no column 'body': set text_column to one of text" in refused(source, text_column="body")
    assert "split nope): Bad split" in refused(source, split="nope")
    assert "check name, subset and split" in refused(source, subset="nope")
    before = source_fingerprint(source)
    assert source_fingerprint(source, split="test") != before
    write_lines(tmp_path / "train.jsonl", [{"text": "four"}])
    assert source_fingerprint(source) != before


def test_subsets_text_columns_and_parquet_of_a_dataset(tmp_path):
    """What `hf:owner/name` with a subset reads, from a folder with a dataset card: streamed, file by file."""
    datasets = pytest.importorskip("datasets")
    for subset, words in (("en", ["one", "two", "three"]), ("de", ["eins", "zwei"])):
        (tmp_path / subset).mkdir()
        rows = [{"body": word, "id": i} for i, word in enumerate(words)]
        for i, row in enumerate(rows):
            datasets.Dataset.from_list([row]).to_parquet(tmp_path / subset / f"train-{i}.parquet")
    listed = "".join(f"- config_name: {s}\n  data_files: {s}/train-*.parquet\n" for s in ("en", "de"))
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{listed}---\n")
    source = f"hf:{tmp_path}"
    assert read(source, subset="en", text_column="body") == ["one", "two", "three"]
    assert read(source, subset="de", text_column="body") == ["eins", "zwei"]
    assert read(source, subset="en", text_column="body", max_bytes=4) == ["one", "t"]
    assert "set text_column to one of body, id" in refused(source, subset="en")
    assert "column 'id' holds int, not text" in refused(source, subset="en", text_column="id")
    assert "BuilderConfig 'fr' not found" in refused(source, subset="fr", text_column="body")


def test_another_models_tokenizer_folder_prepares_a_dataset(tmp_path):
    """Both as people have them: a folder saved by transformers, and a dataset with a text column of its own."""
    pytest.importorskip("datasets")
    transformers = pytest.importorskip("transformers")
    from lrt.data.prepare import prepare
    from lrt.data.tokenizer import train_bpe

    core = train_bpe(["a quick brown fox"] * 30, 280).fast()
    core.add_special_tokens(["<|begin_of_text|>", "<|eot|>"])
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<|begin_of_text|>", eos_token="<|eot|>", chat_template="{{ messages }}"
    )
    theirs.save_pretrained(tmp_path / "words")
    rows = [{"body": f"a quick brown fox, number {i}"} for i in range(40)]
    (tmp_path / "set").mkdir()
    write_lines(tmp_path / "set" / "train.jsonl", rows)
    words, source = str(tmp_path / "words"), f"hf:{tmp_path / 'set'}"
    data = DataConfig(source=source, text_column="body", tokenizer=words, validation=0.2, folder=str(tmp_path / "data"))
    made = prepare(data)
    assert made.tokenizer.bos == theirs.bos_token_id
    ids = made.train.read(0, len(made.train)).tolist()
    texts = made.tokenizer.decode(ids)
    assert ids.count(theirs.bos_token_id) == texts.count("number") > 20
    first = ids[1 : ids.index(theirs.bos_token_id, 1)]
    assert theirs.decode(first) in [row["body"] for row in rows]


# --- errors and fingerprints ---------------------------------------------------------------------------------------


def test_bad_paths_are_refused(tmp_path):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "binaries").mkdir()
    (tmp_path / "binaries" / "a.bin").write_bytes(b"\0")
    (tmp_path / "utf16.txt").write_text("text", encoding="utf-16")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "cut.txt").write_bytes("é".encode()[:1])
    os.mkfifo(tmp_path / "pipe")
    assert "missing.txt: no such file or folder" in refused(tmp_path / "missing.txt")
    assert "empty.txt: the file is empty" in refused(tmp_path / "empty.txt")
    assert "folder: no files there" in refused(tmp_path / "folder")
    assert "binaries: holds no text" in refused(tmp_path / "binaries")
    assert "*.csv: no files there" in refused(tmp_path / "*.csv")
    assert "utf16.txt: UTF-16 text: convert it to UTF-8" in refused(tmp_path / "utf16.txt")
    assert "latin.txt: not UTF-8" in refused(tmp_path / "latin.txt")
    assert "cut.txt: not UTF-8" in refused(tmp_path / "cut.txt")
    assert "pipe: neither a file nor a folder" in refused(tmp_path / "pipe")
    assert "no such file or folder" in refused("x" * 5000)
    assert "the source is empty" in refused("")
    assert "max_bytes is 0" in refused("python", max_bytes=0)


def test_the_fingerprint_follows_files_and_options(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    source = str(tmp_path)
    seen = [source_fingerprint(source), source_fingerprint(source, text_column="body")]
    assert source_fingerprint(source) == seen[0]
    os.utime(tmp_path / "a.txt", ns=(1, 1))
    seen.append(source_fingerprint(source))
    (tmp_path / "a.txt").write_text("longer")
    os.utime(tmp_path / "a.txt", ns=(1, 1))
    seen.append(source_fingerprint(source))
    (tmp_path / "b.txt").write_text("more")
    seen += [source_fingerprint(source), source_fingerprint("hf:owner/name"), source_fingerprint("hf:owner/other")]
    assert len(set(seen)) == len(seen)


def test_a_pattern_leaves_out_what_this_package_wrote_unless_it_names_it(tmp_path, caplog):
    (tmp_path / "book.json").write_text('{"text": "words"}')
    run = tmp_path / "runs" / "one"
    (run / "tokenizer").mkdir(parents=True)
    for name in ("config.json", "tokenizer/tokenizer.json", "notes.json"):
        (run / name).write_text('{"text": "ours"}')
    with caplog.at_level(logging.WARNING):
        assert list(documents(str(tmp_path / "**/*.json"))) == ["words"]
    assert "left out 3 files in folders that were written by lrt" in caplog.text
    assert list(documents(str(run / "notes*"))) == ["ours"]


def test_half_characters_are_told(tmp_path, caplog):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "a \\ud800 b"}\n{"text": "\\ud83d\\ude00 whole"}\n')
    with caplog.at_level(logging.WARNING):
        assert list(documents(str(file))) == ["a \ufffd b", "\U0001f600 whole"]
    assert "1 texts held half characters" in caplog.text


def test_rows_that_are_empty_are_left_out_aloud(tmp_path, caplog):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "a"}\n{"text": null}\n{"text": ""}\n{"text": "b"}\n')
    with caplog.at_level(logging.WARNING):
        assert list(documents(str(rows))) == ["a", "b"]
    assert "rows.jsonl: 2 of 4 documents or rows are empty and were left out" in caplog.text
    caplog.clear()
    rows.write_text('{"text": "a"}\n')
    assert list(documents(str(rows))) == ["a"] and not caplog.records


def test_an_archive_is_refused_by_its_own_ending(tmp_path):
    (tmp_path / "a.tar.gz").write_bytes(b"x")
    assert ".tar files are not read" in refused(tmp_path / "a.tar.gz")
