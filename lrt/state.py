"""What passes leave behind: the differentiable `Buffer` of training and prefill, and the preallocated `Cache` of decoding.

Both are values that go in and come out, and both answer two questions: which memory does a pass read, and which keys
and values (`Past`) may its queries see. The model knows neither of them, only `Past`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lrt.schedule import intersect, subtract
from lrt.shapes import HeadsBKNE, PositionsN, StreamBND


class Written(NamedTuple):
    """What one pass over N positions computes."""

    hidden: StreamBND | None
    """Normalised output of the last block, the head's input; None if the pass stopped at the source block."""
    source: StreamBND
    """m_t, the memory these positions write: RMSNorm of the stream after the source block."""
    keys: tuple[HeadsBKNE, ...]
    """Keys of every block that ran, rotated and normalised."""
    values: tuple[HeadsBKNE, ...]
    """Values of every block that ran."""


class LayerPast(Protocol):
    """One layer's share of the state, as attention sees it."""

    def extend(self, k: HeadsBKNE, v: HeadsBKNE) -> tuple[HeadsBKNE, HeadsBKNE]:
        """Keys and values that the pass may see, its own `k`, `v` included."""
        ...


class Segments(NamedTuple):
    """Keys and values of earlier passes, to be read beside a pass's own."""

    keys: tuple[HeadsBKNE, ...]
    values: tuple[HeadsBKNE, ...]

    def extend(self, k: HeadsBKNE, v: HeadsBKNE) -> tuple[HeadsBKNE, HeadsBKNE]:
        """Own positions first, then the buffer's."""
        if not self.keys:
            return k, v
        return torch.cat((k, *self.keys), dim=2), torch.cat((v, *self.values), dim=2)


class Slots(NamedTuple):
    """Preallocated keys and values [B, K, C, E] with the slots [B, N] that the pass fills, in place."""

    keys: HeadsBKNE
    values: HeadsBKNE
    slots: Tensor

    def extend(self, k: HeadsBKNE, v: HeadsBKNE) -> tuple[HeadsBKNE, HeadsBKNE]:
        """All slots, after the pass's own have been filled."""
        rows = torch.arange(k.shape[0], device=k.device)[:, None]
        self.keys[rows, :, self.slots] = k.transpose(1, 2).to(self.keys.dtype)
        self.values[rows, :, self.slots] = v.transpose(1, 2).to(self.values.dtype)
        return self.keys, self.values


class Past(NamedTuple):
    """Where a pass stands and what its queries may see; the model's only view of the state."""

    queries: PositionsN
    """Positions of the pass, [N] or [B, N]."""
    keys: PositionsN
    """Positions of the keys that `LayerPast.extend` returns, in its order, [M]."""
    causal: bool
    """Whether the pass's own positions are 0..N-1 and nothing else is visible: plain causal attention."""
    layers: Sequence[LayerPast]
    """One per block."""


