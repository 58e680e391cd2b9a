"""What passes leave behind: the differentiable `Buffer` of training and prefill (the decoder's `KVCache`: `cache.py`).

Both are values that go in and come out, and both answer two questions: which memory does a pass read, and which keys
and values (`Past`) may its queries see. The model knows neither of them, only `Past`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lrt.model.ops import split
from lrt.model.shapes import HeadsBKNE, PositionsN, StreamBND, TokensBN
from lrt.schedule import intersect, subtract


class PassOutput(NamedTuple):
    """What one pass over N positions computes."""

    hidden: StreamBND | None
    """Normalised output of the last block, the head's input; None if the pass stopped at the source block."""
    source: StreamBND
    """m_t, the memory these positions write: RMSNorm of the stream after the source block, of the embedding for 0."""
    keys: tuple[HeadsBKNE, ...]
    """Keys of every block that ran, rotated and normalised."""
    values: tuple[HeadsBKNE, ...]
    """Values of every block that ran."""


class LayerPast(Protocol):
    """One layer's share of the state, as attention sees it."""

    @property
    def positions(self) -> PositionsN:
        """Positions of the keys that `extend` returns, in its order, [M] or [B, M]."""
        ...

    def extend(self, k: HeadsBKNE, v: HeadsBKNE) -> tuple[HeadsBKNE, HeadsBKNE]:
        """Keys and values that the pass may see, its own `k`, `v` included."""
        ...

    def parts(self, k: HeadsBKNE, v: HeadsBKNE) -> tuple[Sequence[HeadsBKNE], Sequence[HeadsBKNE]]:
        """The same as segments, its own first, in the order of `Past.slices`."""
        ...


class Segments(NamedTuple):
    """Keys and values of earlier passes, to be read beside a pass's own."""

    keys: tuple[HeadsBKNE, ...]
    values: tuple[HeadsBKNE, ...]
    positions: PositionsN

    def extend(self, k: HeadsBKNE, v: HeadsBKNE) -> tuple[HeadsBKNE, HeadsBKNE]:
        """Own positions first, then the buffer's."""
        if not self.keys:
            return k, v
        return torch.cat((k, *self.keys), dim=2), torch.cat((v, *self.values), dim=2)

    def parts(self, k: HeadsBKNE, v: HeadsBKNE) -> tuple[Sequence[HeadsBKNE], Sequence[HeadsBKNE]]:
        """Own positions first, then the buffer's; nothing is copied."""
        return (k, *self.keys), (v, *self.values)

    def joined(self) -> Segments:
        """The same with at most one segment, contiguous: one shape for a compiler, however many passes there were."""
        if not self.keys:
            return self
        return Segments((torch.cat(self.keys, dim=2),), (torch.cat(self.values, dim=2),), self.positions)


class History(NamedTuple):
    """What rows have seen before a buffer begins: any number of positions, which may differ from row to row."""

    length: Tensor
    """Positions each row has seen, int64 [B]: where its position 0 of the buffer really stands."""
    memory: Tensor
    """m of each row's last position, [B, D]; zero before the first."""
    last_token: Tensor
    """Token at each row's last position, int64 [B]; negative before the first."""
    layers: Sequence[tuple[HeadsBKNE, HeadsBKNE, PositionsN]]
    """Per block: keys and values [B, K, M, E] and their positions [B, M]."""

    def take(self, rows: Tensor) -> History:
        """The given rows alone, copied."""
        layers = [(k[rows], v[rows], at[rows]) for k, v, at in self.layers]
        return History(self.length[rows], self.memory[rows], self.last_token[rows], layers)


class Past(NamedTuple):
    """Where a pass stands and what its queries may see; the model's only view of the state."""

    queries: PositionsN
    """Positions of the pass, [N] or [B, N]."""
    causal: bool
    """Whether the pass's own positions are 0..N-1 and nothing else is visible: plain causal attention."""
    layers: Sequence[LayerPast]
    """One per block."""
    slices: tuple[range, ...] = ()
    """Its own positions and those of every segment, as slices; none where rows stand at positions of their own."""


