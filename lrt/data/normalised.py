"""Whether tokens spell the text they were made from: bits per byte of anything else would be of another text."""

from dataclasses import dataclass
from typing import final

from lrt.data.dialogue import Document, content_text
from lrt.data.tokenizer import Tokenizer
from lrt.utils.sequences import common_beginning

AROUND = 20
"""Characters shown around the first difference."""


@final
@dataclass
class Spelling:
    """Documents compared with what their tokens spell, added up."""

    tokenizer: Tokenizer
    documents: int = 0
    changed: int = 0
    """Documents that do not come back as they were."""
    bytes: int = 0
    spelled: int = 0
    """Bytes of the documents, and those that their tokens stand for."""
    example: tuple[str, str] = ("", "")
    """Around the first difference, the text and what comes back."""

    def add(self, doc: str, ids: list[int], *, is_document: bool = False) -> int:
        """Compare a text with its ids; returns the bytes that these stand for.

        is_document: the text is a document, not a part of one. Where the tokenizer puts a space in front of documents,
            one that begins with a space loses that.
        """
        size = len(doc.encode())
        self.documents, self.bytes = self.documents + 1, self.bytes + size
        if self.tokenizer.lossless:
            self.spelled += size
            return size
        back, front = self.tokenizer.decode_bytes(ids), b" " if self.tokenizer.space_in_front and doc else b""
        self.spelled += len(back)
        if back != front + doc.encode() and (is_document or back != doc.encode()):
            if not self.changed:
                self.example = _difference(doc, back.removeprefix(front).decode("utf-8", errors="replace"))
            self.changed += 1
        return len(back)

    def encode(self, text: str, normalised: bool) -> list[int]:
        """The ids of a text, compared with it. ValueError: they lose some of it, unless `normalised`."""
        ids = self.tokenizer.encode(text)
        self.add(text, ids)
        if not normalised:
            self.require_same()
        return ids

    def add_document(self, doc: Document, ids: list[int]) -> None:
        """Compare a document with its ids; of a dialogue what its messages say, each by itself."""
        if isinstance(doc, str):
            self.add(doc, ids, is_document=True)
            return
        for message in doc.messages:
            self.add(content_text(message), self.tokenizer.encode(content_text(message)))

    def __str__(self) -> str:
        had, back = self.example
        return (
            f"{self.changed} of {self.documents} documents do not come back from their tokens ({self.spelled:,} of "
            f"{self.bytes:,} bytes); {had!r} comes back as {back!r}"
        )

    def require_same(self) -> None:
        """ValueError saying what was lost, unless all documents come back."""
        if self.changed:
            raise ValueError(lost_text(str(self)))

    def require_some(self) -> None:
        """ValueError if the tokens spell nothing at all: bits per byte would have nothing to count."""
        if self.documents and not self.spelled:
            raise ValueError(f"the tokens spell nothing of the text: {self}; choose another tokenizer")


def lost_text(lost: str) -> str:
    """The refusal of a tokenizer of which `lost` says what it loses."""
    return (
        f"the tokenizer loses text: {lost}; choose bytes or bpe, or allow it (--data.normalised; lrt eval: "
        "--normalised), and scores say so"
    )


def _difference(had: str, back: str) -> tuple[str, str]:
    """Both around the first place where they differ."""
    same = common_beginning(had, back)
    around = slice(max(0, same - AROUND // 2), same + AROUND)
    return had[around], back[around]
