"""The decoder's state: preallocated keys and values, memory and last token of each row; it goes in and comes out.

Rows stand at lengths of their own, so they can join (`put`), leave, wait (`step(active=..)`) and be forked (`take`)
between steps. The tensors of keys and values are filled in place; everything else is replaced.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from lrt.model.shapes import HeadsBKNE, PositionsN, TokensBN
from lrt.model.state import Buffer, CachedPrefix, PassInput, PassOutput
from lrt.model.transformer import Transformer
from lrt.utils.files import parse_json
from lrt.utils.tensor_files import read_tensors, tensors_hash, write_tensors

X = TypeVar("X")
FORMAT, BEFORE = "lrt-cache-2", "lrt-cache-1"
"""The format before this one had no hash of what it holds."""
DIGEST = "sha256"
FUTURE = 2**40
"""A position later than any."""
MOST_SLOTS = 2**24
"""Slots of a stored state."""
SMALLEST_VIEW = 128
"""Slots of the smallest view: below it, looking at fewer slots saves nothing."""


class Slots(NamedTuple):
    """One layer's slots [B, K, M, E] and where in them a pass of one position per row puts its own key and value."""

    keys: HeadsBKNE
    values: HeadsBKNE
    rows: Tensor
    """[B, 1]"""
    slot: Tensor
    """Slot that each row fills, [B, 1]."""
    positions: PositionsN
    """Positions that the slots hold once that is done, [B, M]."""

    def extend(self, k: HeadsBKNE, v: HeadsBKNE) -> tuple[HeadsBKNE, HeadsBKNE]:
        """All slots, after the pass's own have been filled in place."""
        self.keys[self.rows, :, self.slot] = k.transpose(1, 2).to(self.keys.dtype)
        self.values[self.rows, :, self.slot] = v.transpose(1, 2).to(self.values.dtype)
        return self.keys, self.values


class PerRow(NamedTuple):
    """What a row holds beside keys and values: the fields of `KVCache`, which says what they are."""

    memory: Tensor
    length: Tensor
    last_token: Tensor
    document_start: Tensor


EMPTY = (0, 0, -1, 0)
"""The numbers of `PerRow` in an empty row."""


