"""The text that a run is scored on, by name and share: what its training held out, or another."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from lrt.config.run import DataConfig
from lrt.data import RowSource, Tokenizer, TokenStream, documents, source_bytes
from lrt.data.answers import DocumentEncoder
from lrt.data.dialogue import Document, text_of
from lrt.data.normalised import Spelling
from lrt.data.run_tokens import RunTokens
from lrt.evaluation.bits_per_byte import HeldOut, Rows, held_out_name, named, of_split, validation_rows
from lrt.inference.loaded import Loaded

BYTES_PER_TOKEN = 16
"""Text read for a row of another source, per token: more than tokens spell on average."""


@dataclass(frozen=True)
class TextInMemory(RowSource):
    """Tokens in memory, as a loader reads them, and which of them are targets."""

    ids: np.ndarray
    targets: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.ids[start:stop]

    def learned(self, start: int, stop: int) -> np.ndarray:
        return self.targets[start:stop]


def held_out(loaded: Loaded, source: str | None, *, rows: int, length: int, normalised: bool | None = None) -> HeldOut:
    """Rows of the run's validation split, or of another text source read as `lrt train` would.

    normalised: whether the tokens may lose text; by default as the run was trained.
    ValueError: the run's text is not what it was trained on, or it does not say what that was; give a source then.
    """
    allowed = loaded.config.data.normalised if normalised is None else normalised
    return _own(loaded, rows, length, allowed) if source is None else _other(loaded, source, rows, length, allowed)


def held_out_rows(loaded: Loaded, source: str | None, *, rows: int, length: int) -> Rows:
    """The rows of `held_out`."""
    return held_out(loaded, source, rows=rows, length=length).rows


def _own(loaded: Loaded, rows: int, length: int, normalised: bool) -> HeldOut:
    d, tokenizer = replace(loaded.config.data, normalised=normalised), loaded.tokenizer
    tokens = RunTokens.of(loaded.extra)
    if tokens is None:
        raise ValueError(
            f"{loaded.run} does not say what text it was trained on (a converted model?); name one with --source"
        )
    prepared = tokens.find(loaded.run, d, tokenizer)
    if isinstance(prepared.val, TokenStream):
        prepared.val.verify(checksum=True)
    chosen = validation_rows(prepared.val, tokenizer, rows=rows, length=length)
    return of_split(prepared.val, chosen, _name(d, tokens.changed(d)), prepared.normalised)


def _name(data: DataConfig, changed: bool) -> str:
    """The text that a run holds out, by name."""
    return held_out_name(data) + (" as it was tokenised" if changed else "")


def _other(loaded: Loaded, source: str, rows: int, length: int, normalised: bool) -> HeldOut:
    """Rows spread over as much of the source's beginning as they need."""
    d, tokenizer, enough = loaded.config.data, loaded.tokenizer, rows * length * BYTES_PER_TOKEN
    stream, spelling, read = _read(tokenizer, documents(source, text_column=d.text_column, max_bytes=enough))
    if not normalised:
        spelling.require_same()
    sample = validation_rows(stream, tokenizer, rows=rows, length=length)
    sizes = (len(text_of(doc).encode()) for doc in documents(source, text_column=d.text_column))
    partial, total = any(size > read for size in itertools.accumulate(sizes)), source_bytes(source)
    part = sample.tokens.numel() / (len(stream) - 1)
    share = min(1.0, part * read / total) if partial and total else None if partial else min(1.0, part)
    name = f"the first {read:,} bytes of {source}" if partial and not total else source
    return named(sample, name, share, spelling.changed > 0)


def _read(tokenizer: Tokenizer, texts: Iterable[Document]) -> tuple[TextInMemory, Spelling, int]:
    """Documents as tokens in memory, compared with what these spell, and their bytes."""
    encoder, spelling, read = DocumentEncoder(tokenizer), Spelling(tokenizer), 0
    ids, targets, open_end = [], [], True
    for doc in texts:
        (encoded,) = encoder.encode([doc])
        spelling.add_document(doc, encoded.ids[1:])
        read += len(text_of(doc).encode())
        learned = np.ones(len(encoded.ids), np.bool_) if encoded.learned is None else encoded.learned
        ids += encoded.ids
        targets += [open_end, *learned[1:]]
        open_end = encoded.open_end
    return TextInMemory(np.asarray(ids, dtype=np.int64), np.asarray(targets, dtype=np.bool_)), spelling, read
