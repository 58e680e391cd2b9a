"""The oracle: the same model as a plain loop over tokens, layers and heads, straight from SPEC section 2.

It shares no code with the model, only its weights by name. Slow on purpose; tests compare everything with it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lrt.model_config import ModelConfig


class Trace(NamedTuple):
    """What the loop computes for one sequence of T tokens."""

    logits: Tensor
    """[T, V]"""
    memory: Tensor
    """m_t, [T, D]"""


def _norm(x: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).mean() + 1e-6)


def _rotate(x: Tensor, position: int, theta: float) -> Tensor:
    half = len(x) // 2
    out = x.clone()
    for i in range(half):
        angle = position * theta ** (-2 * i / len(x))
        a, b = x[i], x[i + half]
        out[i], out[i + half] = a * math.cos(angle) + b * math.sin(angle), b * math.cos(angle) - a * math.sin(angle)
    return out


def reference(weights: dict[str, Tensor], config: ModelConfig, tokens: list[int]) -> Trace:
    """Decode `tokens` one at a time from position 0 with memory; the memory is reset at every BOS token."""
    past: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(config.depth)]
    logits, memories, memory = [], [], torch.zeros(config.d, dtype=weights["head.weight"].dtype)
    for t, token in enumerate(tokens):
        if token == config.bos:
            memory = torch.zeros_like(memory)
        x, memory = _token(weights, config, token, t, memory, past)
        z = weights["head.weight"] @ _norm(x)
        logits.append(config.softcap * torch.tanh(z / config.softcap) if config.softcap else z)
        memories.append(memory)
    return Trace(torch.stack(logits), torch.stack(memories))


def _token(
    w: dict[str, Tensor], config: ModelConfig, token: int, t: int, memory: Tensor, past: list
) -> tuple[Tensor, Tensor]:
    x = x0 = _norm(w["embedding.weight"][token])
    written = memory
    for layer in range(config.depth):
        name = f"blocks.{layer}."
        if config.residual_scalars:
            x = w[name + "injection.alpha"] * x + w[name + "injection.beta"] * x0
        if config.memory.residual:
            x = x + w[name + "injection.gamma"] * memory
        x = x + _attention(w, config, layer, _norm(x), token, t, memory, past[layer])
        up = torch.relu(w[name + "mlp.up.weight"] @ _norm(x))
        x = x + w[name + "mlp.down.weight"] @ (up * up)
        if layer + 1 == config.source:
            written = _norm(x)
    return x, written


def _attention(
    w: dict[str, Tensor], config: ModelConfig, layer: int, a: Tensor, token: int, t: int, memory: Tensor, past: list
) -> Tensor:
    name, e, heads = f"blocks.{layer}.attention.", config.e, config.k
    k, v = w[name + "key.weight"] @ a, w[name + "value.weight"] @ a
    embedded = w[name + "value_embedding.weight"][token] if config.has_value_embedding(layer) else torch.zeros_like(v)
    mode = config.memory.projection
    if mode != "none":
        where = "projection." if mode == "shared" else name + "projection."
        mk, mv = w[where + "key.weight"] @ memory, w[where + "value.weight"] @ memory
        g = 2 / (1 + torch.exp(-(w[name + "gate.weight"] @ a[: config.gate_width])))
        g = torch.cat((g, torch.ones(heads, dtype=g.dtype))).repeat_interleave(e).split(heads * e)
        k, v, embedded = g[0] * k + g[1] * mk, g[0] * v + g[1] * mv, g[2] * embedded
    keys = torch.cat([_norm(_rotate(part, t, config.rope_theta)) for part in k.split(e)])
    past.append((keys, v + embedded))
    window, out = config.windows()[layer], []
    seen = past if window is None else past[max(0, t - window + 1) :]
    for head, q in enumerate((w[name + "query.weight"] @ a).split(e)):
        mine = slice((head // (config.h // heads)) * e, (head // (config.h // heads)) * e + e)
        q = _norm(_rotate(q, t, config.rope_theta))
        scores = torch.stack([q @ key[mine] / math.sqrt(e) for key, _ in seen])
        out.append(torch.stack([value[mine] for _, value in seen]).T @ torch.softmax(scores, 0))
    return w[name + "output.weight"] @ torch.cat(out)
