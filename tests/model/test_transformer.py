"""The model by itself: initialisation, construction without memory, options, types, what a pass returns."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from helpers import CORNERS, VARIANTS, config, fixed, label, packed, randomised
from torch import Tensor

from lrt.config.model import MEMORY_OFF, MemoryConfig, ModelConfig
from lrt.config.recipes import RECIPES
from lrt.model.loss import ScheduledLoss
from lrt.model.lrt import LRT
from lrt.model.state import Buffer
from lrt.schedule import Schedule

WIDE = ModelConfig(depth=2, width=128, heads=2, vocab_size=300, value_embeddings="all", memory=MemoryConfig(source=1))


def parallel(model: LRT, ids: Tensor, **options):
    """One pass over all positions; `memory` is what it reads."""
    read, _ = Buffer().open(None, ids, model.config.blocks_run())
    return model.forward_pass(ids, read._replace(memory=options.pop("memory", None)), **options)


# Initialisation: the table of `initialise`.


def expected_start(name: str, d: int, start: str = "uniform") -> tuple[float, float]:
    """Mean and standard deviation by parameter."""
    if start == "zero" and "projection." in name:
        return 0.0, 0.0
    if name.endswith(("alpha", "beta", "gamma")):
        return (1.0 if name.endswith("alpha") else 0.1), 0.0
    if name in ("embedding.weight", "head.weight"):
        return 0.0, 1.0 if name == "embedding.weight" else 0.001
    zero = name.endswith(("output.weight", "down.weight", "gate.weight"))
    return 0.0, 0.0 if zero else 1 / math.sqrt(d)


@pytest.mark.parametrize("start", ["uniform", "zero"])
@pytest.mark.parametrize("projection", ["layerwise", "shared", "none"])
def test_initialisation_table(projection, start):
    memory = MemoryConfig(projection=projection, source=1, shift=True, start=start)
    model = LRT(replace(WIDE, memory=memory))
    for name, p in model.named_parameters():
        mean, deviation = expected_start(name, 128, start)
        slack = 5 * deviation / math.sqrt(p.numel())
        assert abs(p.mean().item() - mean) <= slack + 1e-7, name
        assert abs(p.std(correction=0).item() - deviation) <= slack, name
        if deviation == 1 / math.sqrt(128):
            assert p.abs().max() <= math.sqrt(3 / 128), name  # uniform


def test_blocks_start_as_the_identity_with_neutral_gates():
    model, ids = LRT(WIDE), packed(WIDE, 2, 6)
    plain = LRT(replace(WIDE, memory=MEMORY_OFF))
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if k in plain.state_dict()})
    hidden = parallel(model, ids).hidden
    x = torch.nn.functional.rms_norm(model.embedding(ids), (128,), eps=1e-6)
    torch.testing.assert_close(hidden, x, rtol=1e-4, atol=1e-5)  # alpha x + beta x0, normalised again
    torch.testing.assert_close(hidden, parallel(plain, ids).hidden)


def test_build_is_a_function_of_the_seed():
    first, again, other = (LRT(WIDE, seed=seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    drawn = [name for name in first if first[name].ndim and first[name].std() > 0]
    assert drawn
    assert not any(torch.equal(first[name], other[name]) for name in drawn)
    state = torch.get_rng_state()
    LRT(WIDE, seed=5)
    assert torch.equal(torch.get_rng_state(), state)  # a generator of its own


@pytest.mark.parametrize(("name", "billions"), [("d20_paper", 1.320), ("d24_paper", 1.994)])
def test_large_models_are_constructed_without_memory(name: str, billions: float):
    with torch.device("meta"):
        model = LRT(RECIPES[name]().model)
    assert all(p.is_meta for p in model.parameters())
    assert not list(model.buffers())
    assert round(sum(p.numel() for p in model.parameters()) / 1e9, 3) == billions


# Options.


@pytest.mark.parametrize("cfg", VARIANTS + CORNERS, ids=label)
def test_parameters_are_there_only_where_an_option_needs_them(cfg: ModelConfig):
    names = set(fixed(cfg).state_dict())
    memory = cfg.memory
    for gamma, there in (("injection.gamma", memory.recurrent), ("shift_gamma", memory.shifted)):
        assert any(gamma in n for n in names) == (memory.residual and there)
    assert any("alpha" in n or "beta" in n for n in names) == cfg.residual_scalars
    for name, there in (("projection.key.weight", memory.recurrent), ("shift_projection.key.weight", memory.shifted)):
        assert (name in names) == (memory.projection == "shared" and there)
    for i in range(cfg.depth):
        own = {n.removeprefix(f"blocks.{i}.attention.") for n in names if n.startswith(f"blocks.{i}.attention.")}
        reads = memory.blocks is None or memory.blocks[0] <= i + 1 <= memory.blocks[1]
        for name, there in (("projection", memory.recurrent), ("shift_projection", memory.shifted)):
            assert (f"{name}.value.weight" in own) == (memory.projection == "layerwise" and reads and there)
        assert ("gate.weight" in own) == (memory.projection != "none" and reads)
        assert (f"blocks.{i}.injection.gamma" in names) == (memory.residual and reads and memory.recurrent)
        assert ("value_embedding.weight" in own) == cfg.has_value_embedding(i)


@pytest.mark.parametrize("cfg", VARIANTS + CORNERS, ids=label)
def test_memory_parameters_are_those_that_a_pass_without_memory_does_not_use(cfg: ModelConfig):
    model, ids = randomised(cfg), packed(cfg, 2, 8)
    written = parallel(model, ids)
    written.hidden.pow(3).sum().backward()
    model.logits(written.hidden.detach()).sum().backward()
    unused = {name for name, p in model.named_parameters() if p.grad is None}
    listed = {id(p) for p in model.memory_parameters()}
    assert unused == {name for name, p in model.named_parameters() if id(p) in listed and "shift" not in name}


def test_windows_and_value_embeddings_by_layer():
    cfg = ModelConfig(depth=8, context=64, window_pattern="SSSL")
    assert cfg.windows() == (32, 32, 32, None) * 2
    assert ModelConfig(depth=4, context=64, window_pattern="S", window=5).windows() == (5, 5, 5, None)
    assert [replace(cfg, value_embeddings="alternating").has_value_embedding(i) for i in range(8)] == [False, True] * 4
    assert [replace(cfg, depth=3, value_embeddings="alternating").has_value_embedding(i) for i in range(3)] == [1, 0, 1]
    assert all(replace(cfg, value_embeddings="all").has_value_embedding(i) for i in range(8))


def test_a_window_hides_what_is_further_away():
    """One layer deep a token reaches exactly `window - 1` positions ahead; the last layer sees everything."""
    cfg = config(depth=2, window_pattern="S", window=3, source=1)
    model, ids = fixed(cfg), packed(cfg, 1, 8).repeat(2, 1)
    ids[1, 1] = ids[0, 1] % 18 + 1
    written = parallel(model, ids)
    source, hidden = (a.sub(b).abs().amax(-1) > 1e-9 for a, b in (x.chunk(2) for x in (written.memory, written.hidden)))
    assert source[0].tolist() == [False, True, True, True, False, False, False, False]
    assert hidden[0].tolist() == [False] + [True] * 7


@pytest.mark.parametrize("window", [1, 3, 7])
def test_a_prefix_of_a_row_computes_a_prefix_of_its_states(window: int):
    """Rows shorter than, as long as and longer than the window take different paths to the same attention."""
    cfg = config(window_pattern="SSL", window=window)
    model, ids = fixed(cfg), packed(cfg, 1, 9)
    whole = parallel(model, ids).hidden
    for length in range(1, 9):
        torch.testing.assert_close(parallel(model, ids[:, :length]).hidden, whole[:, :length])


def test_softcap_bounds_logits_and_none_leaves_them():
    capped, free = fixed(config(softcap=0.5)), fixed(config(softcap=None))
    hidden = torch.randn(2, 3, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 5
    torch.testing.assert_close(capped.logits(hidden), 0.5 * torch.tanh(free.logits(hidden) / 0.5))
    assert capped.logits(hidden).abs().max() <= 0.5 < free.logits(hidden).abs().max()
    torch.testing.assert_close(free.logits(hidden), hidden @ free.head.weight.T)


def test_the_memory_is_the_normalised_stream_after_the_source_block():
    cfg = config(source=2, value_embeddings="all")
    model, ids = fixed(cfg), packed(cfg, 2, 8)
    memory = torch.randn(2, 8, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    short = LRT(replace(cfg, depth=2, window_pattern="SL"[: cfg.depth])).double()
    short.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("blocks.2.")})
    whole, below = parallel(model, ids, memory=memory), parallel(short, ids, memory=memory)
    torch.testing.assert_close(whole.memory, below.memory)
    torch.testing.assert_close(below.memory, below.hidden)
    torch.testing.assert_close(whole.memory.square().mean(-1), torch.ones(2, 8).double(), rtol=1e-4, atol=0)


def test_a_pass_without_the_top_has_no_hidden_state_and_the_same_memory():
    model, ids = fixed(config()), packed(config(), 2, 8)
    top, low = parallel(model, ids), parallel(model, ids, top=False)
    assert low.hidden is None
    assert (len(top.keys), len(low.keys)) == (3, 2)
    assert torch.equal(top.memory, low.memory)


def test_a_vector_of_starts_resets_exactly_those_positions():
    model, ids = fixed(config(window_pattern="L")), packed(config(), 2, 8)
    memory = torch.randn(2, 8, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    starts = torch.zeros(2, 8, dtype=torch.bool)
    starts[0, 5] = starts[1, 2] = True
    reset = parallel(model, ids, memory=memory, starts=starts).hidden
    by_hand = memory.clone()
    by_hand[0, 5] = by_hand[1, 2] = 0
    torch.testing.assert_close(reset, parallel(model, ids, memory=by_hand).hidden)
    assert memory.abs().min() > 0  # the caller's tensor is left alone


def test_starts_are_at_bos():
    ids = torch.tensor([[3, 0, 2], [0, 0, 1]])
    assert fixed(config()).starts(ids).tolist() == [[False, True, False], [True, True, False]]
    assert fixed(config(bos=None)).starts(ids) is None


# Number types.


@pytest.mark.parametrize("cfg", [config(), config(projection="shared", source=3)], ids=label)
def test_autocast_runs_in_bfloat16_and_scores_in_float32(cfg: ModelConfig):
    model, ids = randomised(cfg, scale=0.3).float(), packed(cfg, 2, 8)
    loss = ScheduledLoss(model, Schedule.parse("interleaved-2:settle=1"))
    exact = loss(ids, ids).loss
    with torch.autocast("cpu", torch.bfloat16):
        written = parallel(model, ids)
        coarse = loss(ids, ids).loss
    assert {x.dtype for x in (written.memory, *written.keys, *written.values)} == {torch.bfloat16}
    assert coarse.dtype == torch.float32
    assert abs(coarse - exact) < 0.05 * exact
    assert coarse != exact
    coarse.backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


def test_logits_are_float32_whatever_the_model():
    model = LRT(config()).bfloat16()
    hidden = torch.randn(2, 24, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert model.logits(hidden).dtype == torch.float32
    assert fixed(config()).logits(hidden.double()).dtype == torch.float64


def test_float32_and_float64_agree():
    model, ids = randomised(config(), scale=0.3), packed(config(), 2, 8)
    fine = parallel(model, ids).hidden
    coarse = parallel(model.float(), ids).hidden
    assert coarse.dtype == torch.float32
    torch.testing.assert_close(coarse.double(), fine, rtol=1e-4, atol=1e-4)
