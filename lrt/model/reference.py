"""The oracle: the same model as a plain loop over tokens, layers and heads, straight from docs/method.md#injection.

It shares no code with the model, only its weights by name. Slow on purpose; tests compare everything with it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lrt.config.model import ModelConfig


class Trace(NamedTuple):
    """What the loop computes for one sequence of T tokens."""

    logits: Tensor
    """[T, V]"""
    memory: Tensor
    """m_t, [T, D]"""


class Position(NamedTuple):
    """What the loop knows at one position."""

    token: int
    t: int
    read: dict[str, Tensor]
    """The memories that are read, [D], by the prefix of their weights' names."""
    past: list[list[tuple[Tensor, Tensor]]]
    """Keys and values of the positions so far, by layer; each layer adds its own."""


def _norm(x: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x * x).mean() + eps)


def _learned(w: dict[str, Tensor], name: str, x: Tensor, eps: float) -> Tensor:
    return _norm(x, eps) * w[name + ".weight"] if name + ".weight" in w else _norm(x, eps)


def _linear(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    y = w[name + ".weight"] @ x
    return y + w[name + ".bias"] if name + ".bias" in w else y


def _speed(config: ModelConfig, pair: int) -> float:
    """Radians per position of a pair of channels."""
    scaling, speed = config.backbone.rope, config.rope_theta ** (-2 * pair / config.e)
    if scaling.kind == "linear":
        return speed / scaling.factor
    if scaling.kind == "llama3":
        turns = scaling.original * speed / (2 * math.pi)
        if turns <= scaling.low:
            return speed / scaling.factor
        if turns < scaling.high:
            share = (turns - scaling.low) / (scaling.high - scaling.low)
            return share * speed + (1 - share) * speed / scaling.factor
    return speed


def _rotate(x: Tensor, position: int, config: ModelConfig) -> Tensor:
    half = len(x) // 2
    out = x.clone()
    for i in range(half):
        angle = position * _speed(config, i)
        a, b = x[i], x[i + half]
        out[i], out[i + half] = a * math.cos(angle) + b * math.sin(angle), b * math.cos(angle) - a * math.sin(angle)
    return out


def reference(weights: dict[str, Tensor], config: ModelConfig, tokens: list[int]) -> Trace:
    """Decode `tokens` one at a time from position 0 with memory; the memory is reset at every BOS token.

    With document attention the keys and values of earlier documents are forgotten there too.
    """
    past: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(config.layers)]
    logits, memories, memory = [], [], torch.zeros(config.d, dtype=weights["embedding.weight"].dtype)
    for t, token in enumerate(tokens):
        previous = None if t == 0 or token == config.bos else tokens[t - 1]
        if token == config.bos:
            memory = torch.zeros_like(memory)
            past = [[] for _ in range(config.layers)] if config.document_attention else past
        read = _memories(weights, config, previous, memory)
        x, memory = _token(weights, config, Position(token, t, read, past))
        logits.append(_logits(weights, config, x))
        memories.append(memory)
    return Trace(torch.stack(logits), torch.stack(memories))


def _logits(w: dict[str, Tensor], config: ModelConfig, x: Tensor) -> Tensor:
    z = w["embedding.weight" if config.backbone.tied else "head.weight"] @ _learned(
        w, "norm", x, config.backbone.norm_eps
    )
    return config.softcap * torch.tanh(z / config.softcap) if config.softcap else z


def _memories(w: dict[str, Tensor], config: ModelConfig, previous: int | None, memory: Tensor) -> dict[str, Tensor]:
    """What a position reads; `previous` is the token at t-1, None at the start of a document."""
    shift = torch.zeros_like(memory)
    if previous is not None:
        shift = _norm(w["embedding.weight"][previous], config.backbone.norm_eps)
    read = {"": memory} if config.memory.source != 0 else {}
    return read | ({"shift_": shift} if config.memory.source == 0 or config.memory.shift else {})


