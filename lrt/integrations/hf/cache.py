"""The memory in transformers' cache: the last layer holds it beside its keys and values, so that the library builds,
reorders, repeats and resets it with them; and the ways between such a cache and the core's state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer

from lrt.integrations.hf.config import MEMORY_LAYER
from lrt.integrations.hf.documents import DocumentRows, order, pick
from lrt.model.kv_cache import KVCache
from lrt.model.lrt import LRT
from lrt.model.shapes import HeadsBKNE, PositionsN
from lrt.utils.compiling import mark_in_place
from lrt.utils.require import require

BUILD = (
    "build it from the model's own config, DynamicCache(config=model.config) or StaticCache(config=model.config, "
    "max_cache_len=..); for PEFT's prefix tuning, whose cache has none, take prompt tuning"
)


CROP = (
    "a cache with memory goes back only over tokens that it has recorded: call its activate_past_recording() before "
    "them, or build a new one from the tokens to keep"
)


class RowState(NamedTuple):
    """What a cache holds of each row beside keys and values; or so after each of N slots, [B, N, ..]."""

    m: Tensor
    """Of its last token, [B, D]."""
    last_token: Tensor
    """int64 [B]"""
    document_start: Tensor
    """Position at which its document starts, int64 [B]."""
    taken: Tensor
    """Tokens that it has taken in, int64 [B]."""

    def map(self, change: Callable[[Tensor], Tensor]) -> RowState:
        """Each field changed alike."""
        return RowState(*(change(x) for x in self))


class _Memory:
    """What each row holds beside what the other base keeps; nothing before the first token."""

    held: list[Tensor] | None = None
    """The fields of `RowState`; a list, which the library's exporters can take apart and put together."""
    is_croppable = False
    record_past = False
    """Whether the states after earlier slots are kept too."""

    @property
    def kept(self) -> RowState | None:
        """What is held."""
        return None if self.held is None else RowState(*self.held)

    def keep(self, after: RowState) -> None:
        """Take in the states after new slots; the last in place, if any is held: a compiled step knows its address."""
        new = after.map(lambda x: x[:, -1])
        if self.held is None:
            self.held = [x.detach().clone() for x in new]
            if not torch.compiler.is_compiling():
                for x in self.held:
                    mark_in_place(x)
        else:
            for mine, x in zip(self.held, new, strict=True):
                mine.copy_(x.detach())

    def reset(self) -> None:
        super().reset()  # pyright: ignore[reportAttributeAccessIssue]
        if self.held is not None:
            for x, nothing in zip(self.held, (0, -1, 0, 0), strict=True):
                x.fill_(nothing)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # pyright: ignore[reportAttributeAccessIssue]
        self._pick(beam_idx)

    def _pick(self, rows: Tensor) -> None:
        self._map(lambda x: x[rows.to(x.device)])

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.held is not None:
            self.held = [change(x) for x in self.held]