class KVCache(NamedTuple):
    """The state of B rows. Position t lies in slot t, or in slot t mod R of the R slots of a sliding-window layer."""

    keys: tuple[Tensor, ...]
    """Per layer [B, K, R, E], filled in place; R is the window, or capacity + 1: one slot serves rows that wait."""
    values: tuple[Tensor, ...]
    """Per layer [B, K, R, E], filled in place."""
    memory: Tensor
    """m of each row's last token, [B, D]; zero before the first."""
    length: Tensor
    """Tokens each row has seen, int64 [B]; the next token's position."""
    last_token: Tensor
    """The newest of them, int64 [B]: what the token shift reads next; negative before the first."""
    document_start: Tensor
    """Position at which each row's document starts, int64 [B]; 0 where attention crosses documents."""
    capacity: int
    """Most tokens a row can hold."""
    longest: int = 0
    """Upper bound of `length` that the host knows without asking the device."""

    @staticmethod
    def empty(model: Transformer, rows: int, capacity: int) -> KVCache:
        """An empty state of `rows` rows of `capacity` tokens each, of which sliding-window layers keep their window."""
        c, like = model.config, torch.empty(0, device=model.device, dtype=model.stream_dtype)
        sizes = [min(capacity + 1, window or capacity + 1) for window in c.windows()]
        keys, values = (tuple(like.new_zeros((rows, c.k, r, c.e)) for r in sizes) for _ in range(2))
        memory = like.new_zeros((rows, c.d))
        length = torch.zeros(rows, dtype=torch.int64, device=like.device)
        return KVCache(keys, values, memory, length, length - 1, length.clone(), capacity)

    def per_row(self) -> PerRow:
        """What a row holds beside keys and values."""
        return PerRow(self.memory, self.length, self.last_token, self.document_start)

    @property
    def rows(self) -> int:
        """Rows, B."""
        return len(self.length)

    def view(self) -> KVCache:
        """The same state with only those slots that rows of at most `longest` tokens, and their next one, can use.

        The number of slots grows in steps (see `visible_slots`), so that it takes few different values.
        """
        slots = visible_slots(self.longest + 1)
        keys, values = (tuple(x[:, :, :slots] for x in xs) for xs in (self.keys, self.values))
        return self._replace(keys=keys, values=values, longest=slots - 1)

    def open(self, positions: range | None, tokens: TokensBN, blocks: range) -> tuple[PassInput, KVCache]:
        """What the next token of every row reads: a pass of one position per row, wherever the row stands."""
        assert positions is None and tokens.shape[1] == 1 and blocks == range(len(self.keys)), "decode one token a row"
        rows = torch.arange(self.rows, device=self.length.device)[:, None]
        queries = self.length[:, None]
        held = per_size(self.keys, lambda r: (queries % r, positions_held(self.length + 1, r)))
        layers = [Slots(k, v, rows, *places) for k, v, places in zip(self.keys, self.values, held, strict=True)]
        start = self.document_start[:, None]
        return PassInput(queries, layers, self.memory[:, None], self.last_token[:, None], start), self

    def write(self, positions: range | None, written: PassOutput) -> KVCache:
        """The state after a pass that `open` began.

        Keys and values have been filled in place.
        """
        rows, longest = self.rows_after(written), min(self.longest + 1, self.capacity)
        return self._replace(**rows._asdict(), longest=longest)

    def rows_after(self, written: PassOutput, active: Tensor | None = None) -> PerRow:
        """`per_row` of that state; rows where `active` [B] is False stay as they were.

        Tensors alone, so that a compiled step depends on no number of the host.
        """
        start = self.document_start
        start = start if written.starts is None else torch.where(written.starts[:, 0], self.length, start)
        new = PerRow(written.memory[:, 0].to(self.memory.dtype), self.length + 1, written.tokens[:, 0], start)
        if active is None:
            return new
        pairs = zip(new, self.per_row(), strict=True)
        return PerRow(*(torch.where(active.view(-1, *(1,) * (x.dim() - 1)), x, old) for x, old in pairs))

    def buffer(self) -> Buffer:
        """A buffer for passes over the positions that come next, counted from 0 in every row; nothing is copied."""
        if self.longest == 0:
            return Buffer()
        seen = self.view()
        held = per_size(seen.keys, lambda r: positions_held(self.length, r))
        layers = list(zip(seen.keys, seen.values, held, strict=True))
        return Buffer(prefix=CachedPrefix(self.length, self.memory, self.last_token, self.document_start, layers))

    def commit(self, buffer: Buffer, rows: Tensor, count: Tensor) -> KVCache:
        """Take in what passes wrote: the first `count[i]` positions of the buffer's row i go to row `rows[i]`.

        Both are int64 [b]. Keys and values are filled in place.
        """
        memory, length, last_token, start = (x.clone() for x in self.per_row())
        for positions, w in buffer.segments:
            offset = torch.arange(positions.start, positions.stop, positions.step, device=count.device)
            last = offset == count[:, None] - 1
            row, column = last.nonzero(as_tuple=True)
            memory[rows[row]], last_token[rows[row]] = w.memory[row, column].to(memory.dtype), w.tokens[row, column]
            if w.starts is not None:
                begun = torch.where(w.starts & (offset < count[:, None]), self.length[rows][:, None] + offset, 0)
                start[rows] = torch.maximum(start[rows], begun.amax(1))
            by_layer = per_size(self.keys, lambda r, offset=offset: self._places(offset, rows, count, r))
            for mine, new, places in zip((*self.keys, *self.values), (*w.keys, *w.values), by_layer * 2, strict=True):
                row, column, slot = places
                mine[rows[row], :, slot] = new[row, :, column].to(mine.dtype)
        length[rows] += count
        rows_now = PerRow(memory, length, last_token, start)
        return self._replace(**rows_now._asdict(), longest=int(length.max()))

    def _places(self, offset: Tensor, rows: Tensor, count: Tensor, slots: int) -> tuple[Tensor, Tensor, Tensor]:
        """Which of the positions `offset` [n] a layer of `slots` slots keeps: row, index into `offset`, slot."""
        stays = (offset < count[:, None]) & (offset >= count[:, None] - slots)
        row, column = stays.nonzero(as_tuple=True)
        return row, column, (self.length[rows[row]] + offset[column]) % slots

    def first(self, n: int) -> KVCache:
        """The first n rows: the same tensors of keys and values, which a step fills in place."""
        if n == self.rows:
            return self
        keys, values = (tuple(x[:n] for x in xs) for xs in (self.keys, self.values))
        return KVCache(keys, values, *(x[:n] for x in self.per_row()), capacity=self.capacity, longest=self.longest)

    def with_first(self, part: KVCache) -> KVCache:
        """This state after a step of `first(n)` has made `part`."""
        n = part.rows
        if n == self.rows:
            return part
        pairs = zip(part.per_row(), self.per_row(), strict=True)
        joined = (torch.cat((new, old[n:])) for new, old in pairs)
        return KVCache(self.keys, self.values, *joined, capacity=self.capacity, longest=part.longest)

    def clear(self, row: int) -> KVCache:
        """This state with one row empty; its slots are not touched: nobody sees what they hold."""
        now = PerRow(*(x.clone() for x in self.per_row()))
        for x, nothing in zip(now, EMPTY, strict=True):
            x[row] = nothing
        return self._replace(**now._asdict())

    def take(self, rows: Tensor) -> KVCache:
        """An independent copy whose row i is this state's row `rows[i]`: n samples from one prompt, or a kept state."""
        keys, values = (tuple(x[rows] for x in xs) for xs in (self.keys, self.values))
        return KVCache(keys, values, *(x[rows] for x in self.per_row()), capacity=self.capacity, longest=self.longest)

    def put(self, rows: Tensor, other: KVCache) -> KVCache:
        """This state with row `rows[i]` replaced, in place, by row i of `other`, a state of the same capacity."""
        for mine, new in zip((*self.keys, *self.values), (*other.keys, *other.values), strict=True):
            if mine.shape[1:] != new.shape[1:] or self.capacity != other.capacity:
                raise ValueError(
                    f"a state of capacity {other.capacity} cannot join one of {self.capacity}: make both alike"
                )
            mine[rows] = new
        pairs = zip(self.per_row(), other.per_row(), strict=True)
        now = (mine.index_copy(0, rows, new) for mine, new in pairs)
        return KVCache(self.keys, self.values, *now, capacity=self.capacity, longest=max(self.longest, other.longest))

    def save(self, path: Path | str) -> None:
        """Write the state, only the slots in use, as safetensors."""
        used = self.longest
        tensors: dict[str, Tensor] = self.per_row()._asdict()
        for name, xs in (("keys", self.keys), ("values", self.values)):
            tensors |= {f"{name}.{i}": x[:, :, :used].contiguous() for i, x in enumerate(xs)}
        slots = json.dumps([x.shape[2] for x in self.keys])
        about = {"format": FORMAT, "slots": slots, "longest": str(used), "capacity": str(self.capacity)}
        write_tensors(tensors, Path(path), about | {DIGEST: tensors_hash(tensors, about)})

    @staticmethod
    def load(path: Path | str, device: str | torch.device = "cpu") -> KVCache:
        """Read a state written by `save`, bit for bit. ValueError: no such file, or not a state of this version."""
        tensors, about = read_tensors(path, "the saved state", device)
        if about.get("format") not in (FORMAT, BEFORE):
            raise ValueError(f"{path}: not a state saved as {FORMAT}: write it with KVCache.save")
        digest = about.pop(DIGEST, None)
        unmarked = digest is None and about["format"] == BEFORE
        if not unmarked and digest != tensors_hash(tensors, about):
            raise ValueError(f"{path}: has changed since it was saved (checksum): write it again with KVCache.save")
        slots = parse_json(about.get("slots", ""), f"{path}: slots")
        longest = parse_json(about.get("longest", ""), f"{path}: longest")
        _require_state(tensors, slots, longest, path)
        capacity = parse_json(about.get("capacity", str(slots[-1] - 1)), f"{path}: capacity")
        if type(capacity) is not int or not longest <= capacity <= MOST_SLOTS:
            raise ValueError(f"{path}: a capacity of {capacity} for {longest} tokens: write it again with KVCache.save")
        keys, values = (
            tuple(_refill(tensors[f"{name}.{i}"], r) for i, r in enumerate(slots)) for name in ("keys", "values")
        )
        length = tensors["length"]  # older files lack what no model read then
        last = tensors.get("last_token", torch.full_like(length, -1))
        start = tensors.get("document_start", torch.zeros_like(length))
        return KVCache(keys, values, tensors["memory"], length, last, start, capacity, longest)