def _token(w: dict[str, Tensor], config: ModelConfig, position: Position) -> tuple[Tensor, Tensor]:
    """The stream after the last block, and m_t."""
    back = config.backbone
    x = w["embedding.weight"][position.token]
    written = _norm(x, back.norm_eps)
    x = x0 = _norm(x, back.norm_eps) if back.embedding_norm else x
    for layer in range(config.layers):
        name = f"blocks.{layer % config.depth}."
        if config.residual_scalars:
            x = w[name + "injection.alpha"] * x + w[name + "injection.beta"] * x0
        x = x + sum(
            (_injected(w, config, name + f"injection.{which}gamma", x, m) for which, m in position.read.items()), 0 * x
        )
        a = _learned(w, name + "attention_norm", x, back.norm_eps)
        x = x + _attention(w, config, layer, a, position)
        a = _learned(w, name + "mlp_norm", x, back.norm_eps)
        up = _linear(w, name + "mlp.up", a)
        if back.mlp == "swiglu":
            glu = _linear(w, name + "mlp.glu", a)
            up = up * glu / (1 + torch.exp(-glu))
        else:
            up = torch.relu(up) ** 2
        x = x + _linear(w, name + "mlp.down", up)
        if layer + 1 == config.source:
            written = _norm(x, back.norm_eps)
    return x, written


def _injected(w: dict[str, Tensor], config: ModelConfig, gamma: str, x: Tensor, m: Tensor) -> Tensor:
    """What the stream takes in of one memory."""
    if gamma not in w or not m.any():
        return torch.zeros_like(x)
    if config.memory.injection == "scaled":
        return w[gamma] * m
    long = torch.sqrt((x * x).mean() + config.backbone.norm_eps) * m
    return w[gamma] * (long if config.memory.injection == "matched" else long - x)


def _attention(w: dict[str, Tensor], config: ModelConfig, layer: int, a: Tensor, position: Position) -> Tensor:
    block, past, t = layer % config.depth, position.past[layer], position.t
    name, e, heads = f"blocks.{block}.attention.", config.e, config.k
    q, k, v = (_linear(w, name + part, a) for part in ("query", "key", "value"))
    embedded = (
        w[name + "value_embedding.weight"][position.token] if config.has_value_embedding(block) else torch.zeros_like(v)
    )
    mode, window = config.memory.projection, config.memory.blocks or (1, config.depth)
    if mode != "none" and window[0] <= block + 1 <= window[1]:
        where, terms = "" if mode == "shared" else name, {} if mode == "gates" else position.read
        mk, mv = (
            sum((w[f"{where}{which}projection.{x}.weight"] @ m for which, m in terms.items()), torch.zeros_like(v))
            for x in ("key", "value")
        )
        g = 2 / (1 + torch.exp(-(w[name + "gate.weight"] @ a[: config.gate_width])))
        g = torch.cat((g, torch.ones(heads, dtype=g.dtype))).repeat_interleave(e).split(heads * e)
        k, v, embedded = g[0] * k + g[1] * mk, g[0] * v + g[1] * mv, g[2] * embedded
    keys = torch.cat([_turned(w, config, name + "key_norm", part, t) for part in k.split(e)])
    past.append((keys, v + embedded))
    window, out = config.windows()[block], []
    seen = past if window is None else past[-window:]
    for head, part in enumerate(q.split(e)):
        mine = slice((head // (config.h // heads)) * e, (head // (config.h // heads)) * e + e)
        one = _turned(w, config, name + "query_norm", part, t)
        scores = torch.stack([one @ key[mine] / math.sqrt(e) for key, _ in seen])
        out.append(torch.stack([value[mine] for _, value in seen]).T @ torch.softmax(scores, 0))
    return _linear(w, name + "output", torch.cat(out))


def _turned(w: dict[str, Tensor], config: ModelConfig, norm: str, x: Tensor, t: int) -> Tensor:
    eps = config.backbone.norm_eps
    if config.backbone.qk_norm == "before":
        return _rotate(_learned(w, norm, x, eps), t, config)
    x = _rotate(x, t, config)
    return _norm(x, eps) if config.backbone.qk_norm == "after" else x