class MemoryDynamicLayer(_Memory, DynamicLayer):
    """A layer that grows. While it records it holds the state after every slot, so that it can go back."""

    _layer_type = MEMORY_LAYER
    is_croppable = True
    recorded: list[Tensor] | None = None
    """The fields of `RowState` after each of the last slots, [B, N, ..]."""

    def activate_past_recording(self) -> None:
        """Keep the state after each slot from now on, as the library asks where drafts may be rejected."""
        if not self.record_past and self.held is not None:
            self.recorded = [x[:, None] for x in self.held]
        self.record_past = True

    def keep(self, after: RowState) -> None:
        self.held = [x[:, -1].clone() for x in after]  # with their gradient, as keys and values here
        if not self.record_past:
            self.recorded = None
        elif self.recorded is None:
            self.recorded = [x.clone() for x in after]
        else:
            self.recorded = [torch.cat(both, dim=1) for both in zip(self.recorded, after, strict=True)]

    def reset(self) -> None:
        super().reset()
        self.held = self.recorded = None

    def crop(self, tokens_to_remove: int) -> None:
        """As the library has it. ValueError: an earlier slot's state was not recorded."""
        gone = abs(tokens_to_remove)
        kept = [x[:, :-gone] for x in self.recorded or ()] if 0 < gone < self.get_seq_length() else None
        require(kept is None or bool(kept and kept[0].shape[1]), CROP)  # before anything is taken away
        super().crop(tokens_to_remove)
        if kept is not None:
            self.recorded, self.held = kept, [x[:, -1] for x in kept]
        elif gone:
            self.held = self.recorded = None

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        super()._map(change)
        if self.recorded is not None:
            self.recorded = [change(x) for x in self.recorded]

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._map(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._pick(indices)


class MemoryStaticLayer(_Memory, StaticLayer):
    """A preallocated layer."""

    _layer_type = MEMORY_LAYER


def memory_layer(cache: Any, depth: int) -> MemoryDynamicLayer | MemoryStaticLayer:
    """The layer with the memory. ValueError: a cache that was built without this model's configuration."""
    layers: Any = getattr(cache, "layers", ())
    last: Any = layers[-1] if len(layers) == depth else None
    if getattr(last, "_layer_type", None) != MEMORY_LAYER:  # not isinstance: remote code brings classes of its own
        raise ValueError(f"past_key_values is a {type(cache).__name__} without a layer for the memory: {BUILD}")
    return last


def require_goes_on(cache: Cache, depth: int, seen: Tensor, new: int) -> None:
    """ValueError: a cache that does not hold the `seen` [B, M] tokens so far, or has no room for `new` more."""
    state, used = memory_layer(cache, depth).kept, int(cache.get_seq_length())
    require(state is not None, f"past_key_values holds keys and values without the memory: {BUILD}")
    assert state is not None
    rows = f"past_key_values holds {len(state.taken)} rows for {len(seen)} of tokens; give one for each"
    require(len(state.taken) == len(seen), rows)
    masked = seen[:, :used].sum(1)
    odd = (masked != state.taken).nonzero()[:1].flatten().tolist()
    for row in odd:
        raise ValueError(
            f"the attention_mask tells {int(masked[row])} tokens before these in row {row}, past_key_values has taken "
            f"in {int(state.taken[row])}; give the mask it was filled with (without one, pad tokens count as padding)"
        )
    room = cache.get_max_length() if cache.is_compileable else used + new
    full = f"past_key_values has room for {room} tokens, not for {used + new}; build it with a larger max_cache_len"
    require(used + new <= room, full)


class Layer(NamedTuple):
    """One layer of a transformers cache as the core's attention sees it, for a step of one token a row."""

    layer: Any
    positions: PositionsN
    """Of the keys that `extend` returns, [M] or [B, M]."""
    queries: PositionsN
    """Of the step's own tokens, [1] or [B, 1]."""

    def extend(self, k: HeadsBKNE, v: HeadsBKNE) -> tuple[HeadsBKNE, HeadsBKNE]:
        """All keys and values, once the pass's own have been added. A static cache holds values without gradient."""
        if not (self.layer.is_compileable and (k.requires_grad or v.requires_grad)):
            return self.layer.update(k, v)
        newest = (self.positions == self.queries).view(-1, 1, self.positions.shape[-1], 1)
        keys, values = self.layer.update(k.detach(), v.detach())
        return torch.where(newest, k, keys), torch.where(newest, v, values)


def state_of(cache: Cache | None, core: LRT, seen: Tensor, room: int) -> KVCache:
    """The core's state of what a transformers cache holds, with `room` more slots; every layer in full.

    `seen` is the mask of the slots in use, boolean [B, M].
    """
    model, like = core.config, torch.empty(0, dtype=core.stream_dtype, device=seen.device)
    (rows, used), length = seen.shape, seen.sum(1)
    shape = (rows, model.k, used + room + 1, model.e)
    keys, values = ([like.new_zeros(shape) for _ in range(model.layers)] for _ in range(2))
    per_row = RowState(like.new_zeros(rows, model.d), torch.full_like(length, -1), torch.zeros_like(length), length)
    if cache is not None and used:
        index = order(seen)
        layers: list[Any] = cache.layers
        for i, layer in enumerate(layers):
            for mine, theirs in ((keys[i], layer.keys), (values[i], layer.values)):
                mine[:, :, :used] = pick(theirs[:, :, :used], index, 2)
        state = memory_layer(cache, model.layers).kept
        assert state is not None
        per_row = RowState(*(x.clone() for x in state))
    memory, last_token, start, _ = per_row
    return KVCache(tuple(keys), tuple(values), memory, length, last_token, start, used + room, int(length.max()))


class Gained(NamedTuple):
    """What a prefill adds to a cache."""

    keys: tuple[HeadsBKNE, ...]
    values: tuple[HeadsBKNE, ...]
    offset: Tensor
    """Where in them each row's new tokens begin, int64 [B]."""
    states: RowState
    """After 0, 1, .. of the new tokens, [B, N + 1, ..]; arbitrary beyond a row's own."""


def store(cache: Cache, rows: DocumentRows, gained: Gained) -> None:
    """Add to a transformers cache what was gained, in the columns of the batch that the rows are of."""
    places = torch.arange(rows.columns, device=gained.offset.device)
    back = places.expand(len(gained.offset), -1)
    if rows.origin is not None:
        back = (rows.origin % rows.columns).argsort(dim=1)
    slot = (gained.offset[:, None] + back).clamp(max=gained.keys[0].shape[2] - 1)
    layers: list[Any] = cache.layers
    for layer, k, v in zip(layers, gained.keys, gained.values, strict=True):
        new = (pick(k, slot, 2), pick(v, slot, 2))
        layer.update(*(x.detach() if layer.is_compileable else x for x in new))
    memory = memory_layer(cache, len(cache.layers))
    after = (back < rows.length[:, None]).cumsum(1)
    after = after if memory.record_past else after[:, -1:]
    memory.keep(gained.states.map(lambda x: pick(x, after, 1)))