def require_state(model: Transformer, state: object) -> None:
    """ValueError unless this is a state whose layers, heads and width are the model's."""
    if not isinstance(state, KVCache):
        raise ValueError(f"the state is of type {type(state).__name__}: give a KVCache, such as prefill(..).cache")
    c, heads = model.config, state.keys[0]
    own, its = (len(state.keys), heads.shape[1], heads.shape[3], state.memory.shape[1]), (c.layers, c.k, c.e, c.d)
    if own != its:
        a, b = ("{} layers, {} key/value heads of {}, width {}".format(*sizes) for sizes in (own, its))
        raise ValueError(f"the state is another model's ({a}; this one has {b}): begin with KVCache.empty or prefill")


def _require_state(tensors: dict[str, Tensor], slots: Any, longest: Any, path: Path | str) -> None:
    """ValueError unless the tensors of a file are a state: of fitting shapes and types, no longer than their slots."""
    counts = isinstance(slots, list) and len(slots) > 0 and type(longest) is int and longest >= 0
    counts = counts and all(type(r) is int and 1 <= r <= MOST_SLOTS for r in slots)
    names = {f"{name}.{i}" for i in range(len(slots) if counts else 0) for name in ("keys", "values")}
    if not counts or not names | {"memory", "length"} <= set(tensors) or tensors["length"].ndim != 1:
        raise ValueError(f"{path}: not a whole saved state: write it again with KVCache.save")
    if not (_shapes_fit(tensors, slots) and _lengths_fit(tensors, longest)):
        raise ValueError(f"{path}: the tensors of this state do not fit one another: write it again with KVCache.save")


