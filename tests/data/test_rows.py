"""Structured and packed files are read by their names, never as raw text; what is left out of a folder is told."""

from __future__ import annotations

import gzip
import json
import os
import re
import resource
from pathlib import Path

import pytest

from lrt.data.shards import write_shards
from lrt.data.sources import documents
from lrt.data.tokenizer import ByteTokenizer

pyarrow = pytest.importorskip("pyarrow")
TEXTS = ["first text", 'second, with "quotes"\nand a line', "日本語"]
ROWS = [{"id": i, "text": text} for i, text in enumerate(TEXTS)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def written(folder: Path, name: str) -> Path:
    """ROWS in the format that a file's name says."""
    file, table = folder / name, pyarrow.table({"id": [0, 1, 2], "text": TEXTS})
    kind = name.removesuffix(".gz").removesuffix(".zst").rpartition(".")[2]
    if kind in ("arrow", "feather"):
        make = pyarrow.ipc.new_stream if kind == "arrow" else pyarrow.ipc.new_file
        with make(str(file), table.schema) as writer:
            writer.write_table(table)
        return file
    cells = ["id,text", *(f'{i},"{text.replace(chr(34), 2 * chr(34))}"' for i, text in enumerate(TEXTS))]
    content = {
        "jsonl": LINES, "ndjson": LINES, "json": json.dumps(ROWS), "csv": "\n".join(cells) + "\n",
        "tsv": "\n".join(re.sub(r"^(id|\d),", r"\1\t", cell) for cell in cells) + "\n",
    }[kind].encode()  # fmt: skip
    if name.endswith(".gz"):
        content = gzip.compress(content, mtime=0)
    if name.endswith(".zst"):
        content = pyarrow.compress(content, "zstd", asbytes=True)
    file.write_bytes(content)
    return file


@pytest.mark.parametrize(
    "name",
    ["a.jsonl", "a.ndjson", "a.JSONL", "a.json", "a.csv", "a.tsv", "a.arrow", "a.feather", "a.jsonl.gz", "a.ndjson.zst",
     "a.json.gz", "a.csv.zst"],
)  # fmt: skip
def test_every_format_gives_its_texts(name: str, tmp_path: Path):
    file = written(tmp_path, name.lower()).rename(tmp_path / name)
    assert list(documents(str(file))) == TEXTS
    with pytest.raises(ValueError, match=r"a\..*: no column 'body': set text_column to one of .*text"):
        list(documents(str(file), text_column="body"))


def test_packed_text_and_saved_datasets(tmp_path: Path):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"plain text\n", mtime=0))
    assert list(documents(str(tmp_path / "a.txt.gz"))) == ["plain text\n"]
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"))
    assert list(documents(str(tmp_path / "saved"))) == TEXTS
    datasets.Dataset.from_list(ROWS * 3).save_to_disk(str(tmp_path / "sharded"), num_shards=3)
    assert list(documents(str(tmp_path / "sharded"))) == TEXTS * 3
    (tmp_path / "sharded" / "other.arrow").write_bytes(b"of another data set")
    assert list(documents(str(tmp_path / "sharded"))) == TEXTS * 3
    (tmp_path / "sharded" / "data-00001-of-00003.arrow").unlink()
    with pytest.raises(ValueError, match="sharded: data-00001-of-00003.arrow is missing"):
        list(documents(str(tmp_path / "sharded")))
    datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS)).save_to_disk(str(tmp_path / "several"))
    with pytest.raises(ValueError, match="several: holds several splits, each in a folder: name one"):
        list(documents(str(tmp_path / "several")))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", LINES.encode(), "one JSON object a line: name it a.jsonl"),
        ("a.json", b"[1]", "row 1: holds no JSON object"),
        ("a.csv", b"id,text\n1\n", "a.csv:2: has fewer cells"),
        ("a.csv", b'id,text\n1,"open', "a.csv:.*not readable as CSV"),
        ("a.csv", b"id,text\n1,\xff\n", "a.csv: not readable as CSV in UTF-8"),
        ("a.csv", b'id, text\n1,"one"\n', "set text_column to one of id, ' text'"),
        ("a.arrow", b"nothing", "a.arrow: not a readable arrow file"),
        ("a.jsonl.gz", b"nothing", "a.jsonl.gz: cannot be read"),
        ("a.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)[:-12], "a.jsonl.gz: cannot be read"),
        ("a.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)[:12] + b"\xff" * 40, "a.jsonl.gz: cannot be read"),
        ("a.jsonl.zst", b"nothing", "a.jsonl.zst: cannot be read"),
        ("a.zip", b"PK", "a.zip: .zip files are not read"),
        ("a.tar.gz", b"\x1f\x8b", "a.tar.gz: .tar files are not read"),
        ("a.csv", b"id;text\n1;a\n", "parted by ';', not by commas: save it with commas"),
        ("a.csv", b"id\ttext\n1\ta\n", "not by commas: name it .tsv"),
        ("a.csv", b"text,text\na,b\n", "names a column twice"),
        ("a.csv", b"text\na,b\n", "a.csv:2: has more cells than the header"),
        ("a.txt", "text".encode("utf-16"), "UTF-16 text: convert it to UTF-8"),
    ],
)
def test_what_cannot_be_read_is_named(name: str, content: bytes, message: str, tmp_path: Path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(documents(str(tmp_path / name)))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", "a text"),
        ("a.jsonl", '{"text": "a text"}'),
        ("a.json", '[{"text": "a text"}]'),
        ("a.csv", "text\na text\n"),
    ],
)
def test_a_byte_order_mark_is_no_text(name: str, content: str, tmp_path: Path):
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content.encode())
    assert list(documents(str(tmp_path / name))) == ["a text"]


