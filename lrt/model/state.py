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
from lrt.passes import columns, intersect, subtract


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
        layers = [(k[rows], v[rows], positions[rows]) for k, v, positions in self.layers]
        return CachedPrefix(
            self.length[rows], self.memory[rows], self.last_token[rows], self.document_start[rows], layers
        )


class Segment(NamedTuple):
    """The outcome of a pass over the `positions`, or a strided view of what later passes have left of it."""

    positions: range
    written: PassOutput

    def split(self, slices: Sequence[range]) -> list[Segment]:
        """The parts over disjoint sub-slices of `self.positions`, as views whose gradients are put together once."""
        if list(slices) == [self.positions] or not slices:
            return [self] if slices else []
        places, w = tuple(_slice_of(self.positions, part) for part in slices), self.written
        memories = split(w.memory, 1, places)
        keys, values = (list(zip(*(split(x, 2, places) for x in xs), strict=True)) for xs in (w.keys, w.values))
        parts = zip(slices, places, memories, keys or [()] * len(places), values or [()] * len(places), strict=True)
        marked = [[None if x is None else x[:, place] for x in (w.starts, w.below)] for place in places]
        return [
            Segment(part, PassOutput(w.tokens[:, place], None, m, k, v, starts, below))
            for (part, place, m, k, v), (starts, below) in zip(parts, marked, strict=True)
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
        positions = range(tokens.shape[1]) if positions is None else positions
        others = self.without(positions)  # cut once: the pass sees it, and it stays
        before, seen = (b.detach() if detach else b for b in (self, others))
        read = seen._input(positions, tokens, blocks.stop, before.memory(positions))
        return read._replace(below=self._below(positions, blocks.start)), others

    def knows(self, positions: range) -> bool:
        """Whether the blocks that no memory reaches (`ModelConfig.blocks_below`) have run at all `positions`."""
        computed = (s.positions for s in self.segments if s.written.below is not None)
        return sum(len(intersect(part, positions)) for part in computed) == len(positions)

    def _below(self, positions: range, blocks: int) -> BelowMemory | None:
        """What the first `blocks` blocks have computed at positions that the buffer knows, without gradient."""
        if blocks == 0:
            return None
        places, written = [s.positions for s in self.segments], [s.written for s in self.segments]

        def joined(parts: Iterable[Tensor | None]) -> Tensor:
            present = [(part, x) for part, x in zip(places, parts, strict=True) if x is not None]
            newest = _newest(positions, present, 0)
            assert newest is not None, "the buffer does not know these positions"
            return newest.detach()

        kinds = ([w.keys for w in written], [w.values for w in written])
        keys, values = (
            tuple(joined(xs[i].transpose(1, 2) for xs in kind).transpose(1, 2) for i in range(blocks)) for kind in kinds
        )
        return BelowMemory(joined(w.below for w in written), keys, values)

    def write(self, positions: range | None, written: PassOutput) -> Buffer:
        """The buffer after a pass: its positions replace what stood there before."""
        positions = range(written.tokens.shape[1]) if positions is None else positions
        return replace(self, segments=(Segment(positions, written), *self.without(positions).segments))

    def holding(self, tokens: TokensBN, memory: StreamBND) -> Buffer:
        """The buffer with memory alone at 0..N-1, for a pass that writes keys and values there itself."""
        return self.write(None, PassOutput(tokens, None, memory, (), ()))

    def without(self, positions: range) -> Buffer:
        """The buffer less the `positions`."""
        return replace(
            self, segments=tuple(part for s in self.segments for part in s.split(subtract(s.positions, positions)))
        )

    def detach(self) -> Buffer:
        """The same buffer, cut from the gradient."""
        return replace(self, segments=tuple(Segment(s.positions, s.written.map(_detached)) for s in self.segments))

    def take(self, rows: Tensor) -> Buffer:
        """The given rows alone, copied; `rows` are indices [b]."""
        segments = (Segment(s.positions, s.written.map(lambda x, _: x[rows])) for s in self.segments)
        return Buffer(tuple(segments), self.prefix and self.prefix.take(rows))

    def position(self, t: int) -> Buffer:
        """What position t alone holds, as if it were the first."""
        segment = next(s for s in self.segments if t in s.positions)
        alone = segment.written.map(lambda x, axis: x.narrow(axis, segment.positions.index(t), 1))
        return replace(self, segments=(Segment(range(1), alone),))

    def memory(self, positions: range) -> StreamBND | None:
        """m_{t-1} for every t of `positions`, [B, N, D]; zero where none was written; None if there is none at all."""
        parts = [(s.positions, s.written.memory) for s in self.segments]
        if self.prefix is not None:
            parts.append((range(-1, 0), self.prefix.memory[:, None]))
        return _newest(_before(positions), parts, 0)

    def previous_tokens(self, positions: range, tokens: TokensBN) -> TokensBN:
        """The token at t-1 for every t of `positions`, whose own are `tokens`; [B, N], negative where there is none.

        The buffer holds nothing at `positions`: `open` has taken it out.
        """
        parts = [(positions, tokens), *((s.positions, s.written.tokens) for s in self.segments)]
        if self.prefix is not None:
            parts.append((range(-1, 0), self.prefix.last_token[:, None]))
        newest = _newest(_before(positions), parts, -1)
        return torch.full_like(tokens, -1) if newest is None else newest

    def document_start(self, positions: range) -> PositionsN | None:
        """Where the newest document before each t of `positions` starts, absolute, [B, N] or [B, 1]; None: unknown.

        The buffer holds nothing at `positions`: `open` has taken it out.
        """
        marked = [(s.positions, s.written.starts) for s in self.segments if s.written.starts is not None]
        before = None if self.prefix is None else self.prefix.document_start[:, None]
        if not marked:
            return before
        starts_by_position = torch.zeros(
            len(marked[0][1]), positions[-1] + 1, dtype=torch.bool, device=marked[0][1].device
        )
        for part, starts in marked:
            seen = intersect(part, range(positions[-1] + 1))
            if len(seen):
                starts_by_position[:, columns(seen)] = starts[:, : len(seen)]
        places = torch.arange(positions[-1] + 1, device=starts_by_position.device)
        places = places if self.prefix is None else places + self.prefix.length[:, None]
        newest = torch.where(starts_by_position, places, 0).cummax(dim=1).values[:, columns(positions)]
        return newest if before is None else torch.maximum(newest, before)

    def _input(self, positions: range, tokens: TokensBN, blocks: int, memory: StreamBND | None) -> PassInput:
        """What a pass reads of segments that it does not itself rewrite, up to its last position."""
        others = [s for s in self.segments if s.positions.start <= positions[-1]]
        own, *places = (
            torch.arange(r.start, r.stop, r.step, device=tokens.device)
            for r in (positions, *(s.positions for s in others))
        )
        previous = self.previous_tokens(positions, tokens)
        if not others and self.prefix is None:
            return PassInput(own, None, memory, previous)
        start = self.document_start(positions)
        keys, written = torch.cat((own, *places)), [s.written for s in others]
        layers = [
            Segments(tuple(w.keys[i] for w in written), tuple(w.values[i] for w in written), keys)
            for i in range(blocks)
        ]
        if self.prefix is not None:
            own, layers = own + self.prefix.length[:, None], _after(self.prefix, layers)
        return PassInput(own, layers, memory, previous, start)


def _after(prefix: CachedPrefix, layers: Sequence[Segments]) -> list[Segments]:
    """Layers whose positions are absolute, with the prefix's keys and values."""
    start, joined = prefix.length[:, None], []
    for own, (k, v, positions) in zip(layers, prefix.layers[: len(layers)], strict=True):
        joined.append(Segments((*own.keys, k), (*own.values, v), torch.cat((own.positions + start, positions), dim=1)))
    return joined


def _detached(x: Tensor, axis: int) -> Tensor:
    return x.detach()


def _before(positions: range) -> range:
    return range(positions.start - 1, positions.stop - 1, positions.step)


def _slice_of(positions: range, part: range) -> slice:
    """Where `part`, a sub-slice of `positions`, lies in it."""
    return slice(
        positions.index(part[0]), positions.index(part[-1]) + 1, part.step // positions.step if len(part) > 1 else 1
    )


def _newest(places: range, parts: Sequence[tuple[range, Tensor]], empty: int) -> Tensor | None:
    """Values [B, N, ..] at `places` out of parts [B, n, ..] that lie at disjoint slices; `empty` where nothing does.

    None if nothing lies anywhere.
    """
    shared = [(intersect(positions, places), positions, x) for positions, x in parts]
    covered = [
        (common, x if common == positions else x[:, _slice_of(positions, common)])
        for common, positions, x in shared
        if len(common)
    ]
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
        newest[:, _slice_of(places, common)] = x
    return newest
