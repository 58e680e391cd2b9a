"""What passes leave behind: the differentiable `Buffer` of training and prefill (the decoder's state: `kv_cache.py`).

Both are values that go in and come out. `open` says what a pass reads: where it stands, the memory, the previous
tokens, the keys and values of other positions (`PassInput`). `write` takes in what it has computed (`PassOutput`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lrt.model.ops import split
from lrt.model.shapes import HeadsBKNE, PositionsN, StreamBND, TokensBN
from lrt.passes import intersect, subtract


class LayerKV(Protocol):
    """One layer's keys and values of other positions, as attention sees them."""

    @property
    def positions(self) -> PositionsN:
        """Positions of the keys that `extend` returns, in its order, [M] or [B, M]."""
        ...

    def extend(self, k: HeadsBKNE, v: HeadsBKNE) -> tuple[HeadsBKNE, HeadsBKNE]:
        """Keys and values that the pass may see, its own `k`, `v` included."""
        ...


class PassInput(NamedTuple):
    """Where a pass stands and what it reads: all that the model knows of a state."""

    positions: PositionsN
    """Positions of the pass, rising; [N], or [B, N] where rows differ."""
    kv: Sequence[LayerKV] | None = None
    """Keys and values of other positions, an entry a block. None: the pass sees itself alone."""
    memory: StreamBND | None = None
    """m_{t-1} of the source block for each position, [B, N, D]; None is zero memory."""
    previous: TokensBN | None = None
    """Tokens at t-1, [B, N], negative where there is none: what a token shift reads."""
    document_start: PositionsN | None = None
    """Where the newest document that the state knows of before t starts, [B, N] or [B, 1]; None: it knows of none."""
    below: BelowMemory | None = None
    """What the first blocks have computed at these positions; they do not run again."""


class BelowMemory(NamedTuple):
    """What the blocks that no memory reaches (`ModelConfig.blocks_below`) compute: the same in every pass."""

    stream: StreamBND
    """The residual stream after the last of them."""
    keys: tuple[HeadsBKNE, ...]
    values: tuple[HeadsBKNE, ...]


class PassOutput(NamedTuple):
    """What one pass over N positions computes."""

    tokens: TokensBN
    """The tokens it took in, [B, N]."""
    hidden: StreamBND | None
    """Normalised output of the last block, the head's input; None if the pass stopped at the source block."""
    memory: StreamBND
    """m_t, the memory these positions write: RMSNorm of the stream after the source block, of the embedding for 0."""
    keys: tuple[HeadsBKNE, ...]
    """Keys of every block that ran, rotated and normalised."""
    values: tuple[HeadsBKNE, ...]
    """Values of every block that ran."""
    starts: Tensor | None = None
    """Where documents start, boolean [B, N]; None where none does, or where attention crosses documents."""
    below: StreamBND | None = None
    """The stream that leaves the blocks that no memory reaches, without gradient; None where there are none."""

    def map(self, along: Callable[[Tensor, int], Tensor]) -> PassOutput:
        """The same without `hidden`, each tensor changed by `along(tensor, axis of its positions)`."""
        keys, values = (tuple(along(x, 2) for x in xs) for xs in (self.keys, self.values))
        starts, below = (None if x is None else along(x, 1) for x in (self.starts, self.below))
        return PassOutput(along(self.tokens, 1), None, along(self.memory, 1), keys, values, starts, below)


class State(Protocol):
    """What passes leave behind, and the next ones read."""

    def open(self, positions: range | None, tokens: TokensBN, blocks: range) -> tuple[PassInput, State]:
        """What a pass that runs `blocks` reads, and the state less what it will replace."""
        ...

    def write(self, positions: range | None, written: PassOutput) -> State:
        """The state after the pass."""
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

    def joined(self) -> Segments:
        """The same with at most one segment, contiguous: one shape for a compiler, however many passes there were."""
        if not self.keys:
            return self
        return Segments((torch.cat(self.keys, dim=2),), (torch.cat(self.values, dim=2),), self.positions)


class CachedPrefix(NamedTuple):
    """What a cache holds of the positions before a buffer: any number of them, which may differ from row to row."""

    length: Tensor
    """Positions each row has seen, int64 [B]: where its position 0 of the buffer really stands."""
    memory: Tensor
    """m of each row's last position, [B, D]; zero before the first."""
    last_token: Tensor
    """Token at each row's last position, int64 [B]; negative before the first."""
    document_start: Tensor
    """Position at which each row's last document starts, int64 [B]."""
    layers: Sequence[tuple[HeadsBKNE, HeadsBKNE, PositionsN]]
    """Per block: keys and values [B, K, M, E] and their positions [B, M]."""

    def take(self, rows: Tensor) -> CachedPrefix:
        """The given rows alone, copied."""
        layers = [(k[rows], v[rows], at[rows]) for k, v, at in self.layers]
        return CachedPrefix(
            self.length[rows], self.memory[rows], self.last_token[rows], self.document_start[rows], layers
        )


