"""Shards: what is written is what is read, the split is fair and stable, and damage never goes unnoticed."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lrt.data import shard_file
from lrt.data.manifest import Manifest
from lrt.data.shards import open_split, split_documents, write_shards
from lrt.data.tokenizer import ByteTokenizer, train_bpe

TOKENIZER = ByteTokenizer()
DOCS = [f"document number {i} 🙂\n" * (1 + i % 5) for i in range(60)]


def assigned(docs, validation=0.2):
    splits: dict[str, list[str]] = {"train": [], "val": []}
    for split, doc in split_documents(docs, validation):
        splits[split].append(doc)
    return splits["train"], splits["val"]


def documents_in(stream) -> list[str]:
    ids = stream.read(0, len(stream))
    starts = np.flatnonzero(ids == TOKENIZER.bos)
    assert starts[0] == 0
    return [TOKENIZER.decode(doc) for doc in np.split(ids, starts[1:])]


@pytest.fixture
def folder(tmp_path):
    write_shards(DOCS, TOKENIZER, tmp_path / "data", validation=0.2, shard_tokens=500)
    return tmp_path / "data"


def edit(folder, change):
    file = folder / "manifest.json"
    data = json.loads(file.read_text())
    data.pop("seal", None)
    change(data)
    file.write_text(json.dumps(data))


def refused(folder, message, **options):
    with pytest.raises(ValueError, match=message) as caught:
        open_split(folder, "train", **options)
    assert type(caught.value) is ValueError
    assert "\n" not in str(caught.value)


# --- splitting -----------------------------------------------------------------------------------------------------


def test_the_split_keeps_every_document_once_and_about_the_share():
    docs = [f"doc {i}" for i in range(2000)]
    train, val = assigned(docs, 0.1)
    assert sorted(train + val) == sorted(docs)
    assert 120 < len(val) < 280


@given(order=st.permutations(DOCS[:30]), validation=st.floats(0.001, 0.999))
def test_the_split_ignores_order_and_leaves_no_side_empty(order, validation):
    train, val = assigned(order, validation)
    assert train
    assert val
    assert {*val} == {*assigned(DOCS[:30], validation)[1]}


def test_more_documents_move_none_but_the_extremes():
    _, before = assigned(DOCS, 0.2)
    _, after = assigned(DOCS + [f"new {i}" for i in range(500)], 0.2)
    assert len(before) > 3
    assert {*before} <= {*after}


@given(docs=st.lists(st.text(alphabet="ab\n", min_size=2, max_size=100), min_size=1, max_size=15))
def test_few_documents_each_give_their_tail(docs):
    train, val = assigned(docs, 0.1)
    assert [head + tail for head, tail in zip(train, val, strict=True)] == docs
    assert all(len(tail) <= 2 * max(1, round(0.1 * len(doc))) for tail, doc in zip(val, docs, strict=True))


def test_one_document_is_cut_at_a_line():
    text = "A line of some length here.\n" * 500
    train, val = assigned([text], 0.05)
    assert train[0] + val[0] == text
    assert val[0].startswith("A line")
    assert 0.04 < len(val[0]) / len(text) < 0.1


@pytest.mark.parametrize("docs", [[], ["x"], ["x", "y"]])
def test_too_little_text_is_refused(docs):
    with pytest.raises(ValueError, match="cannot be split into train and validation"):
        assigned(docs)


@pytest.mark.parametrize("validation", [0, 1, -0.1, float("nan")])
def test_a_share_outside_0_and_1_is_refused(validation):
    with pytest.raises(ValueError, match="give the share held out"):
        assigned(DOCS, validation)


# --- writing and reading -------------------------------------------------------------------------------------------


def test_documents_come_back(folder):
    train, val = (open_split(folder, split, "checksum", tokenizer=TOKENIZER) for split in ("train", "val"))
    assert len(train.shards) > 3, "the test should cross shards"
    assert (documents_in(train), documents_in(val)) == assigned(DOCS)
    manifest = Manifest.load(folder)
    assert manifest.dtype == "uint16"
    assert manifest.tokens("train") == len(train)
    assert sum(shard.bytes for shard in manifest.shards) == sum(len(doc.encode()) for doc in DOCS)
    assert sum(shard.documents for shard in manifest.shards) == len(DOCS)
    assert sorted(os.listdir(folder)) == sorted(
        ["manifest.json", "tokenizer.json", *(shard.name for shard in manifest.shards)]
    )


def test_any_slice_reads_across_shards(folder):
    stream = open_split(folder, "train")
    whole = stream.read(0, len(stream))
    assert whole.dtype == np.int64
    edges = [0, 1, *np.cumsum([shard.tokens for shard in stream.shards])]
    for start in edges:
        for stop in [edge + d for edge in edges for d in (-1, 0, 1)]:
            if start <= stop <= len(stream):
                assert np.array_equal(stream.read(start, stop), whole[start:stop])
    for start, stop in [(-1, 3), (5, 4), (0, len(stream) + 1)]:
        with pytest.raises(ValueError, match=f"of {len(stream)}"):
            stream.read(start, stop)


def test_writing_is_reproducible_and_the_hash_follows_the_content(folder, tmp_path):
    again = write_shards(iter(DOCS), TOKENIZER, tmp_path / "again", validation=0.2, shard_tokens=500)
    assert again == Manifest.load(folder)
    without_one = [doc for doc in DOCS if doc != assigned(DOCS)[0][0]]
    write_shards(without_one, TOKENIZER, tmp_path / "other", validation=0.2, shard_tokens=500)
    hashes = [open_split(tmp_path / name, "train").hash for name in ("data", "again", "other")]
    assert hashes[0] == hashes[1] != hashes[2]


def test_large_vocabularies_take_32_bits(tmp_path):
    class Wide:
        """Bytes, moved up by 100,000."""

        vocab_size, bos, hash, lossless = 100_257, 100_256, "0" * 64, True

        def encode_batch(self, texts):
            return [[100_000 + byte for byte in text.encode()] for text in texts]

        def save(self, folder):
            pass

    assert write_shards(DOCS, Wide(), tmp_path / "data", validation=0.2).dtype == "uint32"  # type: ignore[arg-type]
    ids = open_split(tmp_path / "data", "train", "checksum").read(0, 100)
    assert ids[0] == 100_256
    assert ids.min() >= 100_000


def test_progress_counts_bytes_up_to_the_whole(tmp_path):
    seen: list[int] = []
    docs = [f"{i} " * 50_000 for i in range(20)]
    write_shards(docs, TOKENIZER, tmp_path / "data", validation=0.2, progress=seen.append)
    assert len(seen) > 1
    assert seen == sorted(seen)
    assert seen[-1] == sum(len(doc) for doc in docs)


def test_a_failure_leaves_nothing_behind(tmp_path):
    def broken():
        yield from DOCS
        raise RuntimeError("the source broke")

    with pytest.raises(RuntimeError, match="the source broke"):
        write_shards(broken(), TOKENIZER, tmp_path / "data", validation=0.2)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_not_touched(folder):
    before = sorted(os.listdir(folder))
    with pytest.raises(ValueError, match="is there already"):
        write_shards(DOCS, TOKENIZER, folder, validation=0.2)
    assert sorted(os.listdir(folder)) == before


def test_two_writers_at_once_agree_or_the_later_is_refused(tmp_path):
    def racing(docs):
        write_shards(docs, TOKENIZER, target, validation=0.2)  # another process finishes first
        yield from DOCS

    target = tmp_path / "same"
    manifest = write_shards(racing(DOCS), TOKENIZER, target, validation=0.2)
    assert manifest == Manifest.load(target)
    target = tmp_path / "different"
    with pytest.raises(ValueError, match="appeared meanwhile with other content"):
        write_shards(racing(DOCS[1:]), TOKENIZER, target, validation=0.2)
    assert sorted(os.listdir(tmp_path)) == ["different", "same"]


def test_an_unwritable_place_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot be made"):
        write_shards(DOCS, TOKENIZER, tmp_path / "file" / "data", validation=0.2)


# --- damage --------------------------------------------------------------------------------------------------------


def test_damaged_shards_are_found(folder):
    shard = folder / "train_00001.bin"
    good = shard.read_bytes()
    shard.write_bytes(good[:-2])
    refused(folder, r"train_00001\.bin: .* bytes where the manifest says .*delete the folder")
    shard.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    refused(folder, r"train_00001\.bin: id .* outside the vocabulary", verify="checksum")
    stream = open_split(folder, "train")
    with pytest.raises(ValueError, match=r"train_00001\.bin: id .* outside the vocabulary"):
        stream.read(0, len(stream))
    shard.write_bytes(good[:2] + bytes([good[2] ^ 1]) + good[3:])
    refused(folder, r"train_00001\.bin: its checksum", verify="checksum")
    shard.unlink()
    refused(folder, r"train_00001\.bin: the shard is missing")
    open_split(folder, "val", "checksum")


CHANGES = ["one bit", "truncated", "emptied", "grown", "its time set back", "replaced by another"]


@pytest.mark.parametrize("change", CHANGES)
def test_shards_that_change_while_they_are_read(change: str, folder: Path):
    """The reader ends with one line: no other tokens, and no SIGBUS as from a memory map."""
    stream, shard = open_split(folder, "train", "checksum"), folder / "train_00000.bin"
    before, good, times = stream.read(0, 20), shard.read_bytes(), shard.stat()
    with shard.open("r+b") as file:
        if change in ("one bit", "its time set back"):
            file.write(bytes([good[0] ^ 1]))
        elif change == "grown":
            file.seek(0, os.SEEK_END)
            file.write(b"ab")
        elif change != "replaced by another":
            file.truncate(0 if change == "emptied" else 10)
    if change == "its time set back":
        os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))
    if change == "replaced by another":  # the file that is being read is another one
        (folder / "new").write_bytes(good[::-1])
        (folder / "new").replace(shard)
        assert np.array_equal(stream.read(0, 20), before)
        stream = open_split(folder, "train")
    with pytest.raises(
        ValueError, match=r"train_00000\.bin: (its checksum|id \d+ is outside|\d+ bytes where)"
    ) as caught:
        stream.read(0, 20)
    assert "\n" not in str(caught.value)


def test_shards_that_are_touched_or_linked_while_they_are_read_are_read_on(folder: Path):
    stream, shard = open_split(folder, "train", "checksum"), folder / "train_00000.bin"
    before = stream.read(0, len(stream))
    os.utime(shard)
    os.link(shard, folder / "backup")
    shard.chmod(0o600)
    assert np.array_equal(stream.read(0, len(stream)), before)
    shard.write_bytes(shard.read_bytes())
    assert np.array_equal(stream.read(0, len(stream)), before)


def test_more_shards_than_files_that_stay_open(folder: Path, monkeypatch):
    whole = open_split(folder, "train").read(0, len(open_split(folder, "train")))
    monkeypatch.setattr(shard_file, "MOST_OPEN", 2)
    stream = open_split(folder, "train")
    assert len(stream.shards) > 4
    before = len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else 0
    assert np.array_equal(stream.read(0, len(stream)), whole)
    if before:
        assert len(os.listdir("/proc/self/fd")) <= before
    (folder / stream.shards[0].name).unlink()
    with pytest.raises(ValueError, match="the shard is missing"):
        stream.read(0, 5)


def test_what_a_killed_writer_left_is_removed_by_the_next(tmp_path: Path):
    """Not what a living one is writing, nor what bears another name."""
    script = "import os, signal, sys\nfrom lrt.data.shards import write_shards\n"
    script += "from lrt.data.tokenizer import ByteTokenizer\n"
    script += "def docs():\n    yield from ['text '] * 100\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    script += f"write_shards(docs(), ByteTokenizer(), {str(tmp_path / 'killed')!r}, validation=0.2)"
    subprocess.run([sys.executable, "-c", script], check=False)
    (left,) = tmp_path.glob("killed.*.partial")
    mine = tmp_path / "notes.partial"
    old, young = (tmp_path / f"{name}.0123abcd.partial" for name in ("old", "young"))
    for folder in (mine, old, young):
        folder.mkdir()
    os.utime(old, (0, 0))

    def slow() -> Iterator[str]:
        (alive,) = tmp_path.glob("slow.*.partial")
        write_shards(DOCS, TOKENIZER, tmp_path / "quick", validation=0.2)
        assert alive.is_dir()
        yield from DOCS

    write_shards(slow(), TOKENIZER, tmp_path / "slow", validation=0.2)
    assert not left.exists() and not old.exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notes.partial", "quick", "slow", young.name]
    assert not list(tmp_path.rglob(".lock"))


def test_another_tokenizer_is_refused(folder):
    refused(folder, "made with tokenizer", tokenizer=train_bpe(DOCS, 300))


@pytest.mark.parametrize("name", ["../train_00000.bin", "/etc/train_00000.bin", "train_00000.bin/../x", "passwd", ""])
def test_shard_names_cannot_leave_the_folder(folder, name):
    edit(folder, lambda data: data["shards"][0].update(name=name))
    refused(folder, "unsafe or unknown shard name")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.update(format=2), "format 2"),
        (lambda data: data.pop("dtype"), "exactly the fields"),
        (lambda data: data.update(extra=1), "exactly the fields"),
        (lambda data: data.update(dtype="float64"), "dtype 'float64'"),
        (lambda data: data.update(dtype=["uint16"]), "dtype is"),
        (lambda data: data.update(vocab_size=True), "vocab_size is True"),
        (lambda data: data.update(shards=5), "shards is not a list"),
        (lambda data: data.update(shards=[]), "lists no train shards"),
        (lambda data: data["shards"].append(5), "a shard must have"),
        (lambda data: data["shards"].append(data["shards"][0]), "listed twice"),
        (lambda data: data["shards"][0].update(tokens=0), "tokens is 0"),
        (lambda data: data["shards"][0].update(tokens=10**15), "bytes where the manifest says"),
        (lambda data: data["shards"][0].update(tokens=1.5), "tokens is 1.5"),
    ],
)
def test_wrong_manifests_are_refused(folder, change, message):
    edit(folder, change)
    refused(folder, message)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000, b"1" * 10_000])
def test_malformed_manifests_are_one_line(folder, content):
    (folder / "manifest.json").write_bytes(content)
    refused(folder, r"manifest\.json: .*delete the folder")


def test_a_folder_without_manifest_is_not_taken_for_complete(folder):
    (folder / "manifest.json").unlink()
    refused(folder, "no complete token shards")


def test_unknown_choices_are_refused(folder):
    for split, verify in [("test", "size"), ("train", "fully")]:
        with pytest.raises(ValueError, match="choose train or val, and size or checksum"):
            open_split(folder, split, verify)


def test_a_text_that_is_there_several_times_is_on_one_side():
    docs = [f"text {i % 17}" for i in range(17 * 3)]
    for share in (0.01, 0.3, 0.99):
        sides: dict[str, set[str]] = {"train": set(), "val": set()}
        for split, doc in split_documents(docs, share):
            sides[split].add(doc)
        assert not sides["train"] & sides["val"] and all(sides.values())
        assert len(list(split_documents(docs, share))) == len(docs)
    with pytest.raises(ValueError, match="one text that is there several times"):
        list(split_documents(["the same"] * 40, 0.1))
