"""Passes run for transformers: what the last writer of each position left, in order, and states that are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lrt.config.decoding import PrefillOptions
from lrt.model.kv_cache import KVCache
from lrt.model.lrt import LRT
from lrt.model.recurrence import solve
from lrt.model.run_passes import run_passes
from lrt.model.shapes import PositionsN, StreamBND, TokensBN
from lrt.model.state import Buffer
from lrt.passes import Pass
from lrt.utils.hooks import in_this_thread, while_hooked


class Wanted(NamedTuple):
    """Which states a forward returns beside its result."""

    streams: bool = False
    """The residual stream before the first block and after every block but the last, then the result itself."""
    attentions: bool = False
    """The attention weights of every block."""

    @property
    def any(self) -> bool:
        """Whether there is something to record."""
        return self.streams or self.attentions


NOTHING = Wanted()


class PassStates(NamedTuple):
    """Recorded states; each empty unless it was wanted."""

    streams: tuple[StreamBND, ...] = ()
    """L + 1 of [B, N, D]."""
    attentions: tuple[Tensor, ...] = ()
    """L of [B, H, N, M]."""

    def ending(self, last: StreamBND) -> PassStates:
        """The same, with the model's result in place of the last block's output."""
        return self._replace(streams=(*self.streams[:-1], last)) if self.streams else self


class ScoredPass(NamedTuple):
    """A pass whose positions count in the loss."""

    positions: range
    weight: float
    """What a token's nats count, times the number of targets."""
    hidden: StreamBND
    """The head's input, [B, N, D]."""


class Folded(NamedTuple):
    """What passes have left."""

    hidden: StreamBND
    """The head's input by the last pass over each position, [B, N, D]."""
    passes: list[tuple[Pass, StreamBND]]
    """Those that ran to the top, each with what it gave."""
    buffer: Buffer
    states: PassStates


def fold(
    core: LRT, tokens: TokensBN, passes: Sequence[Pass], buffer: Buffer | None = None, wanted: Wanted = NOTHING
) -> Folded:
    """Run `passes` over `tokens` [B, N], which stand after the buffer's history."""
    n, buffer, ran, records = tokens.shape[1], buffer or Buffer(), [], []
    with recording(core, wanted) as recorder:
        before = buffer
        for p, written, buffer in run_passes(core, tokens, passes, core.starts(tokens), before):
            states = recorder.take()
            if written.hidden is not None:
                ran.append((p, written.hidden))
                records.append(_in_columns(states, before, p, n) if wanted.attentions else states)
            before = buffer
    slices = [p.positions for p, _ in ran]
    hidden = in_order(slices, [h for _, h in ran], n, 1)
    return Folded(hidden, ran, buffer, _last(slices, records, n))


def in_order(slices: Sequence[range], parts: Sequence[Tensor], n: int, axis: int) -> Tensor:
    """Positions 0..n-1 along `axis`, each from the last of `parts` that covers it; part i covers `slices[i]`."""
    if slices[-1] == range(n):
        return parts[-1]
    owner = {t: i for i, positions in enumerate(slices) for t in positions}
    offset = {i: sum(len(slices[j]) for j in range(i)) for i in range(len(slices))}
    index = [offset[owner[t]] + slices[owner[t]].index(t) for t in range(n)]
    return torch.cat(list(parts), dim=axis).index_select(axis, torch.tensor(index, device=parts[0].device))


def _last(slices: list[range], records: list[PassStates], n: int) -> PassStates:
    """The states of each position's last pass."""
    streams, weights = (zip(*kind, strict=True) for kind in zip(*records, strict=True))
    return PassStates(
        tuple(in_order(slices, parts, n, 1) for parts in streams),
        tuple(in_order(slices, parts, n, 2) for parts in weights),
    )