class Segment(NamedTuple):
    """The outcome of a pass over the positions `at`, or a strided view of what later passes have left of it."""

    at: range
    written: PassOutput

    def split(self, slices: Sequence[range]) -> list[Segment]:
        """The parts over disjoint sub-slices of `self.at`, as views whose gradients are put together once."""
        if list(slices) == [self.at] or not slices:
            return [self] if slices else []
        cuts, w = tuple(_cut(self.at, at) for at in slices), self.written
        memories = split(w.memory, 1, cuts)
        keys, values = (list(zip(*(split(x, 2, cuts) for x in xs), strict=True)) for xs in (w.keys, w.values))
        parts = zip(slices, cuts, memories, keys or [()] * len(cuts), values or [()] * len(cuts), strict=True)
        marked = [[None if x is None else x[:, cut] for x in (w.starts, w.below)] for cut in cuts]
        return [
            Segment(at, PassOutput(w.tokens[:, cut], None, m, k, v, starts, below))
            for (at, cut, m, k, v), (starts, below) in zip(parts, marked, strict=True)
        ]


@dataclass(frozen=True)
class Buffer:
    """The newest keys, values and memories of every position, as disjoint segments; differentiable, no copies."""

    segments: tuple[Segment, ...] = ()
    prefix: CachedPrefix | None = None
    """What stands before position 0; absolute positions then begin at each row's `prefix.length`."""

    def open(
        self, positions: range | None, tokens: TokensBN, blocks: range, detach: bool = False
    ) -> tuple[PassInput, Buffer]:
        """What a pass over `positions` (by default 0..N-1) reads, and the buffer less what it will rewrite.

        Args:
            positions: the slice; its tokens are `tokens` [B, N].
            blocks: those that the pass runs; what the ones before them computed is read (`knows` the positions then).
            detach: whether what it reads is cut from the gradient.
        """
        at = range(tokens.shape[1]) if positions is None else positions
        rest = self.without(at)  # cut once: the pass sees it, and it stays
        before, seen = (b.detach() if detach else b for b in (self, rest))
        read = seen._input(at, tokens, blocks.stop, before.memory(at))
        return read._replace(below=self._below(at, blocks.start)), rest

    def knows(self, at: range) -> bool:
        """Whether what no memory reaches has been computed at all positions of `at`."""
        known = (s.at for s in self.segments if s.written.below is not None)
        return sum(len(intersect(positions, at)) for positions in known) == len(at)

    def _below(self, at: range, blocks: int) -> BelowMemory | None:
        """What the first `blocks` blocks have computed at positions that the buffer knows, without gradient."""
        if blocks == 0:
            return None
        places, written = [s.at for s in self.segments], [s.written for s in self.segments]

        def joined(parts: Iterable[Tensor | None]) -> Tensor:
            there = [(positions, x) for positions, x in zip(places, parts, strict=True) if x is not None]
            newest = _newest(at, there, 0)
            assert newest is not None, "the buffer does not know these positions"
            return newest.detach()

        kinds = ([w.keys for w in written], [w.values for w in written])
        keys, values = (
            tuple(joined(xs[i].transpose(1, 2) for xs in kind).transpose(1, 2) for i in range(blocks)) for kind in kinds
        )
        return BelowMemory(joined(w.below for w in written), keys, values)

    def write(self, positions: range | None, written: PassOutput) -> Buffer:
        """The buffer after a pass: its positions replace what stood there before."""
        at = range(written.tokens.shape[1]) if positions is None else positions
        return replace(self, segments=(Segment(at, written), *self.without(at).segments))

    def without(self, at: range) -> Buffer:
        """The buffer less the positions `at`."""
        return replace(self, segments=tuple(part for s in self.segments for part in s.split(subtract(s.at, at))))

    def detach(self) -> Buffer:
        """The same buffer, cut from the gradient."""
        return replace(self, segments=tuple(Segment(s.at, s.written.map(_detached)) for s in self.segments))

    def take(self, rows: Tensor) -> Buffer:
        """The given rows alone, copied; `rows` are indices [b]."""
        segments = (Segment(s.at, s.written.map(lambda x, _: x[rows])) for s in self.segments)
        return Buffer(tuple(segments), self.prefix and self.prefix.take(rows))

    def position(self, t: int) -> Buffer:
        """What position t alone holds, as if it were the first."""
        segment = next(s for s in self.segments if t in s.at)
        alone = segment.written.map(lambda x, axis: x.narrow(axis, segment.at.index(t), 1))
        return replace(self, segments=(Segment(range(1), alone),))

    def memory(self, at: range) -> StreamBND | None:
        """m_{t-1} for every t of `at`, [B, N, D]; zero where none was written; None if none was written anywhere."""
        parts = [(s.at, s.written.memory) for s in self.segments]
        if self.prefix is not None:
            parts.append((range(-1, 0), self.prefix.memory[:, None]))
        return _newest(_before(at), parts, 0)

    def previous_tokens(self, at: range, tokens: TokensBN) -> TokensBN:
        """The token at t-1 for every t of `at`, whose own are `tokens`; [B, N], negative where there is none.

        The buffer holds nothing at `at`: `open` has taken it out.
        """
        parts = [(at, tokens), *((s.at, s.written.tokens) for s in self.segments)]
        if self.prefix is not None:
            parts.append((range(-1, 0), self.prefix.last_token[:, None]))
        newest = _newest(_before(at), parts, -1)
        return torch.full_like(tokens, -1) if newest is None else newest

    def document_start(self, at: range) -> PositionsN | None:
        """Where the newest document before each t of `at` starts, absolute, [B, N] or [B, 1]; None: none is known.

        The buffer holds nothing at `at`: `open` has taken it out.
        """
        marked = [(s.at, s.written.starts) for s in self.segments if s.written.starts is not None]
        before = None if self.prefix is None else self.prefix.document_start[:, None]
        if not marked:
            return before
        known = torch.zeros(len(marked[0][1]), at[-1] + 1, dtype=torch.bool, device=marked[0][1].device)
        for positions, starts in marked:
            seen = intersect(positions, range(at[-1] + 1))
            if len(seen):
                known[:, seen.start : seen.stop : seen.step] = starts[:, : len(seen)]
        places = torch.arange(at[-1] + 1, device=known.device)
        places = places if self.prefix is None else places + self.prefix.length[:, None]
        newest = torch.where(known, places, 0).cummax(dim=1).values[:, at.start : at.stop : at.step]
        return newest if before is None else torch.maximum(newest, before)

    def _input(self, at: range, tokens: TokensBN, blocks: int, memory: StreamBND | None) -> PassInput:
        """What a pass reads of segments that it does not itself rewrite, up to its last position."""
        rest = [s for s in self.segments if s.at.start <= at[-1]]
        own, *places = (
            torch.arange(r.start, r.stop, r.step, device=tokens.device) for r in (at, *(s.at for s in rest))
        )
        previous = self.previous_tokens(at, tokens)
        if not rest and self.prefix is None:
            return PassInput(own, None, memory, previous)
        start = self.document_start(at)
        keys, others = torch.cat((own, *places)), [s.written for s in rest]
        layers = [
            Segments(tuple(w.keys[i] for w in others), tuple(w.values[i] for w in others), keys) for i in range(blocks)
        ]
        if self.prefix is not None:
            own, layers = own + self.prefix.length[:, None], _after(self.prefix, layers)
        return PassInput(own, layers, memory, previous, start)


