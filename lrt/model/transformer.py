"""The model and its one forward: any pass, over any positions, against any state.

A decoder-only transformer, nanochat-style unless `ModelConfig.backbone` says otherwise; the memory enters by
ResidualInjection (before every block) and KVProjection (inside attention), docs/method.md#injection. Turn both off and
it is exactly the plain transformer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lrt.config.model import Execution, ModelConfig
from lrt.model.attention import Rotary, Sight, attend, look, rotary, rotate
from lrt.model.ops import relu_squared, rms_norm, weighted_sum
from lrt.model.shapes import HeadsBKNE, StreamBND, TokensBN
from lrt.model.state import LayerPast, PassOutput, Past, Segments
from lrt.utils.dtensor import fill, is_sharded

Pair = tuple[Tensor, Tensor]
"""Projected memory, (W_K m, W_V m), each [B, N, K, E]; of two memories, the sum."""


class Memories(NamedTuple):
    """What a pass reads of the previous positions, [B, N, D] each; None: not read, or zero everywhere."""

    recurrent: StreamBND | None = None
    """m_{t-1} of the source block."""
    shift: StreamBND | None = None
    """RMSNorm of the embedding of token t-1."""


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


def _projections(config: ModelConfig, wanted: bool) -> tuple[MemoryProjection | None, MemoryProjection | None]:
    """W_K and W_V of the recurrent memory and of the shift, where there is one."""
    memory = config.memory
    recurrent = MemoryProjection(config) if wanted and memory.recurrent else None
    return recurrent, MemoryProjection(config) if wanted and memory.shifted else None


def _projected(memories: Memories, projections: tuple[nn.Module | None, nn.Module | None]) -> Pair | None:
    """The sum of the projected memories that are there."""
    there = zip(projections, memories, strict=True)
    pairs = [project(m) for project, m in there if project is not None and m is not None]
    return (pairs[0][0] + pairs[1][0], pairs[0][1] + pairs[1][1]) if len(pairs) == 2 else pairs[0] if pairs else None


class ResidualInjection(nn.Module):
    """x <- alpha x + beta x0 + gamma m_{t-1}: learned scalars of one block; absent terms have no parameter.

    A token shift has a gamma of its own, for the embedding of token t-1.
    """

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        memory, reads = config.memory, config.memory.residual and config.reads_memory(layer)
        self.alpha = nn.Parameter(torch.empty(())) if config.residual_scalars else None
        self.beta = nn.Parameter(torch.empty(())) if config.residual_scalars else None
        self.gamma = nn.Parameter(torch.empty(())) if reads and memory.recurrent else None
        self.shift_gamma = nn.Parameter(torch.empty(())) if reads and memory.shifted else None

    def forward(self, x: StreamBND, x0: StreamBND, memories: Memories) -> StreamBND:
        pairs = ((self.gamma, memories.recurrent), (self.shift_gamma, memories.shift))
        added = [(gamma, m) for gamma, m in pairs if gamma is not None and m is not None]
        if self.alpha is None or self.beta is None:
            for gamma, m in added:
                x = torch.addcmul(x, gamma, m)
            return x
        gammas, terms = zip(*added, strict=True) if added else ((), ())
        return weighted_sum((self.alpha, self.beta, *gammas), (x, x0, *terms))


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
        gated, reads = memory.projection != "none", config.reads_memory(layer)
        self.gate = nn.Linear(config.gate_width, rows * config.k, bias=False) if gated and reads else None
        self.projection, self.shift_projection = _projections(config, memory.projection == "layerwise" and reads)

    def forward(
        self,
        a: StreamBND,
        tokens: TokensBN,
        memories: Memories,
        shared: Pair | None,
        rope: Rotary,
        seen: Sight,
        past: LayerPast,
    ) -> tuple[StreamBND, HeadsBKNE, HeadsBKNE]:
        q = self.query(a).unflatten(-1, self.heads).transpose(1, 2)
        k, v = self.keys_values(a, tokens, memories, shared)
        q, k = self._turned(q, self.query_norm, rope), self._turned(k.transpose(1, 2), self.key_norm, rope)
        v = v.transpose(1, 2)
        keys, values = past.parts(k, v) if isinstance(seen, tuple) else past.extend(k, v)
        out = attend(q, keys, values, seen)
        return self.output(out.transpose(1, 2).flatten(2)), k, v

    def _turned(self, x: HeadsBKNE, norm: Norm, rope: Rotary) -> HeadsBKNE:
        """Queries or keys with RoPE and their norm, in this model's order."""
        x = rotate(norm(x) if self.qk_norm == "before" else x, rope)
        return norm(x) if self.qk_norm == "after" else x

    def keys_values(self, a: StreamBND, tokens: TokensBN, memories: Memories, shared: Pair | None) -> Pair:
        """Local keys and values, gated, with the memory's and the value embedding's terms; [B, N, K, E] each."""
        k, v = (f(a).unflatten(-1, self.kv_heads) for f in (self.key, self.value))
        extra = self.value_embedding(tokens).unflatten(-1, self.kv_heads).to(v.dtype) if self.value_embedding else None
        if self.gate is None:
            return k, v if extra is None else v + extra
        gates = 2 * torch.sigmoid(self.gate(a[..., : self.gate_width]))
        local, recurrent, *embedded = gates.unflatten(-1, (-1, self.kv_heads[0], 1)).unbind(2)
        own = _projected(memories, (self.projection, self.shift_projection))
        pair = shared if own is None else own
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
        self.attention_norm, self.mlp_norm = (_stream_norm(config) for _ in range(2))

    def forward(
        self,
        x: StreamBND,
        x0: StreamBND,
        tokens: TokensBN,
        memories: Memories,
        shared: Pair | None,
        rope: Rotary,
        seen: Sight,
        past: LayerPast,
    ) -> tuple[StreamBND, HeadsBKNE, HeadsBKNE]:
        x = self.injection(x, x0, memories)
        attended, k, v = self.attention(self.attention_norm(x), tokens, memories, shared, rope, seen, past)
        x = x + attended
        return x + self.mlp(self.mlp_norm(x)), k, v