def _shapes_fit(tensors: dict[str, Tensor], slots: list[int]) -> bool:
    """Whether keys and values of all layers and the memory are of as many rows, one shape and one float type."""
    rows, memory = len(tensors["length"]), tensors["memory"]
    layers = [(tensors[f"{name}.{i}"], r) for i, r in enumerate(slots) for name in ("keys", "values")]
    if not all(x.ndim == 4 and len(x) == rows and x.shape[2] <= r for x, r in layers):
        return False
    if memory.ndim != 2 or len(memory) != rows or not memory.is_floating_point():
        return False
    one_shape = len({(x.shape[1], x.shape[3]) for x, _ in layers}) == 1
    return one_shape and all(x.dtype == memory.dtype for x, _ in layers)


def _lengths_fit(tensors: dict[str, Tensor], longest: int) -> bool:
    """Whether each row has a length of at most `longest`, and a document that starts within it."""
    length = tensors["length"]
    counted = [tensors[name] for name in ("length", "last_token", "document_start") if name in tensors]
    if not all(x.shape == length.shape and x.dtype == torch.int64 for x in counted):
        return False
    start = tensors.get("document_start", torch.zeros_like(length))
    return bool(((start >= 0) & (start <= length) & (length <= longest)).all())


def _refill(used: Tensor, slots: int) -> Tensor:
    rows, heads, n, width = used.shape
    full = used.new_zeros(rows, heads, slots, width)
    full[:, :, :n] = used
    return full


def per_size(keys: Sequence[Tensor], compute: Callable[[int], X]) -> list[X]:
    """`compute(slots)` for every layer, once for all layers of as many slots."""
    computed: list[tuple[int, X]] = []  # compared one by one: a size that a compiler keeps symbolic has no hash
    for k in keys:
        if not any(size == k.shape[2] for size, _ in computed):
            computed.append((k.shape[2], compute(k.shape[2])))
    return [next(result for size, result in computed if size == k.shape[2]) for k in keys]


def positions_held(length: Tensor, slots: int) -> PositionsN:
    """Positions that a ring of `slots` slots holds after `length` [B] tokens, [B, slots].

    Slot j holds the last position congruent to j; one not yet written is said to hold FUTURE, which nobody sees.
    """
    slot = torch.arange(slots, device=length.device)
    newest = length[:, None] - 1
    held = newest - (newest - slot) % slots
    return torch.where(held < 0, FUTURE, held)


def visible_slots(needed: int) -> int:
    """The least of 128, 192, 256, 384, 512, 768, .. that is at least `needed`: at most half too many."""
    size = SMALLEST_VIEW
    while size < needed:
        size *= 2
    return size * 3 // 4 if size > SMALLEST_VIEW and size * 3 // 4 >= needed else size