class Segment(NamedTuple):
    """The outcome of a pass over the positions `at`, or a strided view of what later passes have left of it."""

    at: range
    written: Written

    def narrow(self, at: range) -> Segment:
        """The part over `at`, a sub-slice of `self.at`, as views: nothing is copied."""
        if at == self.at:
            return self
        first = self.at.index(at[0])
        cut = slice(first, self.at.index(at[-1]) + 1, at.step // self.at.step if len(at) > 1 else 1)
        w = self.written
        keys, values = (tuple(x[:, :, cut] for x in xs) for xs in (w.keys, w.values))
        return Segment(at, Written(None, w.source[:, cut], keys, values))

    def detach(self) -> Segment:
        """The same values, cut from the gradient."""
        w = self.written
        keys, values = (tuple(x.detach() for x in xs) for xs in (w.keys, w.values))
        return Segment(self.at, Written(None, w.source.detach(), keys, values))


@dataclass(frozen=True)
class Buffer:
    """The newest keys, values and source states of every position, as disjoint segments; differentiable, never cloned."""

    segments: tuple[Segment, ...] = ()

    def write(self, at: range, written: Written) -> Buffer:
        """The buffer after a pass: its positions replace what stood there before."""
        kept = (s.narrow(rest) for s in self.segments for rest in subtract(s.at, at))
        return Buffer((Segment(at, written), *kept))

    def detach(self) -> Buffer:
        """The same buffer, cut from the gradient."""
        return Buffer(tuple(s.detach() for s in self.segments))

    def memory(self, at: range) -> StreamBND | None:
        """m_{t-1} for every t of `at`, [B, N, D]; zero where none was written; None if none was written anywhere."""
        before = range(at.start - 1, at.stop - 1, at.step)
        found = [(s, intersect(s.at, before)) for s in self.segments]
        parts = [(common, s.narrow(common).written.source) for s, common in found if len(common)]
        if not parts:
            return None
        if len(parts) == 1 and len(parts[0][0]) == len(before):
            return parts[0][1]
        return _assemble(before, parts)

    def past(self, at: range, depth: int, device: torch.device) -> Past:
        """What a pass over `at` sees of the buffer: segments it does not itself rewrite, up to its last position.

        `depth` is the number of blocks the pass runs.
        """
        rest = [(s, r) for s in self.segments for r in subtract(s.at, at) if r.start <= at[-1]]
        others = [s.narrow(r).written for s, r in rest]
        queries = torch.arange(at.start, at.stop, at.step, device=device)
        places = [torch.arange(r.start, r.stop, r.step, device=device) for _, r in rest]
        layers = [Segments(tuple(w.keys[i] for w in others), tuple(w.values[i] for w in others)) for i in range(depth)]
        causal = not rest and at == range(len(at))
        return Past(queries, torch.cat((queries, *places)), causal, layers)


def _assemble(places: range, parts: list[tuple[range, StreamBND]]) -> StreamBND:
    """Put parts that cover some of `places` into their order, with zeros where nothing lies."""
    example = parts[0][1]
    zero = example.new_zeros(example.shape[0], 1, example.shape[2])
    if len(parts) == 1 and parts[0][0] == places[1:]:  # the usual case: only position 0 reads nothing
        return torch.cat((zero, example), dim=1)
    order = {t: i for i, t in enumerate(t for common, _ in parts for t in common)}
    joined = torch.cat((*(states for _, states in parts), zero), dim=1)
    index = [order.get(t, len(order)) for t in places]
    return joined[:, torch.tensor(index, device=joined.device)]


class Cache(NamedTuple):
    """The decoder's state: keys and values in preallocated slots (slot = position), one memory vector per row.

    Rows may stand at different lengths. Slots beyond a row's length hold leftovers that no query of the row can see,
    because a position sees only slots up to itself, and fills its own first.
    """

    keys: tuple[Tensor, ...]
    """Per layer [B, K, C, E], where C is the capacity in tokens; filled in place."""
    values: tuple[Tensor, ...]
    """Per layer [B, K, C, E]; filled in place."""
    memory: Tensor
    """m of each row's last token, [B, D]; zero before the first."""
    length: Tensor
    """Tokens each row has seen, int64 [B]; the next token's position."""

    @property
    def capacity(self) -> int:
        """Most tokens a row can hold."""
        return self.keys[0].shape[2]

    @staticmethod
    def empty(layers: int, shape: tuple[int, int, int, int], width: int, like: Tensor) -> Cache:
        """An empty cache of `layers` layers of `shape` [B, K, C, E] and memory [B, `width`], typed and placed as `like`."""
        keys, values = (tuple(like.new_zeros(shape) for _ in range(layers)) for _ in range(2))
        length = torch.zeros(shape[0], dtype=torch.int64, device=like.device)
        return Cache(keys, values, like.new_zeros(shape[0], width), length)

    def past(self) -> Past:
        """What the next token of every row sees: a pass of one position per row."""
        queries = self.length[:, None]
        layers = [Slots(k, v, queries) for k, v in zip(self.keys, self.values, strict=True)]
        return Past(queries, torch.arange(self.capacity, device=queries.device), False, layers)

    def advance(self, source_BD: Tensor) -> Cache:
        """The cache after that pass; `source_BD` is the memory it wrote."""
        return self._replace(memory=source_BD.to(self.memory.dtype), length=self.length + 1)

    def buffer(self, length: int) -> Buffer:
        """The first `length` positions, which all rows must have, as a buffer to run passes against; nothing is copied."""
        if length == 0:
            return Buffer()
        keys, values = (tuple(x[:, :, :length] for x in xs) for xs in (self.keys, self.values))
        # Only the last position's memory is ever read again; the segment repeats it as a view.
        memory = self.memory[:, None].expand(-1, length, -1)
        return Buffer((Segment(range(length), Written(None, memory, keys, values)),))

    def commit(self, buffer: Buffer, start: int, last: Tensor) -> Cache:
        """Copy what passes wrote from position `start` on; `last` [B] is each row's last valid position."""
        memory, rows = self.memory, torch.arange(len(last), device=last.device)
        for at, w in (segment for segment in buffer.segments if segment.at.start >= start):
            cut = slice(at.start, at.stop, at.step)
            for mine, new in zip((*self.keys, *self.values), (*w.keys, *w.values), strict=True):
                mine[:, :, cut] = new.to(mine.dtype)
            place = (last - at.start).div(at.step, rounding_mode="floor")
            here = (place >= 0) & (place < len(at)) & (at.start + place * at.step == last)
            found = w.source[rows, place.clamp(0, len(at) - 1)].to(memory.dtype)
            memory = torch.where(here[:, None], found, memory)
        return self._replace(memory=memory, length=last + 1)

    def fork(self, rows: Tensor) -> Cache:
        """An independent copy whose row i is this cache's row `rows[i]`: n samples from one prompt, or a kept state."""
        pick = [tuple(x[rows].clone() for x in xs) for xs in (self.keys, self.values)]
        return Cache(pick[0], pick[1], self.memory[rows].clone(), self.length[rows].clone())
