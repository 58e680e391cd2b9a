"""StoredState states: what finished answers leave behind, so that a conversation goes on where it stopped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, final

import numpy as np
from torch import Tensor

from lrt.model.kv_cache import KVCache

MOST_MARKS = 16


class StoredState(NamedTuple):
    """One row's state after `tokens`, with the places it can be continued from."""

    tokens: np.ndarray
    keys: list[Tensor]
    """Per layer the slots in use, [K, n, E]."""
    values: list[Tensor]
    marks: dict[int, Tensor]
    """Memory [D] after so many tokens: the end, and ends of earlier prompts and answers."""

    @property
    def size(self) -> int:
        """Bytes held."""
        return sum(x.nbytes for x in (*self.keys, *self.values, *self.marks.values())) + self.tokens.nbytes

    def usable(self, tokens: np.ndarray) -> int:
        """The furthest mark that `tokens` pass on their way, leaving at least one token to take in; 0 if none."""
        n = min(len(self.tokens), len(tokens) - 1)
        differs = np.flatnonzero(self.tokens[:n] != tokens[:n])
        common = int(differs[0]) if len(differs) else n
        return max((mark for mark in self.marks if mark <= common), default=0)

    def into(self, cache: KVCache, row: int, mark: int) -> KVCache:
        """`cache` with its row in this state, as it was after `mark` tokens."""
        for mine, new in zip((*cache.keys, *cache.values), (*self.keys, *self.values), strict=True):
            mine[row, :, : new.shape[1]] = new
        memory, length, last = (x.clone() for x in cache.per_row())
        memory[row], length[row], last[row] = self.marks[mark], mark, int(self.tokens[mark - 1])
        return KVCache(cache.keys, cache.values, memory, length, last, max(cache.longest, mark))


@final
class StateStore:
    """StoredState states, the least recently used dropped first where they exceed `limit` bytes."""

    def __init__(self, limit: int) -> None:
        self.limit, self.size = limit, 0
        self._kept: list[StoredState] = []
        """The most recently used last."""

    def __len__(self) -> int:
        return len(self._kept)

    def find(self, tokens: Sequence[int]) -> tuple[StoredState | None, int]:
        """The state that is furthest on the way to `tokens`, and the mark to continue it from."""
        wanted = np.asarray(tokens, dtype=np.int64)
        best = max(self._kept, key=lambda kept: kept.usable(wanted), default=None)
        mark = best.usable(wanted) if best else 0
        if best is None or not mark:
            return None, 0
        self._touch(best)
        return best, mark

    def add(self, tokens: Sequence[int], cache: KVCache, row: int, marks: dict[int, Tensor]) -> None:
        """Keep a row that has taken in `tokens`; `marks` hold the memory at places where it may be continued."""
        known = np.asarray(tokens, dtype=np.int64)
        n, rings = len(known), [k.shape[2] for k in cache.keys]
        if not self.limit:
            return
        if n > min(rings):  # a window has wrapped: earlier keys are gone, and only the end can be continued
            marks = {n: marks[n]}
        for old in [k for k in self._kept if len(k.tokens) <= n and (k.tokens == known[: len(k.tokens)]).all()]:
            marks = marks if n > min(rings) else old.marks | marks  # this one goes on from there: it replaces it
            self._drop(old)
        last = sorted(marks)[-MOST_MARKS:]
        keys, values = ([x[row, :, : min(n, x.shape[2])].clone() for x in xs] for xs in (cache.keys, cache.values))
        kept = StoredState(known, keys, values, {mark: marks[mark] for mark in last})
        if kept.size > self.limit:
            return
        self._kept.append(kept)
        self.size += kept.size
        while self.size > self.limit:
            self._drop(self._kept[0])

    def _drop(self, kept: StoredState) -> None:
        self._kept = [k for k in self._kept if k is not kept]
        self.size -= kept.size

    def _touch(self, kept: StoredState) -> None:
        self._kept = [*(k for k in self._kept if k is not kept), kept]
