"""The parts of the model: norm, memory projection, injection, attention, MLP, block.

The memory enters by ResidualInjection (before every block) and KVProjection (inside attention):
docs/method.md#injection.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lrt.config.model import ModelConfig
from lrt.model.attention import Mask, Rope, attend
from lrt.model.ops import apply_rope, relu_squared, rms, rms_norm, weighted_sum
from lrt.model.shapes import HeadsBKNE, PositionsN, StreamBND, TokensBN
from lrt.model.state import LayerKV

Pair = tuple[Tensor, Tensor]
"""Projected memory, (W_K m, W_V m), each [B, N, K, E]; of two memories, the sum."""


class Memories(NamedTuple):
    """What a pass reads of the previous positions, [B, N, D] each; None: not read, or zero everywhere."""

    recurrent: StreamBND | None = None
    """m_{t-1} of the source block."""
    shift: StreamBND | None = None
    """RMSNorm of the embedding of token t-1."""


class BlockContext(NamedTuple):
    """What a block is given beside the stream."""

    x0: StreamBND
    """The normalised token embedding."""
    tokens: TokensBN
    positions: PositionsN
    memories: Memories
    projected: Pair | None
    """Of shared projections: the memories' keys and values, computed once a pass."""
    rope: Rope
    attention_mask: Mask
    kv: LayerKV | None
    """Keys and values of other positions; None: the pass sees itself alone."""


