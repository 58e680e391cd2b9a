"""Looking inside: what the memory does to every token of a text."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from lrt.config.decoding import PrefillOptions
from lrt.evaluation.bits_per_byte import bits_per_byte, target_bytes
from lrt.inference.batch import Ranked, ranked
from lrt.inference.sampling import token_logprobs
from lrt.model.blocks import Attention, Block, BlockContext, Memories, ResidualInjection
from lrt.model.lrt import LRT
from lrt.model.recurrence import states
from lrt.schedule import Curriculum
from lrt.serve.engine import Lane
from lrt.serve.text import Vocabulary
from lrt.utils.hooks import while_hooked

KINDS = ("residual", "key", "value")


class Strengths:
    """How much the memory adds to what is there without it, per layer and position, while passes run under `watch`.

    residual: |gamma m| / |alpha x + beta x0|; key, value: |g_memory W m| / |the same without memory|, over all heads.
    Taken as differences between the model's own formulas with memory and without it; the last pass over a position
    stands, which is the settled one.
    """

    def __init__(self, model: LRT, length: int):
        self.model = model
        self.values = {kind: torch.zeros(model.config.depth, length) for kind in KINDS}

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Record the passes of one row that run inside."""
        hooks = []
        for layer, block in enumerate(self.model.blocks):
            assert isinstance(block, Block)
            hooks += [part.register_forward_pre_hook(self._seen(layer)) for part in (block.injection, block.attention)]
        with while_hooked(hooks):
            yield

    def _seen(self, layer: int):
        def hook(part: nn.Module, inputs: tuple[Tensor, BlockContext]) -> None:
            x, context = inputs
            positions, unaided = context.positions.reshape(-1), context._replace(memories=Memories(), projected=None)
            if isinstance(part, ResidualInjection):
                self._record(layer, "residual", positions, part.forward(x, context), part.forward(x, unaided))
            elif isinstance(part, Attention):
                pairs = zip(part.keys_values(x, context), part.keys_values(x, unaided), strict=True)
                for kind, (with_memory, without) in zip(("key", "value"), pairs, strict=True):
                    self._record(layer, kind, positions, with_memory.flatten(2), without.flatten(2))

        return hook

    def _record(self, layer: int, kind: str, positions: Tensor, with_memory: Tensor, without: Tensor) -> None:
        strength = (with_memory - without).norm(dim=-1) / without.norm(dim=-1).clamp(min=1e-12)
        self.values[kind][layer, positions.cpu()] = strength[0].float().cpu()


def trained_without_memory(schedule: str, length: int) -> bool:
    """Whether some pass with loss read no memory: the first pass of a schedule never has any to read."""
    return any(s.passes(length)[0].weight > 0 for s, _ in Curriculum.parse(schedule).shares())


def inspect(model: LRT, words: Vocabulary, ids: list[int], top: int, mode: str | PrefillOptions) -> Lane:
    """Score `ids` [T] decoded and with the memory reset at every token; `mode` is one of `states`.

    Returns plain data: tokens with both log-probabilities (nats) and alternatives, BPB in both modes, strengths by
    layer and by the position that predicts the token.
    """
    strengths = Strengths(model, len(ids) - 1)
    decoded = yield from score(model, ids, top, mode, strengths if model.config.memory.on else None)
    zero = yield from score(model, ids, top, "zero_memory")
    sizes = target_bytes(words.tokenizer, *(torch.tensor(x) for x in (ids[:-1], ids[1:])))
    bpb = {}
    for name, rows in (("decoded", decoded), ("zero", zero)):
        bits = bits_per_byte(torch.tensor([-p for p, _ in rows]), sizes)
        bpb[name] = bits if math.isfinite(bits) else None
    tokens = [
        {"id": i, "text": words.spell(i), "bytes": list(words.tokenizer.decode_bytes([i]))}
        | {"decoded": _spelled(words, d), "zero": _spelled(words, z)}
        for i, d, z in zip(ids[1:], decoded, zero, strict=True)
    ]
    rounded = {kind: [[round(x, 5) for x in row] for row in rows.tolist()] for kind, rows in strengths.values.items()}
    return {"tokens": tokens, "bpb": bpb, "strength": rounded}


def _spelled(words: Vocabulary, scored: tuple[float, Ranked]) -> dict[str, Any]:
    value, best = scored
    return {"logprob": value, "top": [[words.spell(token), p] for token, p in best]}


def score(model: LRT, ids: list[int], top: int, mode: str | PrefillOptions, strengths: Strengths | None = None) -> Lane:
    """Log-probability and alternatives of every token of `ids` but the first; `mode` is one of `states`."""
    scored: list[tuple[float, Ranked]] = []
    passes = states(model, torch.tensor([ids[:-1]], device=model.device), mode) if len(ids) > 1 else iter(())
    while True:
        with strengths.watch() if strengths else nullcontext():
            solved = next(passes, None)
        if solved is None:
            return scored
        first, hidden, _ = solved
        targets = ids[first + 1 : first + 1 + hidden.shape[1]]
        logits = model.logits(hidden[0])
        values = token_logprobs(logits, torch.tensor(targets, device=logits.device))
        if not values.isfinite().all():
            raise FloatingPointError("the model's logits are not finite")
        best = ranked(logits, [top] * len(targets)) if top else [()] * len(targets)
        scored += zip(values.tolist(), best, strict=True)
        yield
