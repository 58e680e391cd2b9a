"""Token shards: documents to files of ids, with a manifest that says what must be found in them.

A folder holds `train_00000.bin`, ..., `val_00000.bin`, ... (little-endian uint16 or uint32 ids, each document BOS and
its tokens), the tokenizer, and `manifest.json`. It is written aside and renamed when complete. Where some ids are no
targets, as in dialogues, `train_00000.mask` beside them has a bit for each id: 1 if it is learned.
"""

import bisect
import contextlib
import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple, final

import numpy as np

from lrt.data.answers import DocumentEncoder, Encoded
from lrt.data.dialogue import Document, text_of
from lrt.data.manifest import AGAIN, DTYPES, SPLITS, Manifest, Shard
from lrt.data.normalised import Spelling
from lrt.data.shard_file import ShardFile, ShardFiles
from lrt.data.tokenizer import Tokenizer
from lrt.utils.new_folder import folder_aside, put_in_place

SHARD_TOKENS = 2**26
ENCODE_BYTES = 2**20  # text encoded at a time: enough to keep the tokenizer's threads busy
FEW = 16  # documents: below this a split by whole documents would miss the wanted share by far


@final
class TokenStream:
    """The ids of a split as one long sequence, read from its shards; open it with `open_split`.

    Attributes: `split`, `folder`, `shards`, `hash`, a sha256 hex of the content, to tell at resume that the data is the
    same, and `answers`, whether answers alone are learned somewhere in it.
    """

    def __init__(self, folder: Path, split: str, manifest: Manifest) -> None:
        self.split, self.folder = split, folder
        self.shards, self.hash = manifest.of(split), manifest.hash(split)
        self.answers = any(shard.mask for shard in self.shards)
        dtype, size, bits = DTYPES[manifest.dtype], manifest.vocab_size, np.dtype(np.uint8)
        files = [ShardFile(folder / s.name, s.tokens, dtype, size, s.sha256) for s in self.shards]
        masked = [(i, s) for i, s in enumerate(self.shards) if s.mask]
        files += [ShardFile(folder / s.mask_name, -(-s.tokens // 8), bits, 256, s.mask) for _, s in masked]
        self._files = ShardFiles(tuple(files))
        self._masks = {i: len(self.shards) + k for k, (i, _) in enumerate(masked)}
        self._ends = list(itertools.accumulate(shard.tokens for shard in self.shards))

    def __len__(self) -> int:
        return self._ends[-1]

    def read(self, start: int, stop: int) -> np.ndarray:
        """Ids [start, stop) as int64 [stop - start], across shards. ValueError: out of range, or altered shards."""
        parts = [self._ids(*part) for part in self._parts(start, stop)]
        return np.concatenate([np.empty(0, np.int64), *parts])

    def learned(self, start: int, stop: int) -> np.ndarray:
        """Which of the ids [start, stop) are targets, bool [stop - start]."""
        parts = [self._learned(*part) for part in self._parts(start, stop)]
        return np.concatenate([np.empty(0, np.bool_), *parts])

    def _parts(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """The shards that [start, stop) lies in, each with the part of it."""
        if not 0 <= start <= stop <= len(self):
            raise ValueError(f"cannot read ids {start} to {stop} of {len(self)}: stay within the stream")
        while start < stop:
            i = bisect.bisect_right(self._ends, start)
            first, until = self._ends[i] - self.shards[i].tokens, min(stop, self._ends[i])
            yield i, start - first, until - first
            start = until

    def _learned(self, i: int, start: int, stop: int) -> np.ndarray:
        if i not in self._masks:
            return np.ones(stop - start, np.bool_)
        bits = np.unpackbits(self._files.read(self._masks[i], start // 8, -(-stop // 8)))
        return bits[start % 8 :][: stop - start].astype(np.bool_)

    def _ids(self, i: int, start: int, stop: int) -> np.ndarray:
        return self._files.read(i, start, stop).astype(np.int64)

    def verify(self, checksum: bool) -> None:
        """Compare every file with the manifest, see `ShardFile`."""
        self._files.verify(checksum)


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
    stream = TokenStream(folder, split, manifest)
    stream.verify(checksum=verify == "checksum")
    return stream


# --- writing -------------------------------------------------------------------------------------------------------


def write_shards(
    docs: Iterable[Document],
    tokenizer: Tokenizer,
    folder: Path | str,
    *,
    validation: float | Iterable[Document],
    normalised: bool = False,
    shard_tokens: int = SHARD_TOKENS,
    progress: Callable[[int], None] | None = None,
) -> Manifest:
    """Stream documents into a new `folder` of shards, the tokenizer beside them; it appears complete or not at all.

    validation: share of the documents held out, or others to hold out, see `split_documents`. normalised: whether
        tokens may lose text, see `Spelling`. shard_tokens: a shard is closed after the document that reaches it.
        progress: called with the bytes of text done so far.
    ValueError: the folder exists, too little text, a share outside (0, 1), or tokens that lose text.
    """
    folder = Path(folder)
    if folder.exists():
        raise ValueError(f"{folder}: is there already: name a new folder, or delete this one")
    with contextlib.ExitStack() as written:
        try:
            aside = written.enter_context(folder_aside(folder))
        except OSError as error:
            raise ValueError(
                f"{folder}: cannot be made ({error.strerror}): name a folder that can be written"
            ) from None
        tokenizer.save(aside)
        dtype = "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"
        spelling = Spelling(tokenizer)
        batches = _spelled(_encoded(split_documents(docs, validation), tokenizer), spelling, normalised)
        shards = _write_splits(batches, aside, dtype, shard_tokens, progress)
        lost = str(spelling) if spelling.changed else ""
        manifest = Manifest(
            tokenizer=tokenizer.hash, vocab_size=tokenizer.vocab_size, dtype=dtype, shards=shards, lost=lost
        )
        manifest.save(aside)
        return _publish(aside, folder, manifest)


def _publish(aside: Path, folder: Path, manifest: Manifest) -> Manifest:
    try:
        put_in_place(aside, folder)
    except OSError:
        # Another process may have prepared the same data meanwhile: then either copy will do.
        if not folder.is_dir() or Manifest.load(folder) != manifest:
            raise ValueError(f"{folder}: appeared meanwhile with other content: name a new folder") from None
    return manifest


def split_documents(docs: Iterable[Document], validation: float | Iterable[Document]) -> Iterator[tuple[str, Document]]:
    """Assign each document to `train` or `val`: pairs (split, document), neither split empty.

    validation: other documents, all of them for val, or a share. Then a document's split depends on a hash of its text,
    not on its place: adding documents moves no other one, and a text that is there twice is on one side. The lowest
    hash always goes to val and the highest to train.
    With fewer than 16 documents, where whole documents would miss the share by far, each text gives its tail to val
    instead. ValueError: share outside (0, 1), or too little text to split.
    """
    if not isinstance(validation, (int, float)):
        yield from (("train", doc) for doc in docs)
        yield from (("val", doc) for doc in validation)
        return
    if not 0 < validation < 1:
        raise ValueError(f"validation is {validation}: give the share held out, between 0 and 1, such as 0.05")
    docs = iter(docs)
    first = list(itertools.islice(docs, FEW))
    texts = [doc for doc in first if isinstance(doc, str)]
    if len(texts) == len(first) < FEW:
        yield from _split_tails(texts, validation)
        return
    extremes: dict[float, list[Document]] = {}  # the lowest and the highest so far, with what has the same text
    for doc in itertools.chain(first, docs):
        share = _hash_share(text_of(doc))
        extremes.setdefault(share, []).append(doc)
        if len(extremes) == 3:
            share = sorted(extremes)[1]
            yield from (("val" if share < validation else "train", middle) for middle in extremes.pop(share))
    if len(extremes) < 2:
        raise ValueError(
            "one dialogue cannot be split into train and validation, nor can one text that is there several times: "
            "give more of them"
        )
    yield from (("val", doc) for doc in extremes[min(extremes)])
    yield from (("train", doc) for doc in extremes[max(extremes)])


def _hash_share(doc: str) -> float:
    """A hash of the text as a number in [0, 1)."""
    return int.from_bytes(hashlib.blake2b(doc.encode(), digest_size=6).digest(), "big") / 2**48


def _split_tails(docs: list[str], validation: float) -> Iterator[tuple[str, str]]:
    if all(len(doc) < 2 for doc in docs):
        size = sum(len(doc) for doc in docs)
        raise ValueError(f"{size} characters of text cannot be split into train and validation: give more text")
    for doc in docs:
        tail = max(1, round(len(doc) * validation))
        cut = max(1, len(doc) - tail)
        # A line break close by is the better place; the tail stays within twice the wanted length.
        cut = doc.rfind("\n", max(0, cut - tail), cut) + 1 or cut
        yield "train", doc[:cut]
        if cut < len(doc):
            yield "val", doc[cut:]


class _Assigned(NamedTuple):
    """A document of a split with its tokens."""

    split: str
    doc: Document
    tokens: Encoded


def _encoded(pairs: Iterable[tuple[str, Document]], tokenizer: Tokenizer) -> Iterator[list[_Assigned]]:
    """Documents with their tokens, about ENCODE_BYTES of text at a time."""
    encoder = DocumentEncoder(tokenizer)
    for batch in _batches(pairs):
        encoded = encoder.encode([doc for _, doc in batch])
        yield [_Assigned(*pair, tokens) for pair, tokens in zip(batch, encoded, strict=True)]


def _spelled(batches: Iterable[list[_Assigned]], spelling: Spelling, normalised: bool) -> Iterator[list[_Assigned]]:
    """The same, each compared with its ids. ValueError: tokens that lose text, unless `normalised`, or all of it."""
    for batch in batches:
        for _, doc, tokens in batch:
            spelling.add_document(doc, tokens.ids[1:])
        if not normalised:
            spelling.require_same()
        yield batch
    spelling.require_some()


def _write_splits(
    batches: Iterable[list[_Assigned]],
    folder: Path,
    dtype: str,
    shard_tokens: int,
    progress: Callable[[int], None] | None,
) -> tuple[Shard, ...]:
    writers = {split: _SplitWriter(folder, split, DTYPES[dtype], shard_tokens) for split in SPLITS}
    done = 0
    try:
        for batch in batches:
            for split, doc, tokens in batch:
                size = len(text_of(doc).encode())
                writers[split].write(tokens, size)
                done += size
            if progress is not None:
                progress(done)
    finally:
        for writer in writers.values():
            writer.close()
    return tuple(shard for writer in writers.values() for shard in writer.shards)


def _batches(pairs: Iterable[tuple[str, Document]]) -> Iterator[list[tuple[str, Document]]]:
    """Group documents to about ENCODE_BYTES characters each."""
    batch: list[tuple[str, Document]] = []
    size = 0
    for pair in pairs:
        batch.append(pair)
        size += len(text_of(pair[1]))
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
        self._learned: list[np.ndarray] = []
        self._open_end = True  # of the document before

    def write(self, document: Encoded, size: int) -> None:
        raw = np.array(document.ids, dtype=self._dtype).tobytes()
        file = self._file or self._open()
        file.write(raw)
        self._digest.update(raw)
        self._learned.append(document.targets(self._open_end))
        self._open_end = document.open_end
        self._tokens += len(document.ids)
        self._bytes += size
        self._documents += 1
        if self._tokens >= self._shard_tokens:
            self.close()

    def _open(self) -> BinaryIO:
        self._name = f"{self._split}_{len(self.shards):05d}.bin"
        self._digest, self._learned = hashlib.sha256(), []
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
                mask=self._write_mask(),
            )
        )

    def _write_mask(self) -> str:
        """Write which ids of the shard are learned; the hash of the file, or nothing where all are."""
        learned = np.concatenate(self._learned)
        if learned.all():
            return ""
        raw = np.packbits(learned).tobytes()
        (self._folder / self._name).with_suffix(".mask").write_bytes(raw)
        return hashlib.sha256(raw).hexdigest()
