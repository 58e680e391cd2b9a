"""The text that a run is scored on: what its training held out, or another."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from lrt.data import documents, prepare
from lrt.evaluation.bits_per_byte import Rows, validation_rows
from lrt.training.checkpoint import Loaded


class TextInMemory(NamedTuple):
    """Tokens in memory, as a loader reads them."""

    ids: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.ids[start:stop]


def held_out_rows(loaded: Loaded, source: str | None, *, rows: int, length: int) -> Rows:
    """Rows of the run's validation split, or of another text source read as `lrt train` would."""
    d, tokenizer = loaded.config.data, loaded.tokenizer
    if source is None:
        prepared = prepare(
            source=d.source, text_column=d.text_column, subset=d.subset, split=d.split, tokenizer=d.tokenizer,
            vocab_size=d.vocab_size, validation=d.validation, max_bytes=d.max_bytes, folder=Path(d.folder),
        )  # fmt: skip
        if prepared.tokenizer.hash != tokenizer.hash:
            raise ValueError(
                f"{prepared.folder} has another tokenizer than {loaded.run}; its text has changed: give --source"
            )
        stream = prepared.val
    else:
        enough = rows * length * 16  # bytes; tokens are shorter on average
        texts = documents(source, text_column=d.text_column, max_bytes=enough)
        ids = [i for text in texts for i in (tokenizer.bos, *tokenizer.encode(text))]
        stream = TextInMemory(np.asarray(ids, dtype=np.int64))
    return validation_rows(stream, tokenizer.token_bytes(), rows=rows, length=length, bos=tokenizer.bos)
