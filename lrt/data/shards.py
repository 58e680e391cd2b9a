"""Token shards: documents to memory-mapped files of ids, with a manifest that says what must be found in them.

A folder holds `train_00000.bin`, ..., `val_00000.bin`, ... (little-endian uint16 or uint32 ids, each document BOS and
its tokens), the tokenizer, and `manifest.json`. It is written aside and renamed when complete.
"""

import bisect
import hashlib
import itertools
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple, final

import numpy as np

from lrt.data.manifest import AGAIN, DTYPES, SPLITS, Manifest, Shard
from lrt.data.normalised import Spelling
from lrt.data.tokenizer import Tokenizer

SHARD_TOKENS = 2**26
ENCODE_BYTES = 2**20  # text encoded at a time: enough to keep the tokenizer's threads busy
FEW = 16  # documents: below this a split by whole documents would miss the wanted share by far


@final
class TokenStream:
    """The ids of a split as one long sequence, read from memory-mapped shards; open it with `open_split`.

    Attributes: `split`, `shards`, and `hash`, a sha256 hex of the content, to tell at resume that the data is the same.
    """

    def __init__(self, folder: Path, split: str, manifest: Manifest) -> None:
        self.split = split
        self.shards = tuple(shard for shard in manifest.shards if shard.split == split)
        self.hash = hashlib.sha256("".join(shard.sha256 for shard in self.shards).encode()).hexdigest()
        self._folder = folder
        self._vocab_size = manifest.vocab_size
        self._maps = [np.memmap(folder / shard.name, DTYPES[manifest.dtype], mode="r") for shard in self.shards]
        self._ends = list(itertools.accumulate(shard.tokens for shard in self.shards))

    def __len__(self) -> int:
        return self._ends[-1]

    def read(self, start: int, stop: int) -> np.ndarray:
        """Ids [start, stop) as int64 [stop - start], across shards. ValueError: out of range, or altered shards."""
        if not 0 <= start <= stop <= len(self):
            raise ValueError(f"cannot read ids {start} to {stop} of {len(self)}: stay within the stream")
        ids = np.empty(stop - start, dtype=np.int64)
        at = start
        while at < stop:
            i = bisect.bisect_right(self._ends, at)
            first = self._ends[i] - len(self._maps[i])
            until = min(stop, self._ends[i])
            ids[at - start : until - start] = self._ids(i, at - first, until - first)
            at = until
        return ids

    def _ids(self, i: int, start: int, stop: int) -> np.ndarray:
        ids = self._maps[i][start:stop]
        if ids.max() >= self._vocab_size:
            file = self._folder / self.shards[i].name
            raise ValueError(f"{file}: id {ids.max()} is outside the vocabulary of {self._vocab_size}: {AGAIN}")
        return ids


def open_split(
    folder: Path | str, split: str, verify: str = "size", *, tokenizer: Tokenizer | None = None
) -> TokenStream:
    """Open one split of a folder of shards.

    split: `train` or `val`. verify: `size` compares file sizes; `checksum` also reads every byte and the ids' range.
    tokenizer: where given, the shards must have been made with it.
    ValueError: missing, truncated or altered shards, a bad manifest, or another tokenizer.
    """
    if split not in SPLITS or verify not in ("size", "checksum"):
        raise ValueError(f"split {split!r}, verify {verify!r}: choose train or val, and size or checksum")
    folder = Path(folder)
    manifest = Manifest.load(folder)
    if tokenizer is not None and tokenizer.hash != manifest.tokenizer:
        raise ValueError(
            f"{folder / 'manifest.json'}: made with tokenizer {manifest.tokenizer[:12]}, not {tokenizer.hash[:12]}: "
            "use the tokenizer in that folder, or prepare the data again"
        )
    if not manifest.tokens(split):
        raise ValueError(f"{folder / 'manifest.json'}: lists no {split} shards: {AGAIN}")
    for shard in manifest.shards:
        if shard.split == split:
            _verify(folder / shard.name, shard, manifest, verify)
    return TokenStream(folder, split, manifest)


