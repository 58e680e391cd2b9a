"""Prepare: one call from text to token streams, cached by exactly what they depend on."""

import json
import os
import sys

import pytest

from lrt.config.run import DataConfig
from lrt.data.prepare import prepare
from lrt.data.sources import documents
from lrt.data.tokenizer import ByteTokenizer, load_tokenizer, train_bpe

TEXT = "".join(f"Line {i} of a small text that someone wants to train on.\n" for i in range(400))


@pytest.fixture
def source(tmp_path):
    file = tmp_path / "small text.txt"
    file.write_text(TEXT)
    return file


def run(source, tmp_path, **options):
    settings = {"tokenizer": "bytes", "vocab_size": 300, "validation": 0.05, "folder": str(tmp_path / "cache")}
    calls = {name: options.pop(name) for name in ("progress", "verify") if name in options}
    return prepare(DataConfig(source=str(source), **(settings | options)), **calls)


def text_of(stream, tokenizer):
    return tokenizer.decode(stream.read(0, len(stream)))


def test_one_small_file_just_works(source, tmp_path):
    data = run(source, tmp_path)
    assert data.folder.name.startswith("small-text.txt-bytes-")
    assert text_of(data.train, data.tokenizer) + text_of(data.val, data.tokenizer) == TEXT
    assert 0.04 < len(data.val) / len(data.train) < 0.12
    assert os.listdir(tmp_path / "cache") == [data.folder.name]


def test_a_bpe_is_trained_on_training_text_and_kept(source, tmp_path):
    data = run(source, tmp_path, tokenizer="bpe")
    assert data.tokenizer.vocab_size == 300
    assert text_of(data.train, data.tokenizer) + text_of(data.val, data.tokenizer) == TEXT
    assert data.tokenizer.hash == train_bpe([text_of(data.train, data.tokenizer)], 300).hash
    assert load_tokenizer(data.folder).hash == data.tokenizer.hash


def test_a_tokenizer_can_be_brought_along(source, tmp_path):
    given = train_bpe(["other text altogether"] * 9, 280)
    given.save(tmp_path / "given")
    data = run(source, tmp_path, tokenizer=str(tmp_path / "given"))
    assert data.tokenizer.hash == given.hash
    assert "-given-" in data.folder.name


def test_any_tokenizer_may_take_pauses(source, tmp_path):
    plain, data = (run(source, tmp_path, tokenizer=name) for name in ("bpe", "bpe+pauses"))
    pause = data.tokenizer.vocab_size - 1
    ids = data.val.read(0, len(data.val)).tolist()
    kept = [i for i in ids if i != pause]
    assert kept == plain.val.read(0, len(plain.val)).tolist()
    assert len(ids) == 2 * len(kept) - kept.count(data.tokenizer.bos)  # none after BOS
    given = run(source, tmp_path, tokenizer=str(plain.folder) + "+pauses")
    assert given.tokenizer.hash == data.tokenizer.hash
    with pytest.raises(ValueError, match=r"has pauses already: leave \+pauses out"):
        run(source, tmp_path, tokenizer=str(data.folder) + "+pauses")


def test_the_second_call_reads_nothing_again(source, tmp_path):
    calls: list[tuple] = []
    first = run(source, tmp_path, tokenizer="bpe", progress=lambda *args: calls.append(args))
    assert {note for _, _, note in calls} == {"training the tokenizer", "tokenizing"}
    assert calls[-1][:2] == (len(TEXT), len(TEXT))
    before = {file: file.stat().st_mtime_ns for file in first.folder.iterdir()}
    second = run(source, tmp_path, tokenizer="bpe", progress=lambda *_: pytest.fail("prepared again"))
    assert second.folder == first.folder
    assert {file: file.stat().st_mtime_ns for file in second.folder.iterdir()} == before
    assert second.train.hash == first.train.hash


def test_whatever_changes_the_data_changes_the_folder(source, tmp_path):
    folders = [
        run(source, tmp_path, **options).folder
        for options in (
            {},
            {"tokenizer": "bpe"},
            {"tokenizer": "bpe", "vocab_size": 290},
            {"validation": 0.1},
            {"max_bytes": 5000},
        )
    ]
    source.write_text(TEXT + "One more line.\n")
    folders.append(run(source, tmp_path).folder)
    assert len(set(folders)) == len(folders)


def test_max_bytes_bounds_the_text(source, tmp_path):
    calls: list[tuple] = []
    data = run(source, tmp_path, max_bytes=5000, progress=lambda *args: calls.append(args))
    assert text_of(data.train, data.tokenizer) + text_of(data.val, data.tokenizer) == TEXT[:5000]
    assert calls[-1] == (5000, 5000, "tokenizing")


