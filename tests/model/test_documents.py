"""Attention confined to documents: a packed document computes what it does alone, in training, prefill and decoding."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from helpers import config, label, near, randomised
from torch import Tensor

from lrt.config.decoding import PrefillOptions
from lrt.config.model import Execution, ModelConfig
from lrt.inference.generate import score
from lrt.inference.prefill import compiled, decode_step, prefill
from lrt.model.kv_cache import KVCache
from lrt.model.loss import ScheduledLoss
from lrt.model.lrt import LRT
from lrt.model.recurrence import advance
from lrt.model.reference import reference
from lrt.schedule import Schedule

CONFIG = config(document_attention=True)
MODELS = [
    CONFIG,
    config(document_attention=True, projection="shared", source=3, window_pattern="L"),
    config(document_attention=True, shift=True, kv_heads=1),
]
models = pytest.mark.parametrize("cfg", MODELS, ids=label)
BEGINS = [[0, 5, 6], [3], [0, 9]]
"""Where documents start in each row; what comes before the first one is a document without BOS."""
LENGTH = 13


def rows(cfg: ModelConfig) -> Tensor:
    ids = torch.randint(1, cfg.vocab_size, (len(BEGINS), LENGTH), generator=torch.Generator().manual_seed(3))
    for row, begins in zip(ids, BEGINS, strict=True):
        row[begins] = 0
    return ids


def documents(ids: Tensor) -> list[Tensor]:
    """Each as a row of its own, [1, n]."""
    found = []
    for row, begins in zip(ids, BEGINS, strict=True):
        edges = sorted({0, *begins, LENGTH})
        found += [row[None, a:b] for a, b in itertools.pairwise(edges)]
    return found


def gradients(model: LRT, text: str, parts: list[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """The summed nats of a schedule over all parts, and their gradients."""
    model.zero_grad()
    loss = ScheduledLoss(model, Schedule.parse(text))
    total = torch.zeros((), dtype=torch.float64)
    for ids in parts:
        total = total + loss(ids, ids.roll(2, 0) if len(ids) > 2 else (ids + 1) % 19).loss * ids.numel()
    total.backward()
    return total.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@models
@pytest.mark.parametrize("attention", ["masked", "auto"])
@pytest.mark.parametrize("text", ["parallel", "refinement-2", "settled-2", "sequential"])
def test_a_packed_document_trains_as_it_does_alone(text: str, attention, cfg: ModelConfig, monkeypatch):
    """Loss and every gradient; strided passes are left out, whose slices lie otherwise in a document alone."""
    monkeypatch.setattr("lrt.model.transformer.BLOCK", 3)
    model, ids = randomised(cfg), rows(cfg)
    model.execution = Execution(attention=attention)
    loss = ScheduledLoss(model, Schedule.parse(text))
    total = loss(ids, (ids + 1) % 19).loss * ids.numel()
    total.backward()
    packed = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    alone, grads = gradients(model, text, documents(ids))
    torch.testing.assert_close(total.detach(), alone, rtol=1e-12, atol=0)
    torch.testing.assert_close(packed, grads, rtol=1e-9, atol=1e-9)
    crossing = randomised(config(**{"document_attention": False} | overrides(cfg)))
    other, _ = gradients(crossing, text, [ids[:1]])
    assert not torch.isclose(other, gradients(model, text, [ids[:1]])[0])  # the option does something


def overrides(cfg: ModelConfig) -> dict:
    m = cfg.memory
    memory = {"projection": m.projection, "source": m.source, "shift": m.shift}
    return {"window_pattern": cfg.window_pattern, "kv_heads": cfg.kv_heads} | memory


@models
@pytest.mark.parametrize("mode", ["exact", "jacobi", "interleaved-3"])
@pytest.mark.parametrize("chunk", [4, 64])
def test_scores_are_those_of_the_oracle_in_every_mode(mode: str, chunk: int, cfg: ModelConfig):
    """Chunks that begin inside documents, and documents that begin inside chunks."""
    model, ids = randomised(cfg), rows(cfg)
    targets = (ids + 1) % 19
    nats = score(model, ids, targets, mode=PrefillOptions.parse(mode, 0.0, 64, chunk)).nats
    for row in range(len(ids)):
        logits = reference(dict(model.state_dict()), cfg, ids[row].tolist()).logits
        expected = -logits.log_softmax(-1).gather(1, targets[row, :, None])[:, 0]
        torch.testing.assert_close(nats[row], expected, rtol=1e-9, atol=1e-9)


@models
def test_decoding_goes_on_within_the_document(cfg: ModelConfig, tmp_path: Path):
    """After a prefill, through rows that wait, a saved and loaded state, a fork and a new document."""
    model, ids = randomised(cfg), rows(cfg)
    expected = [reference(dict(model.state_dict()), cfg, row.tolist()).logits for row in ids]
    lengths = torch.tensor([5, 7, 2])
    cache = prefill(model, ids, lengths=lengths, capacity=LENGTH, mode="exact").cache
    assert cache.document_start.tolist() == [0, 3, 0]
    cache.save(tmp_path / "state")
    cache = KVCache.load(tmp_path / "state").take(torch.tensor([2, 0, 1]))
    order = [2, 0, 1]
    while bool((cache.length < LENGTH).any()):
        active = cache.length < LENGTH
        at = cache.length.clamp(max=LENGTH - 1)
        logits, cache = decode_step(model, ids[torch.tensor(order), at], cache, active)
        for i, r in enumerate(order):
            assert not active[i] or near(logits[i], expected[r][at[i]])
    assert cache.document_start.tolist() == [9, 6, 3]
    assert cache.clear(0).document_start.tolist() == [0, 6, 3]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_step_keeps_to_the_document():
    model, ids, run = randomised(CONFIG), rows(CONFIG), compiled()
    expected = [reference(dict(model.state_dict()), CONFIG, row.tolist()).logits for row in ids]
    cache = KVCache.empty(model, len(ids), LENGTH)
    for t in range(LENGTH):
        with torch.no_grad():
            logits, cache = advance(model, ids[:, t], cache, None, run)
        for row in range(len(ids)):
            assert near(logits[row], expected[row][t])