class Norm(nn.Module):
    """RMSNorm over the last axis, with a learned weight of `width` channels where one is given."""

    def __init__(self, width: int | None, eps: float):
        super().__init__()
        self.weight, self.eps = None if width is None else nn.Parameter(torch.empty(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        return self.scale(rms_norm(x, self.eps))

    def scale(self, x: Tensor) -> Tensor:
        """The learned weight's part alone."""
        return x if self.weight is None else x * self.weight.to(x.dtype)


class MemoryProjection(nn.Module):
    """W_K and W_V: the memory's contribution to a position's own key and value."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.heads = (config.k, config.e)
        self.key = nn.Linear(config.d, config.k * config.e, bias=False)
        self.value = nn.Linear(config.d, config.k * config.e, bias=False)

    def forward(self, memory: StreamBND) -> Pair:
        return self.key(memory).unflatten(-1, self.heads), self.value(memory).unflatten(-1, self.heads)


def projections(config: ModelConfig, wanted: bool) -> tuple[MemoryProjection | None, MemoryProjection | None]:
    """W_K and W_V of the recurrent memory and of the shift, where there is one."""
    memory = config.memory
    recurrent = MemoryProjection(config) if wanted and memory.recurrent else None
    return recurrent, MemoryProjection(config) if wanted and memory.shifted else None


def projected(memories: Memories, projections: tuple[nn.Module | None, nn.Module | None]) -> Pair | None:
    """The sum of the projected memories that are there."""
    terms = zip(projections, memories, strict=True)
    pairs = [project(m) for project, m in terms if project is not None and m is not None]
    return (pairs[0][0] + pairs[1][0], pairs[0][1] + pairs[1][1]) if len(pairs) == 2 else pairs[0] if pairs else None


class ResidualInjection(nn.Module):
    """x <- alpha x + beta x0 + gamma m_{t-1}: learned scalars of one block; absent terms have no parameter.

    A token shift has a gamma of its own, for the embedding of token t-1. Where `memory.injection` is not `scaled`, y =
    alpha x + beta x0 takes in gamma |y| m, or moves by gamma from y towards |y| m; |y| is its root mean square.
    """

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        memory, reads = config.memory, config.memory.residual and config.reads_memory(layer)
        self.alpha = nn.Parameter(torch.empty(())) if config.residual_scalars else None
        self.beta = nn.Parameter(torch.empty(())) if config.residual_scalars else None
        self.gamma = nn.Parameter(torch.empty(())) if reads and memory.recurrent else None
        self.shift_gamma = nn.Parameter(torch.empty(())) if reads and memory.shifted else None
        self.kind, self.eps = memory.injection, config.backbone.norm_eps

    def forward(self, x: StreamBND, context: BlockContext) -> StreamBND:
        pairs = ((self.gamma, context.memories.recurrent), (self.shift_gamma, context.memories.shift))
        added = [(gamma, m) for gamma, m in pairs if gamma is not None and m is not None]
        if self.kind == "scaled" or not added:
            return self._sum(x, context.x0, added)
        y = self._sum(x, context.x0, [])
        return y + sum(gamma * self._change(y, m) for gamma, m in added)

    def _sum(self, x: StreamBND, x0: StreamBND, added: Sequence[tuple[Tensor, StreamBND]]) -> StreamBND:
        if self.alpha is None or self.beta is None:
            for gamma, m in added:
                x = torch.addcmul(x, gamma, m)
            return x
        gammas, terms = zip(*added, strict=True) if added else ((), ())
        return weighted_sum((self.alpha, self.beta, *gammas), (x, x0, *terms))

    def _change(self, y: StreamBND, m: StreamBND) -> StreamBND:
        """What gamma is the share of: |y| m, or the way there from y; nothing where there is no memory."""
        matched = rms(y, self.eps) * m
        return matched if self.kind == "matched" else matched - y * (m != 0).any(-1, keepdim=True)


def gate_values(logits: Tensor) -> Tensor:
    """The gates of KVProjection, 2 sigmoid(W_gate a), from `logits` = W_gate a; 1 where these are 0."""
    return 2 * torch.sigmoid(logits)


class Attention(nn.Module):
    """Grouped-query attention whose keys and values may take in the memory (KVProjection)."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        d, kv, memory, back = config.d, config.k * config.e, config.memory, config.backbone
        self.heads, self.kv_heads, self.gate_width = (config.h, config.e), (config.k, config.e), config.gate_width
        inner, bias = config.h * config.e, back.biases != "none"
        self.query = nn.Linear(d, inner, bias=bias)
        self.key = nn.Linear(d, kv, bias=bias)
        self.value = nn.Linear(d, kv, bias=bias)
        self.output = nn.Linear(inner, d, bias=back.biases in ("attention", "all"))
        self.qk_norm = back.qk_norm
        learned = config.e if back.qk_norm == "before" else None
        self.query_norm, self.key_norm = (Norm(learned, back.norm_eps) for _ in range(2))
        embedded = config.has_value_embedding(layer)
        self.value_embedding = nn.Embedding(config.vocab_size, kv) if embedded else None
        rows = 3 if embedded else 2  # local, memory, and the value embedding's
        reads = config.reads_memory(layer)
        self.gate = nn.Linear(config.gate_width, rows * config.k, bias=False) if memory.gated and reads else None
        self.projection, self.shift_projection = projections(config, memory.projection == "layerwise" and reads)

    def forward(self, a: StreamBND, context: BlockContext) -> tuple[StreamBND, HeadsBKNE, HeadsBKNE]:
        q = self.query(a).unflatten(-1, self.heads).transpose(1, 2)
        k, v = (x.transpose(1, 2) for x in self.keys_values(a, context))
        q, k = self._rotated(q, self.query_norm, context.rope), self._rotated(k, self.key_norm, context.rope)
        keys, values = (k, v) if context.kv is None else context.kv.extend(k, v)
        out = attend(q, keys, values, context.attention_mask)
        return self.output(out.transpose(1, 2).flatten(2)), k, v

    def _rotated(self, x: HeadsBKNE, norm: Norm, rope: Rope) -> HeadsBKNE:
        """Queries or keys with RoPE and their norm, in this model's order."""
        x = apply_rope(norm(x) if self.qk_norm == "before" else x, *rope)
        return norm(x) if self.qk_norm == "after" else x

    def keys_values(self, a: StreamBND, context: BlockContext) -> Pair:
        """Local keys and values, gated, with the memory's and the value embedding's terms; [B, N, K, E] each."""
        k, v = (f(a).unflatten(-1, self.kv_heads) for f in (self.key, self.value))
        extra = None
        if self.value_embedding is not None:
            extra = self.value_embedding(context.tokens).unflatten(-1, self.kv_heads).to(v.dtype)
        if self.gate is None:
            return k, v if extra is None else v + extra
        gates = gate_values(self.gate(a[..., : self.gate_width]))
        local, recurrent, *embedded = gates.unflatten(-1, (-1, self.kv_heads[0], 1)).unbind(2)
        own = projected(context.memories, (self.projection, self.shift_projection))
        pair = context.projected if own is None else own
        weights, keys, values = [local], [k], [v]
        if pair is not None:
            weights, keys, values = [local, recurrent], [k, pair[0]], [v, pair[1]]
        if extra is not None:
            return weighted_sum(weights, keys), weighted_sum([*weights, *embedded], [*values, extra])
        return weighted_sum(weights, keys), weighted_sum(weights, values)


class MLP(nn.Module):
    """down(relu(up(a))^2), or the gated down(silu(glu(a)) up(a)) (Shazeer 2020)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        wide, bias = config.mlp_width, config.backbone.biases == "all"
        self.glu = nn.Linear(config.d, wide, bias=bias) if config.backbone.mlp == "swiglu" else None
        self.up = nn.Linear(config.d, wide, bias=bias)
        self.down = nn.Linear(wide, config.d, bias=bias)

    def forward(self, a: StreamBND) -> StreamBND:
        if self.glu is not None:
            return self.down(F.silu(self.glu(a)) * self.up(a))
        return self.down(relu_squared(self.up(a)))


class Block(nn.Module):
    """Injection, attention, MLP."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.injection = ResidualInjection(config, layer)
        self.attention = Attention(config, layer)
        self.mlp = MLP(config)
        self.attention_norm, self.mlp_norm = (stream_norm(config) for _ in range(2))

    def forward(self, x: StreamBND, context: BlockContext) -> tuple[StreamBND, HeadsBKNE, HeadsBKNE]:
        x = self.injection(x, context)
        attended, k, v = self.attention(self.attention_norm(x), context)
        x = x + attended
        return x + self.mlp(self.mlp_norm(x)), k, v


def stream_norm(config: ModelConfig) -> Norm:
    """The norm before attention, before the MLP and before the head."""
    return Norm(config.d if config.backbone.norm_weights else None, config.backbone.norm_eps)
