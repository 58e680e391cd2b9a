"""Drafts by prompt lookup: what followed the last tokens when they stood before, as a guess at what follows now.

There is no second model. A guess costs nothing to make and decides nothing: the model says
of every token whether it is the one that it draws (`lrt.inference.lookahead`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

LOOKED_UP = (4, 3)
"""Lengths of the endings that are looked up, the longest first."""
FIRST = 2
"""Tokens of the first draft: one that fails costs little, and one that is right lets the next be longer."""
MOST_WAIT = 64
"""Most tokens for which nothing is drafted after drafts that failed."""


@final
class PromptLookup:
    """The tokens of one row, and where each short run of them has stood last."""

    def __init__(self, tokens: Sequence[int], most: int):
        """`most`: tokens of the longest draft."""
        self.tokens: list[int] = []
        self.most, self._length, self._wait, self._failed = most, min(most, FIRST), 0, 0
        self._next: dict[tuple[int, ...], int] = {}
        """Where the token stands that followed a run last."""
        for token in tokens:
            self.take(token)

    def take(self, token: int) -> None:
        """The row's next token."""
        for n in LOOKED_UP:
            if len(self.tokens) >= n:
                self._next[tuple(self.tokens[-n:])] = len(self.tokens)
        self.tokens.append(token)
        self._wait = max(0, self._wait - 1)

    def draft(self, room: int) -> list[int]:
        """A guess at the next tokens, at most `room`; nothing where the last tokens are new, or guesses have failed."""
        count = min(self._length, room)
        if self._wait or count < 1:
            return []
        start = next((self._next[run] for n in LOOKED_UP if (run := tuple(self.tokens[-n:])) in self._next), None)
        if start is None:
            return []
        guess = self.tokens[start : start + count]
        while len(guess) < count:  # the run overlaps its own end: the text repeats itself
            guess += guess[: count - len(guess)]
        return guess

    def judge(self, right: int) -> None:
        """A draft was right for so many tokens: the next is as long as that promises, none after several failures."""
        self._failed = 0 if right else self._failed + 1
        self._length = min(self.most, 2 * right + FIRST)
        self._wait = min(2**self._failed, MOST_WAIT) if self._failed else 0