def _stream_norm(config: ModelConfig) -> Norm:
    return Norm(config.d if config.backbone.norm_weights else None, config.backbone.norm_eps)


class LRT(nn.Module):
    """The Latent Recurrent Transformer. Build it with `LRT.build`; `LRT(config)` leaves the weights uninitialised."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d)
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.depth))
        self.norm = _stream_norm(config)
        self.head = None if config.backbone.tied else nn.Linear(config.d, config.vocab_size, bias=False)
        self.projection, self.shift_projection = _projections(config, config.memory.projection == "shared")
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
        previous: TokensBN | None = None,
        *,
        top: bool = True,
    ) -> PassOutput:
        """Run one pass over N positions.

        Args:
            tokens: the tokens there, int64 [B, N].
            past: the positions, and what their queries see (`Buffer.past` or `KVCache.past`).
            memory: m_{t-1} for each of them, [B, N, D]; None is zero memory.
            starts: boolean [B, N], True at the first token of a document, where the memory is reset.
            previous: tokens at t-1 for each of them, [B, N], negative where there is none; a token shift needs them.
            top: whether the blocks above the source block run; without them there is no `hidden`.
        """
        eps, x0 = self.config.backbone.norm_eps, self.embedding(tokens)
        x0 = (rms_norm(x0, eps) if self.config.backbone.embedding_norm else x0).to(self.stream_dtype)
        memories = Memories(self._reset(memory, starts), self._shift(previous, starts))
        shared = _projected(memories, (self.projection, self.shift_projection))
        rope = rotary(past.queries, self.config.e, self.config.rope_theta, x0.dtype, self.config.backbone.rope)
        windows, sights = self.config.windows(), {}
        for window, layer in zip(windows, past.layers, strict=False):
            if window not in sights:  # layers of one window hold the same positions
                sights[window] = look(past, layer, window, self.execution.backend, x0)
        run, layers = self._runner(past)
        x = x0.clone() if self.execution.compile else x0  # one tensor given twice would be a graph of its own
        source, keys, values = x0 if self.config.source else self._normed(tokens), [], []
        for i in range(self.config.layers if top else self.config.source):
            block, seen = self.blocks[i % self.config.depth], sights[windows[i]]
            x, k, v = run(block, x, x0, tokens, memories, shared, rope, seen, layers[i])
            keys.append(k)
            values.append(v)
            source = rms_norm(x, eps) if i + 1 == self.config.source else source
        last = source if self.config.source == self.config.layers else x
        hidden = (self.norm.scale(last) if last is source else self.norm(last)) if top else None
        return PassOutput(hidden, source, tuple(keys), tuple(values))

    def logits(self, hidden: StreamBND) -> Tensor:
        """Next-token logits [.., V], soft-capped, in float32 at least."""
        z = F.linear(hidden, self.unembedding)
        z = z.float() if z.dtype != torch.float64 else z
        cap = self.config.softcap
        return z if cap is None else cap * torch.tanh(z / cap)

    @property
    def unembedding(self) -> Tensor:
        """The head's matrix [V, D]: its own, or the embedding's."""
        return self.embedding.weight if self.head is None else self.head.weight

    @property
    def stream_dtype(self) -> torch.dtype:
        """Type of the residual stream: autocast's where it is on, else the parameters'."""
        device, dtype = self.device.type, self.embedding.weight.dtype
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else dtype

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.embedding.weight.device

    def starts(self, tokens: TokensBN) -> Tensor | None:
        """Where documents start: at every BOS token; boolean like `tokens`, or None if the model knows no BOS."""
        return None if self.config.bos is None else tokens == self.config.bos

    def memory_parameters(self) -> list[nn.Parameter]:
        """Parameters that take part only where memory is read: W_K, W_V and gamma, a token shift's too."""
        return [p for name, p in self.named_parameters() if "projection." in name or name.endswith("gamma")]

    def _runner(self, past: Past) -> tuple[Callable[..., tuple[StreamBND, HeadsBKNE, HeadsBKNE]], Sequence[LayerPast]]:
        """How blocks are called, and what their attention sees of the past, in the form that suits that."""
        compiled = self.execution.compile and bool(past.slices)
        run, layers = (_compiled(), [_joined(layer) for layer in past.layers]) if compiled else (_called, past.layers)
        if self.execution.recompute and torch.is_grad_enabled():
            run = partial(checkpoint, run, use_reentrant=False, preserve_rng_state=False)
        return run, layers

    def _reset(self, memory: StreamBND | None, starts: Tensor | None) -> StreamBND | None:
        if memory is None or not self.config.memory.recurrent:
            return None
        memory = memory if starts is None else memory.masked_fill(starts[..., None], 0)
        return memory.to(self.stream_dtype)

    def _shift(self, previous: TokensBN | None, starts: Tensor | None) -> StreamBND | None:
        """The memory of source block 0: what the previous token's embedding says, in every pass alike."""
        if not self.config.memory.shifted:
            return None
        assert previous is not None, "a model with a token shift needs the previous tokens"
        absent = previous < 0 if starts is None else (previous < 0) | starts
        return self._normed(previous.clamp(min=0)).masked_fill(absent[..., None], 0)

    def _normed(self, tokens: TokensBN) -> StreamBND:
        return rms_norm(self.embedding(tokens), self.config.backbone.norm_eps).to(self.stream_dtype)


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
    | head | normal, deviation 0.001 (0.02 where it is the embedding) |
    | output, mlp.down, gate, biases | 0: blocks start as the identity, gates at 2 sigmoid(0) = 1 |
    | weights of norms | 1 |
    | other matrices, value embeddings | uniform, deviation 1/sqrt(D) |
    | alpha, beta, gamma | 1, 0.1, 0.1 |
    | W_K, W_V of the memory, if it starts at `zero` | 0 |
    """
    random = torch.Generator(model.device).manual_seed(seed)
    bound, zero = math.sqrt(3 / model.config.d), model.config.memory.start == "zero"
    for name, p in model.named_parameters():
        kind = name.removesuffix(".weight").rsplit(".", 1)[-1]
        sharded = is_sharded(p)  # then it takes its rows of what one process alone would draw
        x = torch.empty(p.shape, device=p.device, dtype=p.dtype) if sharded else p
        if kind in ("alpha", "beta", "gamma", "shift_gamma"):
            x.fill_(1.0 if kind == "alpha" else 0.1)
        elif kind in ("embedding", "head"):
            wide = kind == "embedding" and not model.config.backbone.tied
            x.normal_(0, 1.0 if wide else 0.02 if kind == "embedding" else 0.001, generator=random)
        elif kind in ("output", "down", "gate", "bias") or (zero and "projection." in name):
            x.zero_()
        elif kind.endswith("norm"):
            x.fill_(1.0)
        else:
            x.uniform_(-bound, bound, generator=random)
        if sharded:
            fill(p, x)
