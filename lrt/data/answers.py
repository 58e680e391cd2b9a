"""Documents as tokens, and which of them are learned: all of a text; of a dialogue its answers, and what ends them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import NamedTuple, final

import numpy as np

from lrt.config.decoding import CALLED, NEXT
from lrt.data.chat_template import ChatTemplate, chat_template_of
from lrt.data.dialogue import Dialogue, Document, in_turns, plain_pieces
from lrt.data.tokenizer import Tokenizer
from lrt.utils.sequences import common_beginning

NEAR_END = 4
"""Tokens of an answer among which the one that ends it is looked for: some templates write a line break after it."""


class Encoded(NamedTuple):
    """The tokens of a document, BOS in front."""

    ids: list[int]
    learned: np.ndarray | None
    """Which of them are targets, bool; None: all."""
    open_end: bool
    """Whether the BOS that follows is a target too, since nothing else ends the document."""

    def targets(self, begun: bool) -> np.ndarray:
        """Which ids are targets, bool; `begun`: whether its own BOS is one, by the document before."""
        learned = np.ones(len(self.ids), np.bool_) if self.learned is None else self.learned.copy()
        learned[0] = begun
        return learned


@final
class DocumentEncoder:
    """A tokenizer for texts and dialogues; dialogues are written by its chat template, or plainly where it has none."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    @cached_property
    def _template(self) -> ChatTemplate | None:
        return chat_template_of(self.tokenizer)

    def encode(self, documents: Sequence[Document]) -> list[Encoded]:
        """Documents as tokens. ValueError: a dialogue that the chat template refuses, or without an answer."""
        texts = iter(self.tokenizer.encode_batch([d for d in documents if isinstance(d, str)]))
        bos = self.tokenizer.bos
        return [
            Encoded([bos, *next(texts)], None, True) if isinstance(d, str) else self._dialogue(d) for d in documents
        ]

    def _dialogue(self, dialogue: Dialogue) -> Encoded:
        try:
            ids, learned = self._plain(dialogue) if self._template is None else self._written(self._template, dialogue)
        except ValueError as error:
            raise ValueError(f"{dialogue.place}: {error}") from None
        if ids[:1] != [self.tokenizer.bos]:
            ids, learned = [self.tokenizer.bos, *ids], [False, *learned]
        last = [token for token, one in zip(ids, learned, strict=True) if one][-NEAR_END:]
        ended = self._template is None or any(token in self.tokenizer.ends for token in last)
        return Encoded(ids, np.array(learned), not ended)

    def _plain(self, dialogue: Dialogue) -> tuple[list[int], list[bool]]:
        """As `lrt chat` and the server write it: an answer, and the beginning of the next turn that ends it."""
        dialogue = replace(dialogue, messages=in_turns(dialogue.messages))
        ids, learned, due = [self.tokenizer.bos], [False], False
        end, called = self.tokenizer.encode(NEXT), self.tokenizer.encode(CALLED)
        skipped = 1 if dialogue.tools else 0
        for i, piece in enumerate([*plain_pieces(dialogue.messages, dialogue.tools), NEXT], -skipped):
            tokens = end if i == len(dialogue.messages) else self.tokenizer.encode(piece)
            answer = i in dialogue.learned
            if piece == NEXT and not due:
                break
            marks = [ids for mark, ids in ((NEXT, end), (CALLED, called)) if due and piece.startswith(mark)]
            same = max((common_beginning(tokens, mark) for mark in marks), default=0)
            ids += tokens
            learned += [answer or k < same for k in range(len(tokens))]
            due = answer
        return ids, learned

    def _written(self, template: ChatTemplate, dialogue: Dialogue) -> tuple[list[int], list[bool]]:
        """As the chat template writes it: what follows the prompt for an answer, up to the end of that turn."""
        text, template_runs = template.render(dialogue.messages, dialogue.tools, add_generation_prompt=False)
        spans = [span for i in dialogue.learned if (span := _answer(template, dialogue, i, text)) is not None]
        if not spans:
            raise ValueError(
                "the chat template writes no answer right behind its prompt for one, so that none can be learned: "
                "use another template"
            )
        placed = template.tokens(text, template_runs, [cut for span in spans for cut in span])
        learned = [any(start <= offset < stop for start, stop in spans) for _, offset in placed]
        if not any(learned):
            raise ValueError("the answers have no tokens of their own: give them some text")
        return [token for token, _ in placed], learned


def _answer(template: ChatTemplate, dialogue: Dialogue, i: int, text: str) -> tuple[int, int] | None:
    """Where the answer that is message `i` stands in the whole text, its end included.

    None where the template writes it otherwise in a whole dialogue than when it was asked for.
    """
    before, _ = template.render(dialogue.messages[:i], dialogue.tools)
    until, _ = template.render(dialogue.messages[: i + 1], dialogue.tools, add_generation_prompt=False)
    fits = text.startswith(before) and text.startswith(until) and len(before) < len(until)
    return (len(before), len(until)) if fits else None
