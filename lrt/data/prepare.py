"""Prepare: from the name of a source to two token streams, made once and found again by what they depend on."""

import contextlib
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import final

from lrt.config.run import PAUSES, TASK
from lrt.data.dialogue import Document, text_of
from lrt.data.manifest import Manifest
from lrt.data.normalised import lost_text
from lrt.data.shards import TokenStream, open_split, split_documents, write_shards
from lrt.data.sources import documents, source_bytes, source_fingerprint
from lrt.data.synthetic import TaskRows, task_rows, task_tokenizer
from lrt.data.tokenizer import BPETokenizer, ByteTokenizer, PausingTokenizer, Tokenizer, load_tokenizer, train_bpe
from lrt.utils.files import expand_home

CHECKED = 2  # of what a preparation checks: data prepared with less is prepared again
SAMPLE_BYTES = 20_000_000  # text a BPE is trained on: more changes the merges little and costs minutes

ReportProgress = Callable[[int, int | None, str], None]


@final
@dataclass(frozen=True)
class Prepared:
    """Data ready for training: the folder it lies in, its tokenizer, and both splits."""

    folder: Path
    tokenizer: Tokenizer
    train: TokenStream | TaskRows
    val: TokenStream | TaskRows
    normalised: bool = False
    """Whether the tokens do not spell the text: bits per byte are of the normalised text."""
    text: str | None = None
    """Fingerprint of the source as it was read, see `source_fingerprint`; None where it was not looked at."""


@final
@dataclass(frozen=True, kw_only=True)
class _Source:
    """The arguments of `documents`, kept together since the source is read twice: for the BPE and for the shards."""

    source: str
    text_column: str
    subset: str | None
    split: str
    max_bytes: int | None

    def texts(self) -> Iterator[Document]:
        return documents(
            self.source,
            text_column=self.text_column,
            subset=self.subset,
            split=self.split,
            max_bytes=self.max_bytes,
        )

    def fingerprint(self) -> str:
        return source_fingerprint(self.source, text_column=self.text_column, subset=self.subset, split=self.split)

    def total(self) -> int | None:
        """About how many bytes of text will be read; None where unknown."""
        known = [size for size in (source_bytes(self.source), self.max_bytes) if size is not None]
        return min(known, default=None)


def prepare(
    *,
    source: str,
    text_column: str = "text",
    subset: str | None = None,
    split: str = "train",
    tokenizer: str,
    vocab_size: int,
    validation: float,
    max_bytes: int | None = None,
    folder: Path | str,
    progress: ReportProgress | None = None,
    verify: str = "size",
    normalised: bool = False,
) -> Prepared:
    """Make, or find again, `folder/<readable name>-<key>/` with the token shards of a source.

    source, text_column, subset, split, max_bytes: see `documents`. tokenizer: `bytes`, `bpe` (trained on the training
        documents, up to `vocab_size` ids), or the path of a tokenizer; any of them followed by `+pauses`: see
        `PausingTokenizer`. validation: share held out.
    normalised: whether a tokenizer may lose text (unknown words, lower-casing): scores are then of the normalised text.
    progress: called with (bytes of text done, total or None, what is going on).
    verify: how shards found again are checked, see `open_split`.
    ValueError: bad input, or an altered cache. The key covers files' sizes and times, so changed text is prepared anew.
    A synthetic task, `task:NAME`, needs no folder.
    """
    if source.startswith(TASK):
        train, val = task_rows(source, tokenizer)
        return Prepared(Path(folder), task_tokenizer(train), train, val)
    text = _Source(source=source, text_column=text_column, subset=subset, split=split, max_bytes=max_bytes)
    base = tokenizer.removesuffix(PAUSES)
    ready, pauses = _given_tokenizer(base), tokenizer[len(base) :]
    kind = (f"bpe{vocab_size}" if ready is None else ready.hash) + pauses
    fingerprint = text.fingerprint()
    facts = [CHECKED, fingerprint, max_bytes, validation, kind]
    facts += [] if ready is None or not ready.config.chat_templates else [dict(ready.config.chat_templates)]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]
    home = expand_home(folder) / f"{_slug(source)}-{_slug(kind if ready is None else tokenizer)}-{key}"
    if not home.exists():
        report = progress if progress is not None else _silent
        made = ready if ready is not None else _train(text, vocab_size, validation, report)
        made = _with_pauses(made) if pauses else made
        _tokenize(text, made, home, validation, normalised, report)
    prepared = _open(home, verify, normalised)
    if ready is not None:  # the shards may have been made with the same tokens and other templates
        prepared.tokenizer.config = ready.config
    return replace(prepared, text=fingerprint)


