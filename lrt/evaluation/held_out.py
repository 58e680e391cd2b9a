"""The text that a run is scored on, by name and share: what its training held out, or another."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from lrt.data.answers import DocumentEncoder
from lrt.data.dialogue import Document, text_of
from lrt.data.loader import RowSource
from lrt.data.mixture import read_mixture
from lrt.data.normalised import Spelling
from lrt.data.run_tokens import RunTokens
from lrt.data.shards import TokenStream
from lrt.data.sources import both, documents, is_one_text, source_bytes
from lrt.data.tokenizer import Tokenizer
from lrt.evaluation.bits_per_byte import HeldOut, held_out_name, named, of_split, validation_rows
from lrt.evaluation.score_names import BEGINNING
from lrt.inference.loaded import Loaded

BYTES_PER_TOKEN = 16
"""Text read for a row of another source, per token: more than tokens spell on average."""
COUNTED = 2**26
"""Bytes of the largest source of several files, or of structured ones, whose text is counted."""


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
    return of_split(prepared.val, chosen, held_out_name(d, tokens.changed(d)), prepared.normalised)


def _other(loaded: Loaded, source: str, rows: int, length: int, normalised: bool) -> HeldOut:
    """Rows spread over as much of the source's beginning as they need."""
    d, tokenizer, enough = loaded.config.data, loaded.tokenizer, rows * length * BYTES_PER_TOKEN
    stream, spelling, read = _read(tokenizer, documents(source, text_column=d.text_column, max_bytes=enough))
    if not normalised:
        spelling.require_same()
    sample = validation_rows(stream, tokenizer, rows=rows, length=length)
    total = _whole(source, d.text_column, read)
    part = sample.tokens.numel() / (len(stream) - 1)
    if total == read:
        return named(sample, source + _trained_on(loaded, source), min(1.0, part), spelling.changed > 0)
    name = f"{BEGINNING}{read:,} bytes of {source}{_trained_on(loaded, source)}"
    return named(sample, name, None if total is None else part * read / total, spelling.changed > 0)


def _whole(source: str, text_column: str, read: int) -> int | None:
    """Bytes of all text of a source of which `read` were read; None where only reading very much would tell."""
    size, plain, counted = source_bytes(source), is_one_text(source), 0
    for doc in documents(source, text_column=text_column):
        counted += len(text_of(doc).encode())
        if counted > read and (plain or size is None or size > COUNTED):
            return size if plain else None
    return counted


def _trained_on(loaded: Loaded, source: str) -> str:
    """What a name adds where the text is, in part, what the run was trained on."""
    tokens, d = RunTokens.of(loaded.extra), loaded.config.data
    if tokens is None or tokens.changed(d):
        return ""
    try:
        same = any(both(part.name, source) for part in read_mixture(d.source))
    except (ValueError, OSError):
        return ""
    return ", which the run was trained on" if same else ""


def _read(tokenizer: Tokenizer, texts: Iterable[Document]) -> tuple[TextInMemory, Spelling, int]:
    """Documents as tokens in memory, compared with what these spell, and their bytes."""
    encoder, spelling, read = DocumentEncoder(tokenizer), Spelling(tokenizer), 0
    ids, targets, open_end = [], [], True
    for doc in texts:
        (encoded,) = encoder.encode([doc])
        spelling.add_document(doc, encoded.ids[1:])
        read += len(text_of(doc).encode())
        ids += encoded.ids
        targets += [*encoded.targets(open_end)]
        open_end = encoded.open_end
    return TextInMemory(np.asarray(ids, dtype=np.int64), np.asarray(targets, dtype=np.bool_)), spelling, read