class Segment(NamedTuple):
    """The outcome of a pass over the positions `at`, or a strided view of what later passes have left of it."""

    at: range
    written: PassOutput

    def narrow(self, at: range) -> Segment:
        """The part over `at`, a sub-slice of `self.at`, as views: nothing is copied."""
        if at == self.at:
            return self
        cut, w = self._cut(at), self.written
        keys, values = (tuple(x[:, :, cut] for x in xs) for xs in (w.keys, w.values))
        return Segment(at, PassOutput(None, w.source[:, cut], keys, values))

    def _cut(self, at: range) -> slice:
        first = self.at.index(at[0])
        return slice(first, self.at.index(at[-1]) + 1, at.step // self.at.step if len(at) > 1 else 1)

    def split(self, slices: Sequence[range]) -> list[Segment]:
        """The parts over disjoint sub-slices of `self.at`, as views whose gradients are put together once."""
        if list(slices) == [self.at] or not slices:
            return [self] if slices else []
        cuts, w = tuple(self._cut(at) for at in slices), self.written
        sources = split(w.source, 1, cuts)
        keys, values = (list(zip(*(split(x, 2, cuts) for x in xs), strict=True)) for xs in (w.keys, w.values))
        parts = zip(slices, sources, keys or [()] * len(cuts), values or [()] * len(cuts), strict=True)
        return [Segment(at, PassOutput(None, source, k, v)) for at, source, k, v in parts]

    def detach(self) -> Segment:
        """The same values, cut from the gradient."""
        w = self.written
        keys, values = (tuple(x.detach() for x in xs) for xs in (w.keys, w.values))
        return Segment(self.at, PassOutput(None, w.source.detach(), keys, values))

    def take(self, rows: Tensor) -> Segment:
        """The given rows alone, copied."""
        w = self.written
        keys, values = (tuple(x[rows] for x in xs) for xs in (w.keys, w.values))
        return Segment(self.at, PassOutput(None, w.source[rows], keys, values))


@dataclass(frozen=True)
class Buffer:
    """The newest keys, values and source states of every position, as disjoint segments; differentiable, no copies."""

    segments: tuple[Segment, ...] = ()
    history: History | None = None
    """What stands before position 0; absolute positions then begin at each row's `history.length`."""

    def write(self, at: range, written: PassOutput) -> Buffer:
        """The buffer after a pass: its positions replace what stood there before."""
        return replace(self, segments=(Segment(at, written), *self.without(at).segments))

    def without(self, at: range) -> Buffer:
        """The buffer less the positions `at`."""
        return replace(self, segments=tuple(part for s in self.segments for part in s.split(subtract(s.at, at))))

    def detach(self) -> Buffer:
        """The same buffer, cut from the gradient."""
        return replace(self, segments=tuple(s.detach() for s in self.segments))

    def take(self, rows: Tensor) -> Buffer:
        """The given rows alone, copied; `rows` are indices [b]."""
        history = self.history and self.history.take(rows)
        return Buffer(tuple(s.take(rows) for s in self.segments), history)

    def memory(self, at: range) -> StreamBND | None:
        """m_{t-1} for every t of `at`, [B, N, D]; zero where none was written; None if none was written anywhere."""
        before = range(at.start - 1, at.stop - 1, at.step)
        found = [(s, intersect(s.at, before)) for s in self.segments]
        parts = [(common, s.narrow(common).written.source) for s, common in found if len(common)]
        if self.history is not None and at.start == 0:
            parts.append((range(-1, 0), self.history.memory[:, None]))
        if not parts:
            return None
        if len(parts) == 1 and len(parts[0][0]) == len(before):
            return parts[0][1]
        return _assemble(before, parts)

    def previous_tokens(self, tokens: TokensBN) -> TokensBN:
        """The token before each of `tokens` [B, T], which stand at positions 0..T-1; negative before the first."""
        last = torch.full_like(tokens[:, 0], -1) if self.history is None else self.history.last_token
        return torch.cat((last[:, None], tokens[:, :-1]), dim=1)

    def past(self, at: range, depth: int, device: torch.device) -> Past:
        """What a pass over `at` sees of the buffer: segments it does not itself rewrite, up to its last position.

        `depth` is the number of blocks the pass runs.
        """
        rest = [s for s in self.without(at).segments if s.at.start <= at[-1]]
        others = [s.written for s in rest]
        slices = (at, *(s.at for s in rest))
        queries, *places = (torch.arange(r.start, r.stop, r.step, device=device) for r in slices)
        keys = torch.cat((queries, *places))
        layers = [
            Segments(tuple(w.keys[i] for w in others), tuple(w.values[i] for w in others), keys) for i in range(depth)
        ]
        if self.history is not None:
            return _after(self.history, queries, layers)
        return Past(queries, not rest and at == range(len(at)), layers, slices)


def _after(history: History, queries: PositionsN, layers: Sequence[Segments]) -> Past:
    """The past of a pass after `history`: its keys and values join every layer, positions become absolute."""
    start, joined = history.length[:, None], []
    for own, (k, v, at) in zip(layers, history.layers[: len(layers)], strict=True):
        positions = torch.cat((own.positions + start, at), dim=1)
        joined.append(Segments((*own.keys, k), (*own.values, v), positions))
    return Past(queries + start, False, joined)


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