def _verify(file: Path, shard: Shard, manifest: Manifest, verify: str) -> None:
    if not file.is_file():
        raise ValueError(f"{file}: the shard is missing: {AGAIN}")
    expected = shard.tokens * DTYPES[manifest.dtype].itemsize
    actual = file.stat().st_size
    if actual != expected:
        raise ValueError(f"{file}: {actual} bytes where the manifest says {expected} (truncated?): {AGAIN}")
    if verify == "checksum":
        digest = hashlib.sha256()
        for block in _blocks(np.memmap(file, DTYPES[manifest.dtype], mode="r")):
            digest.update(block.data)
            if block.max() >= manifest.vocab_size:
                raise ValueError(
                    f"{file}: id {block.max()} is outside the vocabulary of {manifest.vocab_size}: {AGAIN}"
                )
        if digest.hexdigest() != shard.sha256:
            raise ValueError(f"{file}: its checksum is not the manifest's, so it was altered: {AGAIN}")


def _blocks(ids: np.ndarray, size: int = 2**20) -> Iterator[np.ndarray]:
    return (ids[at : at + size] for at in range(0, len(ids), size))


# --- writing -------------------------------------------------------------------------------------------------------


def write_shards(
    docs: Iterable[str],
    tokenizer: Tokenizer,
    folder: Path | str,
    *,
    validation: float,
    normalised: bool = False,
    shard_tokens: int = SHARD_TOKENS,
    progress: Callable[[int], None] | None = None,
) -> Manifest:
    """Stream documents into a new `folder` of shards, the tokenizer beside them; it appears complete or not at all.

    validation: share of the documents held out, see `split_documents`. normalised: whether tokens may lose text, see
        `Spelling`. shard_tokens: a shard is closed after the document that reaches it. progress: called with the bytes
        of text done so far.
    ValueError: the folder exists, too little text, a share outside (0, 1), or tokens that lose text.
    """
    folder = Path(folder)
    if folder.exists():
        raise ValueError(f"{folder}: is there already: name a new folder, or delete this one")
    aside = folder.with_name(f"{folder.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        aside.mkdir(parents=True)
    except OSError as error:
        raise ValueError(f"{folder}: cannot be made ({error.strerror}): name a folder that can be written") from None
    try:
        tokenizer.save(aside)
        dtype = "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"
        spelling = Spelling(tokenizer)
        pairs = _spelled(_encoded(split_documents(docs, validation), tokenizer), spelling, normalised)
        shards = _write_splits(pairs, tokenizer.bos, aside, dtype, shard_tokens, progress)
        lost = str(spelling) if spelling.changed else ""
        manifest = Manifest(
            tokenizer=tokenizer.hash, vocab_size=tokenizer.vocab_size, dtype=dtype, shards=shards, lost=lost
        )
        manifest.save(aside)
        return _publish(aside, folder, manifest)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _publish(aside: Path, folder: Path, manifest: Manifest) -> Manifest:
    try:
        os.rename(aside, folder)
    except OSError:
        # Another process may have prepared the same data meanwhile: then either copy will do.
        if not folder.is_dir() or Manifest.load(folder) != manifest:
            raise ValueError(f"{folder}: appeared meanwhile with other content: name a new folder") from None
    return manifest


def split_documents(docs: Iterable[str], validation: float) -> Iterator[tuple[str, str]]:
    """Assign each document to `train` or `val`: pairs (split, document), neither split empty.

    A document's split depends on a hash of its text, not on its place: adding documents moves no other one. The lowest
    hash always goes to val and the highest to train. With fewer than 16 documents, where whole documents would miss the
    share by far, each gives its tail to val instead. ValueError: share outside (0, 1), or too little text to split.
    """
    if not 0 < validation < 1:
        raise ValueError(f"validation is {validation}: give the share held out, between 0 and 1, such as 0.05")
    docs = iter(docs)
    first = list(itertools.islice(docs, FEW))
    if len(first) < FEW:
        yield from _split_tails(first, validation)
        return
    held: list[tuple[float, str]] = []  # the lowest and the highest so far
    for doc in itertools.chain(first, docs):
        held = sorted([*held, (_hash_share(doc), doc)])
        if len(held) == 3:
            share, middle = held.pop(1)
            yield ("val" if share < validation else "train"), middle
    yield "val", held[0][1]
    yield "train", held[1][1]


def _hash_share(doc: str) -> float:
    """A hash of the text as a number in [0, 1)."""
    return int.from_bytes(hashlib.blake2b(doc.encode(), digest_size=6).digest(), "big") / 2**48


def _split_tails(docs: list[str], validation: float) -> Iterator[tuple[str, str]]:
    if all(len(doc) < 2 for doc in docs):
        size = sum(len(doc) for doc in docs)
        raise ValueError(f"{size} characters of text cannot be split into train and validation: give more text")
    for doc in docs:
        tail = max(1, round(len(doc) * validation))
        at = max(1, len(doc) - tail)
        # A line break close by is the better place; the tail stays within twice the wanted length.
        at = doc.rfind("\n", max(0, at - tail), at) + 1 or at
        yield "train", doc[:at]
        if at < len(doc):
            yield "val", doc[at:]


class _Encoded(NamedTuple):
    """A document with its ids."""

    split: str
    doc: str
    ids: list[int]


def _encoded(pairs: Iterable[tuple[str, str]], tokenizer: Tokenizer) -> Iterator[list[_Encoded]]:
    """Documents with their ids, about ENCODE_BYTES of text at a time."""
    for batch in _batches(pairs):
        ids = tokenizer.encode_batch([doc for _, doc in batch])
        yield [_Encoded(*pair, i) for pair, i in zip(batch, ids, strict=True)]


def _spelled(batches: Iterable[list[_Encoded]], spelling: Spelling, normalised: bool) -> Iterator[list[_Encoded]]:
    """The same, each compared with its ids. ValueError: tokens that lose text, unless `normalised`, or all of it."""
    for batch in batches:
        for document in batch:
            spelling.add(document.doc, document.ids)
        if not normalised:
            spelling.require_same()
        yield batch
    spelling.require_some()


def _write_splits(
    batches: Iterable[list[_Encoded]],
    bos: int,
    folder: Path,
    dtype: str,
    shard_tokens: int,
    progress: Callable[[int], None] | None,
) -> tuple[Shard, ...]:
    writers = {split: _SplitWriter(folder, split, DTYPES[dtype], shard_tokens) for split in SPLITS}
    done = 0
    try:
        for batch in batches:
            for split, doc, ids in batch:
                size = len(doc.encode())
                writers[split].write([bos, *ids], size)
                done += size
            if progress is not None:
                progress(done)
    finally:
        for writer in writers.values():
            writer.close()
    return tuple(shard for writer in writers.values() for shard in writer.shards)


def _batches(pairs: Iterable[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    """Group documents to about ENCODE_BYTES characters each."""
    batch: list[tuple[str, str]] = []
    size = 0
    for pair in pairs:
        batch.append(pair)
        size += len(pair[1])
        if size >= ENCODE_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


@final
class _SplitWriter:
    """Appends documents to the shards of one split, hashing and counting as it goes."""

    def __init__(self, folder: Path, split: str, dtype: np.dtype, shard_tokens: int) -> None:
        self.shards: list[Shard] = []
        self._folder, self._split, self._dtype, self._shard_tokens = folder, split, dtype, shard_tokens
        self._file: BinaryIO | None = None

    def write(self, ids: list[int], size: int) -> None:
        raw = np.array(ids, dtype=self._dtype).tobytes()
        file = self._file or self._open()
        file.write(raw)
        self._digest.update(raw)
        self._tokens += len(ids)
        self._bytes += size
        self._documents += 1
        if self._tokens >= self._shard_tokens:
            self.close()

    def _open(self) -> BinaryIO:
        self._name = f"{self._split}_{len(self.shards):05d}.bin"
        self._digest = hashlib.sha256()
        self._tokens = self._bytes = self._documents = 0
        self._file = (self._folder / self._name).open("wb")
        return self._file

    def close(self) -> None:
        if self._file is None:
            return
        self._file.close()
        self._file = None
        self.shards.append(
            Shard(
                name=self._name,
                tokens=self._tokens,
                bytes=self._bytes,
                documents=self._documents,
                sha256=self._digest.hexdigest(),
            )
        )