@pytest.mark.parametrize("size_known", [True, False])
def test_the_sample_for_the_bpe_is_training_text_bounded_and_spread(tmp_path, monkeypatch, size_known):
    import importlib

    module = importlib.import_module("lrt.data.prepare")
    monkeypatch.setattr(module, "SAMPLE_BYTES", 3000)
    if not size_known:
        monkeypatch.setattr(module, "source_bytes", lambda _: None)
    sampled: list[str] = []
    monkeypatch.setattr(module, "train_bpe", lambda texts, _: sampled.extend(texts) or ByteTokenizer())
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": f"{i:04d} " * 20}) + "\n" for i in range(300)))
    data = run(file, tmp_path, tokenizer="bpe", validation=0.5)
    held_out = text_of(data.val, data.tokenizer)
    assert not any(text in held_out for text in sampled)
    numbers = [int(text[:4]) for text in sampled]
    assert 1000 < sum(map(len, sampled)) < 3200
    assert min(numbers) < 50
    assert max(numbers) > 250 if size_known else max(numbers) < 150


def test_damage_to_the_cache_is_reported(source, tmp_path):
    data = run(source, tmp_path)
    shard = data.folder / "train_00000.bin"
    shard.write_bytes(shard.read_bytes()[:-2])
    with pytest.raises(ValueError, match=r"train_00000\.bin: .* delete the folder and prepare the data again"):
        run(source, tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokenizer": "nowhere"}, "nowhere: no such tokenizer"),
        ({"tokenizer": "bpe", "vocab_size": 100}, "vocab_size is 100"),
        ({"validation": 1.0}, "validation is 1.0"),
        ({"max_bytes": -5}, "max_bytes is -5"),
        ({"max_bytes": 1}, "cannot be split"),
    ],
)
def test_bad_settings_leave_nothing_behind(source, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        run(source, tmp_path, **options)
    assert not (tmp_path / "cache").exists() or not os.listdir(tmp_path / "cache")


def test_a_bpe_that_the_text_does_not_fill_is_told(tmp_path, caplog):
    (tmp_path / "a.txt").write_text("a line of words\n\n" * 40)
    data = DataConfig(source=str(tmp_path / "a.txt"), tokenizer="bpe", vocab_size=4096, folder=str(tmp_path / "data"))
    prepared = prepare(data)
    told = f"gives a BPE of {prepared.tokenizer.vocab_size} tokens, where data.vocab_size asks for 4096"
    assert prepared.tokenizer.vocab_size < 400 and told in caplog.text


def test_a_bpe_reads_a_source_twice_and_warns_once(tmp_path, caplog):
    folder, elsewhere = tmp_path / "texts", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    for i in range(9):
        (folder / f"{i}.txt").write_text(f"{i} {TEXT}" if i else "")
    (folder / "x.bin").write_bytes(b"\0")
    (folder / "half.jsonl").write_text('{"text": "\\ud800 half"}\n')
    (folder / "away").symlink_to(elsewhere, target_is_directory=True)
    run(folder, tmp_path, tokenizer="bpe")
    said = [record.getMessage() for record in caplog.records if record.name == "lrt.data.sources"]
    assert len(said) == len(set(said)) == 4, said
    run(folder, tmp_path, tokenizer="bpe", vocab_size=301)  # another preparation tells it again
    again = [record.getMessage() for record in caplog.records if record.name == "lrt.data.sources"]
    assert again == said * 2


def test_a_validation_source_has_the_subset_too(tmp_path, monkeypatch, source):
    asked = []
    monkeypatch.setattr("lrt.data.sources._dataset_rows", lambda *a: asked.append(a) or iter([{"text": "held out"}]))
    run(source, tmp_path, validation_source="hf:a/b", subset="en", split="test")
    assert asked == [("hf:a/b", "en", "test")]


@pytest.mark.parametrize("change", [lambda file: file.write_text(TEXT + "one more line\n"), lambda file: file.unlink()])
def test_a_text_that_changes_while_it_is_read_is_refused(change, source, tmp_path, monkeypatch):
    """Its tokens are known by what its file was before, so that they would be taken for another text's."""

    def changing(*args, **options):
        yield from documents(*args, **options)
        change(source)

    monkeypatch.setattr(sys.modules["lrt.data.prepare"], "documents", changing)
    with pytest.raises(ValueError, match=r"small text\.txt: it has changed while it was read: wait until"):
        run(source, tmp_path)
    assert os.listdir(tmp_path / "cache") == []
    monkeypatch.undo()
    source.write_text(TEXT)
    assert len(run(source, tmp_path).train)
