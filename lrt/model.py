"""The model and its one forward: any pass, over any positions, against any state.

A nanochat-style decoder-only transformer; the memory enters by ResidualInjection (before every block) and KVProjection
(inside attention), SPEC section 2. Turn both off and it is exactly the plain transformer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lrt.attention import Rotary, Sight, attend, look, rotary, rotate
from lrt.model_config import Execution, ModelConfig
from lrt.ops import relu_squared, rms_norm, weighted_sum
from lrt.shapes import HeadsBKNE, StreamBND, TokensBN
from lrt.state import LayerPast, Past, Segments, Written

Pair = tuple[Tensor, Tensor]
"""Projected memory, (W_K m, W_V m), each [B, N, K, E]."""


class MemoryProjection(nn.Module):
    """W_K and W_V: the memory's contribution to a position's own key and value."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.heads = (config.k, config.e)
        self.key = nn.Linear(config.d, config.k * config.e, bias=False)
        self.value = nn.Linear(config.d, config.k * config.e, bias=False)

    def forward(self, memory: StreamBND) -> Pair:
        return self.key(memory).unflatten(-1, self.heads), self.value(memory).unflatten(-1, self.heads)


class ResidualInjection(nn.Module):
    """x <- alpha x + beta x0 + gamma m_{t-1}: learned scalars of one block; absent terms have no parameter."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.alpha = nn.Parameter(torch.empty(())) if config.residual_scalars else None
        self.beta = nn.Parameter(torch.empty(())) if config.residual_scalars else None
        self.gamma = nn.Parameter(torch.empty(())) if config.memory.residual else None

    def forward(self, x: StreamBND, x0: StreamBND, memory: StreamBND | None) -> StreamBND:
        if self.alpha is None or self.beta is None:
            return x if self.gamma is None or memory is None else torch.addcmul(x, self.gamma, memory)
        if self.gamma is None or memory is None:
            return weighted_sum((self.alpha, self.beta), (x, x0))
        return weighted_sum((self.alpha, self.beta, self.gamma), (x, x0, memory))


class Attention(nn.Module):
    """Grouped-query attention with QK-norm whose keys and values may take in the memory (KVProjection)."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        d, kv, memory = config.d, config.k * config.e, config.memory
        self.heads, self.kv_heads, self.gate_width = (config.h, config.e), (config.k, config.e), config.gate_width
        self.query = nn.Linear(d, d, bias=False)
        self.key = nn.Linear(d, kv, bias=False)
        self.value = nn.Linear(d, kv, bias=False)
        self.output = nn.Linear(d, d, bias=False)
        embedded = config.has_value_embedding(layer)
        self.value_embedding = nn.Embedding(config.vocab_size, kv) if embedded else None
        rows = 3 if embedded else 2  # local, memory, and the value embedding's
        gated = memory.projection != "none"
        self.gate = nn.Linear(config.gate_width, rows * config.k, bias=False) if gated else None
        self.projection = MemoryProjection(config) if memory.projection == "layerwise" else None

    def forward(
        self,
        a: StreamBND,
        tokens: TokensBN,
        memory: StreamBND | None,
        shared: Pair | None,
        rope: Rotary,
        seen: Sight,
        past: LayerPast,
    ) -> tuple[StreamBND, HeadsBKNE, HeadsBKNE]:
        q = self.query(a).unflatten(-1, self.heads).transpose(1, 2)
        k, v = self.keys_values(a, tokens, memory, shared)
        q, k = rms_norm(rotate(q, rope)), rms_norm(rotate(k.transpose(1, 2), rope))
        v = v.transpose(1, 2)
        keys, values = past.parts(k, v) if isinstance(seen, tuple) else past.extend(k, v)
        out = attend(q, keys, values, seen)
        return self.output(out.transpose(1, 2).flatten(2)), k, v

    def keys_values(self, a: StreamBND, tokens: TokensBN, memory: StreamBND | None, shared: Pair | None) -> Pair:
        """Local keys and values, gated, with the memory's and the value embedding's terms; [B, N, K, E] each."""
        k, v = (f(a).unflatten(-1, self.kv_heads) for f in (self.key, self.value))
        extra = self.value_embedding(tokens).unflatten(-1, self.kv_heads).to(v.dtype) if self.value_embedding else None
        if self.gate is None:
            return k, v if extra is None else v + extra
        gates = 2 * torch.sigmoid(self.gate(a[..., : self.gate_width]))
        local, recurrent, *embedded = gates.unflatten(-1, (-1, self.kv_heads[0], 1)).unbind(2)
        pair = self.projection(memory) if self.projection is not None and memory is not None else shared
        weights, keys, values = [local], [k], [v]
        if pair is not None:
            weights, keys, values = [local, recurrent], [k, pair[0]], [v, pair[1]]
        if extra is not None:
            return weighted_sum(weights, keys), weighted_sum([*weights, *embedded], [*values, extra])
        return weighted_sum(weights, keys), weighted_sum(weights, values)