def test_what_is_left_out_of_a_folder_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "a.txt").write_text("a text")
    (tmp_path / "half.txt").write_bytes(b"much text\n" * 200_000 + b"\0")
    (tmp_path / "b.zip").write_bytes(b"PK")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "c.txt").write_text("c text")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    write_shards([f"document {i}" for i in range(30)], ByteTokenizer(), tmp_path / "runs" / "data", validation=0.1)
    (tmp_path / "runs" / "run" / "tokenizer").mkdir(parents=True)
    (tmp_path / "runs" / "run" / "config.json").write_text("{}")
    os.mkfifo(tmp_path / "pipe.txt")
    for name, target in {"lost.txt": "nowhere", "circle.txt": "circle.txt", "zeros.txt": "/dev/zero"}.items():
        (tmp_path / name).symlink_to(target)
    assert list(documents(str(tmp_path))) == ["a text", "c text"]
    for name in ("pipe", "lost", "circle", "zeros"):
        assert f"{name}.txt: left out, since it is no regular file" in caplog.text
    assert "skipped 2 of 4 files" in caplog.text and "b.zip, half.txt" in caplog.text
    assert "link: left out, since it is a link to a folder" in caplog.text
    assert "data: left out, since it is written by lrt" in caplog.text
    assert "run: left out, since it is written by lrt" in caplog.text
    caplog.clear()
    for i in range(9):
        os.mkfifo(tmp_path / f"pipe{i}")
    list(documents(str(tmp_path)))
    (line,) = (record for record in caplog.messages if "no regular file" in record)
    assert re.search(r": left out \d\d?, each of which is no regular file, or leads to none: .*, \.\.$", line)


def test_a_folder_that_cannot_be_read_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "a.txt").write_text("a text")
    (tmp_path / "locked").mkdir()
    scan = os.scandir

    def refusing(folder):
        if str(folder).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(folder))
        return scan(folder)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(ValueError, match="locked: cannot be read"):
        list(documents(str(tmp_path)))


# Files of a few bytes that would fill a machine.


def packed(file: Path, *parts: bytes) -> str:
    file.write_bytes(gzip.compress(b"".join(parts)))
    return str(file)


def test_a_line_or_cell_without_end_is_refused_before_it_is_held(tmp_path, monkeypatch):
    monkeypatch.setattr("lrt.data.rows.MOST_JSON", 2**16)
    long = b"a" * 2**20
    for name, parts, words in (
        ("a.jsonl.gz", (b'{"text":"', long), "a.jsonl.gz:1: a line of more than 65,536 bytes"),
        ("b.jsonl.gz", (b'{"text":"a"}\n{"text":"', long, b'"}'), "b.jsonl.gz:2: a line of more than 65,536 bytes"),
        ("a.json.gz", (b'[{"text":"', long, b'"}]'), "a.json.gz: holds more than 65,536 bytes of JSON"),
        ("a.csv.gz", (b"text\n", long), "a.csv.gz:2: a line of more than 65,536 bytes"),
        ("b.csv.gz", (b'text\n"', b"a\n" * 2**19), "field larger than field limit"),
        ("a.tsv.gz", (long,), "a.tsv.gz:1: a line of more than 65,536 bytes"),
    ):
        with pytest.raises(ValueError, match=re.escape(words)):
            list(documents(packed(tmp_path / name, *parts)))
    assert list(documents(packed(tmp_path / "c.jsonl.gz", b'{"text":"a"}\n\n{"text":"b"}'))) == ["a", "b"]
    assert list(documents(packed(tmp_path / "c.csv.gz", b'text\n"a\nb"\n\nc'))) == ["a\nb", "c"]


def test_tables_of_rows_that_take_no_room_are_refused_and_one_text_many_times_is_held_once(tmp_path):
    rows = 2**31 - 1
    once = pyarrow.RunEndEncodedArray.from_arrays([rows], ["a"])
    for column in (pyarrow.Array.from_buffers(pyarrow.null(), rows, [None]), once):
        table = pyarrow.table({"text": column})
        with pyarrow.ipc.new_file(str(tmp_path / "a.arrow"), table.schema) as writer:
            writer.write_table(table)
        with pytest.raises(ValueError, match=r"a\.arrow: 2,147,483,647 rows that repeat one another"):
            list(documents(str(tmp_path / "a.arrow")))
    big, parquet = "x" * 2**18, pytest.importorskip("pyarrow.parquet")
    same = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 20_000, pyarrow.int32()), [big])
    parquet.write_table(pyarrow.table({"text": same}), tmp_path / "a.parquet", dictionary_pagesize_limit=2**26)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert sum(text == big for text in documents(str(tmp_path / "a.parquet"))) == 20_000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**19  # kilobytes; all would be 5 GB


def test_a_column_that_is_there_twice_is_refused(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="names a column twice"):
        list(documents(str(tmp_path / "a.parquet")))
