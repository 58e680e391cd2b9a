"""Kept states: what finished answers leave behind, so that a prompt goes on from the longest beginning that is known.

A state can be continued from its marks: places where its memory is kept. They stand at multiples of 64 tokens, so that
prompts which share a header share its state, and at the ends of prompts and answers. An index from the hash of every
marked beginning to the states that hold it finds one without looking at the others. Hashes are keyed by a secret of the
process and by a scope: what one scope has kept, another never finds.
"""

from __future__ import annotations

import hashlib
import secrets
from bisect import bisect_left, insort
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from typing import NamedTuple, final

import numpy as np
import torch
from torch import Tensor

from lrt.model.kv_cache import KVCache, PerRow

MARK_EVERY = 64
OTHER_MARKS = 16
"""Most marks of a state at other places; the latest stay."""
STATE_BYTES, MARK_BYTES = 1100, 330
"""What a state and a mark take beside their numbers: objects, entries of the index (measured by a test)."""


class Layout(NamedTuple):
    """The shapes of one row of a cache."""

    heads: int
    rings: tuple[int, ...]
    """Slots of every layer."""
    head_width: int
    width: int

    @staticmethod
    def of(cache: KVCache) -> Layout:
        """That of a cache's rows."""
        _, heads, _, head_width = cache.keys[0].shape
        return Layout(heads, tuple(k.shape[2] for k in cache.keys), head_width, cache.memory.shape[1])


class StoredState(NamedTuple):
    """One row's state after `tokens`, with the places it can be continued from."""

    tokens: np.ndarray
    marks: np.ndarray
    """Those places, in order: after so many tokens."""
    numbers: Tensor
    """Keys and values of every layer [K, n, E], then the memory [D] at every mark, one after the other."""
    layout: Layout

    @property
    def size(self) -> int:
        """Bytes held."""
        arrays = self.tokens.nbytes + self.marks.nbytes + self.numbers.nbytes
        return arrays + STATE_BYTES + MARK_BYTES * len(self.marks)

    def parts(self) -> tuple[list[Tensor], Tensor]:
        """Keys and values of every layer, in turns, and the memories [marks, D]."""
        heads, rings, head_width, width = self.layout
        slots = [min(len(self.tokens), ring) for ring in rings for _ in range(2)]
        sizes = [heads * n * head_width for n in slots] + [len(self.marks) * width]
        *pairs, memories = self.numbers.split(sizes)
        return [x.view(heads, n, head_width) for x, n in zip(pairs, slots, strict=True)], memories.view(-1, width)

    def memories(self) -> dict[int, Tensor]:
        """The memory at every mark."""
        return dict(zip(self.marks.tolist(), self.parts()[1], strict=True))

    def into(self, cache: KVCache, row: int, mark: int, bos: int | None) -> KVCache:
        """`cache` with its row in this state, as it was after `mark` tokens; documents start at the token `bos`."""
        pairs, memories = self.parts()
        places = [x for layer in zip(cache.keys, cache.values, strict=True) for x in layer]
        for mine, new in zip(places, pairs, strict=True):
            mine[row, :, : new.shape[1]] = new
        now = PerRow(*(x.clone() for x in cache.per_row()))
        starts = np.flatnonzero(self.tokens[:mark] == bos).tolist() if bos is not None else []
        now.memory[row], now.length[row] = memories[bisect_left(self.marks.tolist(), mark)], mark
        now.last_token[row] = int(self.tokens[mark - 1])
        now.document_start[row] = starts[-1] if starts else 0
        return cache._replace(**now._asdict(), longest=max(cache.longest, mark))