class MLP(nn.Module):
    """Two matrices with ReLU squared between them, 4 D wide."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.up = nn.Linear(config.d, 4 * config.d, bias=False)
        self.down = nn.Linear(4 * config.d, config.d, bias=False)

    def forward(self, a: StreamBND) -> StreamBND:
        return self.down(relu_squared(self.up(a)))


class Block(nn.Module):
    """Injection, attention, MLP."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.injection = ResidualInjection(config)
        self.attention = Attention(config, layer)
        self.mlp = MLP(config)

    def forward(
        self,
        x: StreamBND,
        x0: StreamBND,
        tokens: TokensBN,
        memory: StreamBND | None,
        shared: Pair | None,
        rope: Rotary,
        seen: Sight,
        past: LayerPast,
    ) -> tuple[StreamBND, HeadsBKNE, HeadsBKNE]:
        x = self.injection(x, x0, memory)
        attended, k, v = self.attention(rms_norm(x), tokens, memory, shared, rope, seen, past)
        x = x + attended
        return x + self.mlp(rms_norm(x)), k, v


class LRT(nn.Module):
    """The Latent Recurrent Transformer. Build it with `LRT.build`; `LRT(config)` leaves the weights uninitialised."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d)
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.depth))
        self.head = nn.Linear(config.d, config.vocab_size, bias=False)
        self.projection = MemoryProjection(config) if config.memory.projection == "shared" else None
        self.execution = Execution()

    @staticmethod
    def build(config: ModelConfig, device: str | torch.device = "cpu", seed: int = 0) -> LRT:
        """A model on `device`, initialised from `seed`; built on the meta device, so nothing is allocated twice."""
        with torch.device("meta"):
            model = LRT(config)
        model = model.to_empty(device=device)
        initialise(model, seed)
        return model

    def forward(
        self,
        tokens: TokensBN,
        past: Past,
        memory: StreamBND | None = None,
        starts: Tensor | None = None,
        *,
        top: bool = True,
    ) -> Written:
        """Run one pass over N positions.

        Args:
            tokens: the tokens there, int64 [B, N].
            past: the positions, and what their queries see (`Buffer.past` or `Cache.past`).
            memory: m_{t-1} for each of them, [B, N, D]; None is zero memory.
            starts: boolean [B, N], True at the first token of a document, where the memory is reset.
            top: whether the blocks above the source block run; without them there is no `hidden`.
        """
        x0 = rms_norm(self.embedding(tokens)).to(self.stream_dtype)
        memory = self._reset(memory, starts)
        shared = self.projection(memory) if self.projection is not None and memory is not None else None
        rope = rotary(past.queries, self.config.e, self.config.rope_theta, x0.dtype)
        windows, sights = self.config.windows(), {}
        for window, layer in zip(windows, past.layers, strict=False):
            if window not in sights:  # layers of one window hold the same positions
                sights[window] = look(past, layer, window, self.execution.backend, x0)
        run, layers = self._runner(past)
        x = x0.clone() if self.execution.compile else x0  # one tensor given twice would be a graph of its own
        source, keys, values = x0, [], []
        for i in range(self.config.depth if top else self.config.source):
            x, k, v = run(self.blocks[i], x, x0, tokens, memory, shared, rope, sights[windows[i]], layers[i])
            keys.append(k)
            values.append(v)
            source = rms_norm(x) if i + 1 == self.config.source else source
        hidden = (source if self.config.source == self.config.depth else rms_norm(x)) if top else None
        return Written(hidden, source, tuple(keys), tuple(values))

    def logits(self, hidden: StreamBND) -> Tensor:
        """Next-token logits [.., V], soft-capped, in float32 at least."""
        z = self.head(hidden)
        z = z.float() if z.dtype != torch.float64 else z
        cap = self.config.softcap
        return z if cap is None else cap * torch.tanh(z / cap)

    @property
    def stream_dtype(self) -> torch.dtype:
        """Type of the residual stream: autocast's where it is on, else the parameters'."""
        device = self.head.weight.device.type
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.head.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.head.weight.device

    def starts(self, tokens: TokensBN) -> Tensor | None:
        """Where documents start: at every BOS token; boolean like `tokens`, or None if the model knows no BOS."""
        return None if self.config.bos is None else tokens == self.config.bos

    def memory_parameters(self) -> list[nn.Parameter]:
        """Parameters that take part only where memory is read: W_K, W_V and gamma."""
        return [p for name, p in self.named_parameters() if "projection." in name or name.endswith("gamma")]

    def _runner(self, past: Past) -> tuple[Callable[..., tuple[StreamBND, HeadsBKNE, HeadsBKNE]], Sequence[LayerPast]]:
        """How blocks are called, and what their attention sees of the past, in the form that suits that."""
        compiled = self.execution.compile and bool(past.slices)
        run, layers = (_compiled(), [_joined(layer) for layer in past.layers]) if compiled else (_called, past.layers)
        if self.execution.recompute and torch.is_grad_enabled():
            run = partial(checkpoint, run, use_reentrant=False, preserve_rng_state=False)
        return run, layers

    def _reset(self, memory: StreamBND | None, starts: Tensor | None) -> StreamBND | None:
        if memory is None or not self.config.memory.on:
            return None
        memory = memory if starts is None else memory.masked_fill(starts[..., None], 0)
        return memory.to(self.stream_dtype)


def _called(block: nn.Module, *inputs: Any) -> tuple[StreamBND, HeadsBKNE, HeadsBKNE]:
    return block(*inputs)


@cache
def _compiled() -> Callable[..., tuple[StreamBND, HeadsBKNE, HeadsBKNE]]:
    return torch.compile(_called, fullgraph=True)


def _joined(layer: LayerPast) -> LayerPast:
    assert isinstance(layer, Segments)
    return layer.joined()


@torch.no_grad()
def initialise(model: LRT, seed: int) -> None:
    """Set every parameter, from a generator of its own.

    | parameter | start |
    | --- | --- |
    | embedding | normal, deviation 1 |
    | head | normal, deviation 0.001 |
    | output, mlp.down, gate | 0: blocks start as the identity, gates at 2 sigmoid(0) = 1 |
    | other matrices, value embeddings | uniform, deviation 1/sqrt(D) |
    | alpha, beta, gamma | 1, 0.1, 0.1 |
    """
    random = torch.Generator(model.device).manual_seed(seed)
    bound = math.sqrt(3 / model.config.d)
    for name, p in model.named_parameters():
        kind = name.removesuffix(".weight").rsplit(".", 1)[-1]
        if kind in ("alpha", "beta", "gamma"):
            p.fill_(1.0 if kind == "alpha" else 0.1)
        elif kind in ("embedding", "head"):
            p.normal_(0, 1.0 if kind == "embedding" else 0.001, generator=random)
        elif kind in ("output", "down", "gate"):
            p.zero_()
        else:
            p.uniform_(-bound, bound, generator=random)