def _tokenize(
    text: _Source, tokenizer: Tokenizer, home: Path, validation: float, normalised: bool, report: ReportProgress
) -> None:
    """Write the shards; the last report says that all was read, for totals are estimates."""
    total, read = text.total(), 0

    def tokenized(done: int) -> None:
        nonlocal read
        read = done
        report(done, total, "tokenizing")

    write_shards(text.texts(), tokenizer, home, validation=validation, normalised=normalised, progress=tokenized)
    report(read, read, "tokenizing")


def reopen(places: Iterable[Path], tokens: str, tokenizer: Tokenizer, normalised: bool, verify: str) -> Prepared | None:
    """The token shards of a run, known by the hash of their training tokens; None if they are in none of the places.

    places: folders of shards, or folders that hold some. tokenizer: the run's own. verify, normalised: see `prepare`.
    ValueError: the shards with these tokens are damaged, or made with another tokenizer.
    """
    for home in itertools.chain.from_iterable(map(_shard_folders, places)):
        with contextlib.suppress(ValueError):
            if Manifest.load(home).hash("train") == tokens:
                break
    else:
        return None
    return _open(home, verify, normalised, tokenizer)


def _shard_folders(place: Path) -> list[Path]:
    """The folders of token shards that a place is or holds; what cannot be looked at holds none."""
    try:
        inner = sorted(place.iterdir()) if place.is_dir() else []
        return [folder for folder in (place, *inner) if (folder / "manifest.json").is_file()]
    except OSError:
        return []


def _open(home: Path, verify: str, normalised: bool, tokenizer: Tokenizer | None = None) -> Prepared:
    tokenizer, lost = tokenizer or load_tokenizer(home), Manifest.load(home).lost
    if lost and not normalised:
        raise ValueError(f"{home}: {lost_text(lost)}")
    train, val = (open_split(home, split, verify, tokenizer=tokenizer) for split in ("train", "val"))
    return Prepared(home, tokenizer, train, val, bool(lost))


def _given_tokenizer(name: str) -> Tokenizer | None:
    """The tokenizer a name stands for; None where it has to be trained first."""
    if name == "bpe":
        return None
    return ByteTokenizer() if name == "bytes" else load_tokenizer(name)


def _with_pauses(tokenizer: Tokenizer) -> Tokenizer:
    if not isinstance(tokenizer, (ByteTokenizer, BPETokenizer)):
        raise ValueError("the tokenizer has pauses already: leave +pauses out")
    return PausingTokenizer(tokenizer)


def _train(text: _Source, vocab_size: int, validation: float, report: ReportProgress) -> Tokenizer:
    def sample() -> Iterator[str]:
        done = 0
        for doc in _thinned(text, validation):
            yield doc
            done += len(doc.encode())
            report(done, SAMPLE_BYTES if total is None else min(total, SAMPLE_BYTES), "training the tokenizer")
            if done >= SAMPLE_BYTES:
                return

    total = text.total()
    return train_bpe(sample(), vocab_size)


def _thinned(text: _Source, validation: float) -> Iterator[str]:
    """Training documents, evenly spread over the source so that about SAMPLE_BYTES come together at its end.

    Where the size of the source is unknown, simply the first ones.
    """
    keep = min(1.0, SAMPLE_BYTES / (text.total() or SAMPLE_BYTES))
    due = 1.0  # the first document is always taken
    for split, doc in split_documents(text.texts(), validation):
        if split == "train":
            if due >= 1:
                due -= 1
                yield text_of(doc)
            due += keep


def _slug(name: str) -> str:
    """A short file name that recalls a source: letters, digits, dots and dashes."""
    last = [part for part in re.split(r"[/\\:]", name) if part][-1:] or ["data"]
    return re.sub(r"[^A-Za-z0-9.]+", "-", last[0]).strip("-.")[:40] or "data"


def _silent(done: int, total: int | None, note: str) -> None:
    pass