@final
class StateStore:
    """States, the least recently used dropped first where they exceed `limit` bytes."""

    def __init__(self, limit: int) -> None:
        self.limit, self.size = limit, 0
        self._kept: OrderedDict[int, StoredState] = OrderedDict()
        """By number, the most recently used last."""
        self._holders: dict[bytes, tuple[int, ...]] = {}
        """Which states hold a marked beginning, by its hash; the newest last."""
        self._digests: dict[int, tuple[bytes, ...]] = {}
        """The hashes of each state's marks."""
        self._lengths: Counter[int] = Counter()
        self._sorted: list[int] = []
        """The places of all marks, in order."""
        self._secret, self._next = secrets.token_bytes(32), 0

    def __len__(self) -> int:
        return len(self._kept)

    def find(self, scope: bytes, tokens: Sequence[int]) -> tuple[StoredState | None, int]:
        """The state that is furthest on the way to `tokens`, and the mark to continue it from; None and 0 if none is.

        At least one token is left to take in.
        """
        prompt = np.asarray(tokens, dtype=np.int32)
        for mark, digest in reversed(list(self._beginnings(scope, prompt, len(prompt) - 1))):
            for number in reversed(self._holders.get(digest, ())):
                state = self._kept[number]
                if np.array_equal(state.tokens[:mark], prompt[:mark]):
                    self._kept.move_to_end(number)
                    return state, mark
        return None, 0

    def add(self, scope: bytes, tokens: Sequence[int], cache: KVCache, row: int, marks: dict[int, Tensor]) -> None:
        """Keep a row that has taken in `tokens`; `marks` hold the memory at places where it may be continued."""
        taken_in = np.asarray(tokens, dtype=np.int32)
        n, layout = len(taken_in), Layout.of(cache)
        wrapped = n > min(layout.rings)
        if not self.limit or not n:
            return
        for number in self._beginnings_kept(scope, taken_in):  # this one goes on from there: it replaces them
            marks = self._kept[number].memories() | marks
            self._drop(number)
        # Once a window has wrapped, earlier keys are gone, and only the end can be continued.
        places = [n] if wrapped else _places(marks, n)
        pairs = [x[row, :, : min(n, x.shape[2])] for layer in zip(cache.keys, cache.values, strict=True) for x in layer]
        numbers = torch.cat([*(x.reshape(-1) for x in pairs), *(marks[mark] for mark in places)])
        state = StoredState(taken_in, np.array(places, dtype=np.int32), numbers, layout)
        if state.size <= self.limit:
            self._keep(scope, state)
        while self.size > self.limit:
            self._drop(next(iter(self._kept)))

    def _keep(self, scope: bytes, state: StoredState) -> None:
        number, self._next = self._next, self._next + 1
        self._kept[number] = state
        self.size += state.size
        places = state.marks.tolist()
        for mark in places:
            if not self._lengths[mark]:
                insort(self._sorted, mark)
            self._lengths[mark] += 1
        marked = set(places)
        beginnings = self._beginnings(scope, state.tokens, len(state.tokens))
        self._digests[number] = tuple(digest for mark, digest in beginnings if mark in marked)
        for digest in self._digests[number]:
            self._holders[digest] = (*self._holders.get(digest, ()), number)

    def _drop(self, number: int) -> None:
        state = self._kept.pop(number)
        self.size -= state.size
        for digest in self._digests.pop(number):
            holders = tuple(other for other in self._holders[digest] if other != number)
            if holders:
                self._holders[digest] = holders
            else:
                del self._holders[digest]
        for mark in state.marks.tolist():
            self._lengths[mark] -= 1
            if not self._lengths[mark]:
                del self._lengths[mark]
                self._sorted.pop(bisect_left(self._sorted, mark))

    def _beginnings(self, scope: bytes, tokens: np.ndarray, most: int) -> Iterator[tuple[int, bytes]]:
        """The hashes of those beginnings of `tokens` that end where some state has a mark, up to `most` tokens."""
        hashed, data, begin = hashlib.blake2b(scope, key=self._secret, digest_size=16), tokens.tobytes(), 0
        for mark in self._sorted:
            if mark > most:
                return
            hashed.update(data[4 * begin : 4 * mark])
            begin = mark
            yield mark, hashed.copy().digest()

    def _beginnings_kept(self, scope: bytes, tokens: np.ndarray) -> list[int]:
        """The states whose tokens are the beginning of these."""
        return [
            number
            for mark, digest in self._beginnings(scope, tokens, len(tokens))
            for number in self._holders.get(digest, ())
            if len(self._kept[number].tokens) == mark and np.array_equal(self._kept[number].tokens, tokens[:mark])
        ]


def _places(marks: dict[int, Tensor], end: int) -> list[int]:
    """Which marks stay: all at multiples of `MARK_EVERY`, and the latest others."""
    usable = sorted(mark for mark in marks if 0 < mark <= end)
    others = [mark for mark in usable if mark % MARK_EVERY][-OTHER_MARKS:]
    return sorted({*others, *(mark for mark in usable if mark % MARK_EVERY == 0)})