def _in_columns(states: PassStates, before: Buffer, p: Pass, n: int) -> PassStates:
    """Attention weights over keys in the order of positions: those of the history first, then 0..n-1."""
    if before.prefix is None and p.positions == range(n):
        return states  # the pass's own keys alone, in order
    weights = states.attentions[0]
    tokens = torch.zeros(len(weights), len(p.positions), dtype=torch.int64, device=weights.device)
    opened, _ = before.open(p.positions, tokens, range(len(states.attentions)))
    past = 0 if before.prefix is None else int(before.prefix.length.max())
    start = 0 if before.prefix is None else before.prefix.length[:, None]
    layers = len(states.attentions)
    read_positions = [opened.positions] * layers if opened.kv is None else [layer.positions for layer in opened.kv]
    moved = []
    for weights, keys in zip(states.attentions, read_positions, strict=True):
        columns = _columns(keys, start, past, n).expand(len(weights), -1)
        wide = weights.new_zeros(*weights.shape[:3], past + n + 1)
        index = columns[:, None, None].expand(*weights.shape)
        moved.append(wide.scatter_add(3, index, weights)[..., : past + n])
    return states._replace(attentions=tuple(moved))


def _columns(keys: PositionsN, start: Tensor | int, past: int, n: int) -> Tensor:
    """Where keys at absolute positions [M] or [B, M] go: the buffer's own begin at column `past` in every row."""
    keys = keys if keys.dim() == 2 else keys[None]
    columns = torch.where(keys >= start, keys - start + past, keys)
    return columns.clamp(max=past + n)  # slots that hold nothing


@torch.no_grad()
def settled(core: LRT, tokens: TokensBN, count: Tensor, state: KVCache, options: PrefillOptions) -> Buffer:
    """A buffer after `state`, which stays as it is, that holds the decoded memory of `tokens` and nothing else."""
    copy = state.take(torch.arange(state.rows, device=tokens.device))  # solving fills keys and values in place
    memory = torch.cat([solved.memory for _, solved in solve(core, tokens, count, copy, options)], dim=1)
    return state.buffer().holding(tokens, memory)


# Recording.


class Recorder(TorchFunctionMode):
    """Streams and attention weights of the blocks that run, in order. Weights are computed openly, and used as such."""

    def __init__(self, wanted: Wanted):
        super().__init__()
        self.wanted = wanted
        self._streams: list[Tensor] = []
        self._weights: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and self.wanted.attentions:
            out, weights = weighed(*args, **kwargs)
            self._weights.append(weights)
            return out
        return func(*args, **kwargs)

    def before(self, block: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Hook: what the first block is given."""
        if not self._streams:
            self._streams.append(inputs[0])

    def after(self, block: nn.Module, inputs: tuple[Any, ...], outputs: tuple[Any, ...]) -> None:
        """Hook: what a block gives."""
        self._streams.append(outputs[0])

    def take(self) -> PassStates:
        """What was recorded since the last time."""
        streams = tuple(self._streams) if self.wanted.streams else ()
        states = PassStates(streams, tuple(self._weights))
        self._streams, self._weights = [], []
        return states


@contextmanager
def recording(core: LRT, wanted: Wanted) -> Iterator[Recorder]:
    """A recorder of everything that `core` computes meanwhile."""
    recorder = Recorder(wanted)
    if not wanted.any:
        yield recorder
        return
    execution, handles = core.execution, []
    core.execution = replace(execution, attention="masked", compile=False)
    before, after = in_this_thread(recorder.before), in_this_thread(recorder.after)
    for block in core.blocks:
        handles += [block.register_forward_pre_hook(before), block.register_forward_hook(after)]
    try:
        with while_hooked(handles), recorder:
            yield recorder
    finally:
        core.execution = execution


def weighed(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, enable_gqa: bool = False
) -> tuple[Tensor, Tensor]:
    """`scaled_dot_product_attention` written out: its result [B, H, N, E] and its weights [B, H, N, M]."""
    if enable_gqa:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5
    if is_causal:
        attn_mask = torch.ones(scores.shape[2:], dtype=torch.bool, device=q.device).tril()
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    weights = scores.softmax(dim=-1).nan_to_num(0.0).to(v.dtype)  # a query that sees nothing
    return weights @ v, weights