def _after(prefix: CachedPrefix, layers: Sequence[Segments]) -> list[Segments]:
    """Layers whose positions are absolute, with the prefix's keys and values."""
    start, joined = prefix.length[:, None], []
    for own, (k, v, at) in zip(layers, prefix.layers[: len(layers)], strict=True):
        joined.append(Segments((*own.keys, k), (*own.values, v), torch.cat((own.positions + start, at), dim=1)))
    return joined


def _detached(x: Tensor, axis: int) -> Tensor:
    return x.detach()


def _before(at: range) -> range:
    return range(at.start - 1, at.stop - 1, at.step)


def _cut(held: range, at: range) -> slice:
    """Where `at`, a sub-slice of `held`, lies in it."""
    return slice(held.index(at[0]), held.index(at[-1]) + 1, at.step // held.step if len(at) > 1 else 1)


def _newest(places: range, parts: Sequence[tuple[range, Tensor]], empty: int) -> Tensor | None:
    """Values [B, N, ..] at `places` out of parts [B, n, ..] that lie at disjoint slices; `empty` where nothing does.

    None if nothing lies anywhere.
    """
    shared = [(intersect(at, places), at, x) for at, x in parts]
    covered = [(common, x if common == at else x[:, _cut(at, common)]) for common, at, x in shared if len(common)]
    if not covered:
        return None
    if len(covered) == 1 and len(covered[0][0]) == len(places):
        return covered[0][1]
    example = covered[0][1]
    if len(covered) == 1 and covered[0][0] == places[1:]:  # the usual case: only position 0 reads nothing
        nothing = example.new_full((example.shape[0], 1, *example.shape[2:]), empty)
        return torch.cat((nothing, example), dim=1)
    newest = example.new_full((example.shape[0], len(places), *example.shape[2:]), empty)
    for common, x in covered:
        newest[:, _cut(places, common)] = x
    return newest
