"""Memory that is off, zero or absent: the plain transformer, gates alone, loops. In float64, every parameter drawn."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from helpers import (
    CORNERS,
    VARIANTS,
    config,
    differ,
    fixed,
    label,
    near,
    outcome,
    packed,
    passes,
    same,
)

from lrt.config.model import MEMORY_OFF, ModelConfig
from lrt.model.lrt import LRT
from lrt.model.state import Buffer

NEUTRAL = ("gate.weight", "gamma", "projection.key.weight", "projection.value.weight")
with_memory = pytest.mark.parametrize("cfg", VARIANTS + CORNERS[:-1], ids=label)
recurrent = pytest.mark.parametrize("cfg", [c for c in VARIANTS + CORNERS if c.memory.recurrent], ids=label)


@with_memory
def test_zeroed_memory_with_neutral_gates_is_the_plain_transformer(cfg: ModelConfig):
    model, plain = deepcopy(fixed(cfg)), LRT(replace(cfg, memory=MEMORY_OFF)).double()
    weights = {name: p.zero_() if name.endswith(NEUTRAL) else p for name, p in model.state_dict().items()}
    plain.load_state_dict({name: weights[name] for name in plain.state_dict()})
    assert plain.memory_parameters() == []
    assert set(weights) - set(plain.state_dict()) == {name for name in weights if name.endswith(NEUTRAL)}
    ids = packed(cfg, 2, 8)
    for text in ("refinement-2", "interleaved-3"):
        assert near(outcome(model, ids, passes(text, 8)).hidden, outcome(plain, ids, passes("parallel", 8)).hidden)


@recurrent
def test_absent_memory_is_zero_memory(cfg: ModelConfig):
    model, ids = fixed(cfg), packed(cfg, 2, 8)
    read, _ = Buffer().open(None, ids, cfg.blocks_run())
    zero = torch.zeros(2, 8, cfg.d, dtype=torch.float64)
    absent, given_zero, some = (model.forward_pass(ids, read._replace(memory=m)) for m in (None, zero, zero + 0.1))
    assert near(absent.hidden, given_zero.hidden)
    assert differ(absent.hidden, some.hidden).min() > 1e-6


def test_a_model_without_memory_ignores_one_that_is_given():
    model, ids = fixed(CORNERS[-1]), packed(CORNERS[-1], 2, 8)
    read, _ = Buffer().open(None, ids, range(3))
    memory = torch.ones(2, 8, 24, dtype=torch.float64)
    assert torch.equal(
        model.forward_pass(ids, read).hidden, model.forward_pass(ids, read._replace(memory=memory)).hidden
    )
    assert not any("projection" in name or "gamma" in name or "gate" in name for name in model.state_dict())


def test_gates_alone_are_the_lrt_whose_memory_is_always_zero():
    cfg = config(projection="layerwise", residual=True)
    model, ids = fixed(cfg), packed(cfg, 2, 9)
    gates = replace(cfg, memory=replace(cfg.memory, projection="gates", residual=False))
    control = LRT(gates).double()
    control.load_state_dict({k: v for k, v in model.state_dict().items() if k in control.state_dict()})
    alone = outcome(control, ids, passes("sequential", 9))
    assert near(alone.hidden, outcome(model, ids, passes("parallel", 9)).hidden)
    assert differ(alone.hidden, outcome(model, ids, passes("sequential", 9)).hidden).max() > 1e-3
    plain = LRT(replace(cfg, memory=MEMORY_OFF)).double()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if k in plain.state_dict()})
    assert differ(alone.hidden, outcome(plain, ids, passes("parallel", 9)).hidden).max() > 1e-3  # the gates count


def test_two_loops_are_the_same_blocks_twice():
    cfg = replace(config(depth=2, loops=2, value_embeddings="none"), memory=MEMORY_OFF)
    looped, ids = fixed(cfg), packed(cfg, 2, 9)
    deep = LRT(replace(cfg, depth=4, loops=1, window_pattern="SLSL")).double()
    weights = dict(looped.state_dict())
    weights |= {
        k.replace(f"blocks.{i}", f"blocks.{i + 2}"): v for i in (0, 1) for k, v in weights.items() if f"blocks.{i}" in k
    }
    deep.load_state_dict(weights)
    assert same(outcome(looped, ids, passes("sequential", 9)), outcome(deep, ids, passes("parallel", 9)))
