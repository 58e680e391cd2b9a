"""The proof of the core: every schedule, over any slices, computes what the per-token oracle does.

Reference = sequential schedule; T passes and T subsets end in sequential's states; a measured exact prefix is at least
the promised one; passes that stop early change nothing; causality; rows are independent; no memory at a document's
start; without memory the model is the plain transformer. In float64, every parameter drawn.
"""

from __future__ import annotations

from copy import deepcopy
from unittest.mock import patch

import pytest
import torch
from helpers import (
    BELOW,
    BOTH,
    CORNERS,
    SCHEDULES,
    SHIFT,
    TOLERANCE,
    VARIANTS,
    config,
    differ,
    fixed,
    label,
    near,
    outcome,
    packed,
    pass_lists,
    passes,
    randomised,
    same,
    slow_passes,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from lrt.config.model import ModelConfig
from lrt.model.kv_cache import KVCache
from lrt.model.lrt import LRT
from lrt.model.reference import reference
from lrt.model.run_passes import run_passes
from lrt.model.state import Buffer
from lrt.passes import Pass, exact_prefix, memory_only, no_grad_pass

FULL, LAST = config(), config(source=3, projection="shared")
models = pytest.mark.parametrize("cfg", VARIANTS + CORNERS, ids=label)
with_memory = pytest.mark.parametrize("cfg", VARIANTS + CORNERS[:-1], ids=label)
recurrent = pytest.mark.parametrize("cfg", [c for c in VARIANTS + CORNERS if c.memory.recurrent], ids=label)
few = pytest.mark.parametrize("cfg", [FULL, LAST, BOTH], ids=label)


# The oracle.


@models
def test_reference_is_the_sequential_schedule(cfg: ModelConfig):
    model, length = fixed(cfg), 8
    ids = packed(cfg, 2, length)
    got = outcome(model, ids, passes("sequential", length))
    logits = model.logits(got.hidden).detach()
    for row in range(2):
        expected = reference(dict(model.state_dict()), cfg, ids[row].tolist())
        assert near(logits[row], expected.logits)
        assert near(got.source[row], expected.memory)
    assert differ(got.source[:, 1:], got.source[:, :-1]).min() > 1e-3  # not constant: something was compared


@settings(max_examples=60)
@given(pass_lists(), st.sampled_from([*VARIANTS, *CORNERS]), st.integers(0, 99))
def test_any_passes_compute_what_the_oracle_does(case, cfg: ModelConfig, seed: int):
    length, run = case
    model, ids = fixed(cfg), packed(cfg, 1, length, seed)
    expected = slow_passes(model, ids[0].tolist(), run)
    with torch.no_grad():
        folded = list(run_passes(model, ids, run, model.starts(ids)))
    for (logits, memory), (_, written, _), early in zip(expected, folded, memory_only(run), strict=True):
        assert near(written.memory[0], memory)
        assert (written.hidden is None) == early
        if written.hidden is not None:
            assert near(model.logits(written.hidden[0]).detach(), logits)


@few
@pytest.mark.parametrize("text", SCHEDULES)
def test_every_schedule_computes_what_the_oracle_does(text: str, cfg: ModelConfig):
    model, length = fixed(cfg), 6
    ids, run = packed(cfg, 1, length), passes(text, length)
    expected = slow_passes(model, ids[0].tolist(), run)
    merged, memory = torch.zeros(length, cfg.vocab_size, dtype=torch.float64), torch.zeros(length, cfg.d).double()
    for p, (logits, states) in zip(run, expected, strict=True):
        merged[list(p.positions)], memory[list(p.positions)] = logits, states
    got = outcome(model, ids, run)
    assert near(got.source[0], memory)
    assert near(model.logits(got.hidden[0]).detach(), merged)


# Schedules against one another.


@with_memory
@pytest.mark.parametrize("exact", ["refinement-5", "interleaved-6"])
def test_as_many_passes_or_subsets_as_positions_end_in_the_sequential_states(exact: str, cfg: ModelConfig):
    model, length = fixed(cfg), 6
    ids = packed(cfg, 3, length)
    assert exact_prefix(passes(exact, length), length) == length
    assert same(outcome(model, ids, passes(exact, length)), outcome(model, ids, passes("sequential", length)))


@few
@pytest.mark.parametrize("exact", ["interleaved-20", "chunked-1", "parallel:settle=6", "interleaved-4:settle=3"])
def test_other_ways_to_be_exact(exact: str, cfg: ModelConfig):
    model, ids = fixed(cfg), packed(cfg, 2, 7)
    assert exact_prefix(passes(exact, 7), 7) == 7
    assert same(outcome(model, ids, passes(exact, 7)), outcome(model, ids, passes("sequential", 7)))


@few
@pytest.mark.parametrize("size", [2, 3, 7, 8, 9])
def test_chunks_of_any_size_run_and_one_chunk_is_parallel(size: int, cfg: ModelConfig):
    model, ids = fixed(cfg), packed(cfg, 2, 8)
    got = outcome(model, ids, passes(f"chunked-{size}", 8))
    assert got.hidden.isfinite().all()
    parallel = outcome(model, ids, passes("parallel", 8))
    assert same(got, parallel) == (size >= 8)


@with_memory
def test_settled_passes_have_the_values_of_refinement(cfg: ModelConfig):
    model, ids = fixed(cfg), packed(cfg, 2, 8)
    refined = outcome(model, ids, passes("refinement-2", 8))
    for text in ("settled-2", "refinement-2:detach", "parallel:settle=2", "refinement-1:settle=1"):
        assert same(outcome(model, ids, passes(text, 8)), refined)


@pytest.mark.parametrize("text", SCHEDULES)
def test_a_token_shift_alone_is_exact_in_every_pass(text: str):
    """No recurrence: each pass over each slice computes what decoding does, the first one too."""
    model, ids = fixed(SHIFT), packed(SHIFT, 2, 8)
    exact = outcome(model, ids, passes("sequential", 8)).hidden
    assert near(outcome(model, ids, passes(text, 8)).hidden, exact)
    for p, written, _ in run_passes(model, ids, passes(text, 8), model.starts(ids)):
        assert written.hidden is None or near(written.hidden, exact[:, list(p.positions)])


@pytest.mark.parametrize("cfg", [SHIFT, BOTH], ids=label)
def test_a_token_shift_reads_the_previous_token_alone_and_nothing_across_a_start(cfg: ModelConfig):
    """Another embedding of the token at 1 reaches the first layer's key at 2 through the shift, and no other's."""
    model, ids = deepcopy(fixed(cfg)), torch.arange(1, 9)[None].repeat(2, 1)
    ids[1, 2] = 0  # row 1: a document begins where row 0 reads the token before
    starts = model.starts(ids)
    before = next(run_passes(model, ids, [Pass(range(8))], starts))[1].keys[0]
    with torch.no_grad():
        model.embedding.weight[2] += 1.0
    after = next(run_passes(model, ids, [Pass(range(8))], starts))[1].keys[0]
    moved = (after - before).abs().amax((1, 3)) > 1e-6
    assert moved.tolist() == [[t in (1, 2) for t in range(8)], [t == 1 for t in range(8)]]


def test_without_memory_every_schedule_computes_the_plain_transformer():
    cfg = CORNERS[-1]
    model, ids = fixed(cfg), packed(cfg, 2, 8)
    plain = outcome(model, ids, passes("parallel", 8))
    for text in SCHEDULES:
        assert near(outcome(model, ids, passes(text, 8)).hidden, plain.hidden)


@pytest.mark.parametrize("cfg", [FULL, LAST, SHIFT, BOTH], ids=label)
@pytest.mark.parametrize("half", [1, 3, 4])
def test_passes_may_begin_where_a_cache_ends(half: int, cfg: ModelConfig):
    """The same passes over a row in two parts, the second against what a cache holds of the first."""
    model, ids = fixed(cfg), packed(cfg, 2, 8)
    starts, late = model.starts(ids), range(8 - half)
    second = [range(late.stop), range(1, late.stop), range(1, late.stop, 2)]
    run = [Pass(range(half)), *(Pass(range(r.start + half, 8, r.step)) for r in second)]
    whole = list(run_passes(model, ids, run, starts))
    with torch.no_grad():
        first, both = ids[:, :half], torch.arange(2)
        buffer = next(run_passes(model, first, run[:1], starts[:, :half]))[2]
        cache = KVCache.empty(model, 2, 8).commit(buffer, both, torch.full((2,), half))
        parts = list(run_passes(model, ids[:, half:], [Pass(r) for r in second], starts[:, half:], cache.buffer()))
    for (_, a, _), (_, b, _) in zip(whole[1:], parts, strict=True):
        assert near(a.hidden, b.hidden)
        assert near(a.memory, b.memory)


# The exact prefix, measured.


def measured_prefix(model: LRT, run: tuple[Pass, ...], length: int) -> int:
    """Positions before the first whose last-written memory differs from the sequential one; one document a row."""
    ids = torch.randint(1, model.config.vocab_size, (2, length), generator=torch.Generator().manual_seed(3))
    wrong = differ(outcome(model, ids, run).source, outcome(model, ids, passes("sequential", length)).source).amax(0)
    return next((t for t in range(length) if wrong[t] > TOLERANCE), length)


@pytest.mark.parametrize("cfg", [FULL, LAST], ids=label)
@pytest.mark.parametrize(
    "text",
    ["parallel", "interleaved-1", "interleaved-2", "interleaved-3", "interleaved-5:settle=1", "refinement-1",
     "refinement-3", "chunked-1", "chunked-2", "chunked-4", "chunked-8", "sequential", "settled-2"],
)  # fmt: skip
def test_promised_exact_prefix_is_met_and_no_more_than_met(text: str, cfg: ModelConfig):
    run = passes(text, 8)
    assert measured_prefix(fixed(cfg), run, 8) == exact_prefix(run, 8)


@settings(max_examples=40)
@given(pass_lists(), st.sampled_from(VARIANTS))
def test_promised_exact_prefix_is_met_by_any_passes(case, cfg: ModelConfig):
    length, run = case
    assert measured_prefix(fixed(cfg), run, length) >= exact_prefix(run, length)


# Passes that stop at the source block.


@settings(max_examples=40)
@given(pass_lists(), st.sampled_from(VARIANTS))
def test_stopping_early_changes_nothing(case, cfg: ModelConfig):
    length, run = case
    model, ids = fixed(cfg), packed(cfg, 2, length)
    early = outcome(model, ids, run)
    with patch("lrt.model.run_passes.memory_only", lambda run: [False] * len(run)):
        full = outcome(model, ids, run)
    assert all(near(a, b) for a, b in zip(early[1:], full[1:], strict=True))
    assert near(early.hidden, full.hidden.where((early.hidden != 0).any(-1, keepdim=True), 0))
    assert (early.hidden != 0).any(-1)[:, sorted({t for p in run if p.weight > 0 for t in p.positions})].all()


def test_a_pass_that_stops_early_writes_only_the_blocks_below():
    model, ids = fixed(FULL), packed(FULL, 2, 6)
    (_, first, _), (_, last, _) = run_passes(model, ids, passes("settled-1", 6), model.starts(ids))
    assert first.hidden is None
    assert (len(first.keys), len(last.keys)) == (FULL.source, FULL.layers)


# Blocks that no memory reaches.


@settings(max_examples=60)
@given(pass_lists(), st.sampled_from(BELOW), st.integers(0, 99))
def test_passes_that_run_again_only_what_memory_reaches_compute_what_the_oracle_does(case, cfg, seed: int):
    length, run = case
    model, ids = fixed(cfg), packed(cfg, 1, length, seed)
    expected = slow_passes(model, ids[0].tolist(), run)
    folded = list(run_passes(model, ids, run, model.starts(ids)))
    for (logits, memory), (_, written, _) in zip(expected, folded, strict=True):
        assert near(written.memory[0], memory)
        if written.hidden is not None:
            assert near(model.logits(written.hidden[0]), logits)


@settings(max_examples=40)
@given(pass_lists(), st.sampled_from(BELOW))
def test_what_is_not_run_again_changes_neither_states_nor_gradients(case, cfg: ModelConfig):
    """Keys and values of all blocks, and the gradient of all that passes with gradient compute."""
    length, run = case
    model, ids = fixed(cfg), packed(cfg, 2, length)
    both = []
    for below in (cfg.blocks_below, 0):
        with patch.object(ModelConfig, "blocks_below", below):
            *_, (_, _, buffer) = folded = list(run_passes(model, ids, run, model.starts(ids)))
        states = [x for s in buffer.segments for x in (*s.written.keys, *s.written.values, s.written.memory)]
        wanted = [w.memory if w.hidden is None else w.hidden for p, w, _ in folded if p.grad]
        loss = sum((x.pow(3).sum() for x in wanted), torch.zeros((), dtype=torch.float64, requires_grad=True))
        grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        both.append((states, [torch.zeros(()) if g is None else g for g in grads]))
    assert all(near(a, b) for kind in zip(*both, strict=True) for a, b in zip(*kind, strict=True))


@pytest.mark.parametrize("cfg", BELOW, ids=label)
def test_only_blocks_that_memory_reaches_run_again(cfg: ModelConfig):
    model, ids, calls = fixed(cfg), packed(cfg, 2, 6), []
    hooks = [b.register_forward_hook(lambda *call, i=i: calls.append(i)) for i, b in enumerate(model.blocks)]
    run = [
        no_grad_pass(range(6)),
        *(no_grad_pass(range(i, 6, 2)) for i in range(2)),
        no_grad_pass(range(6)),
        Pass(range(6)),
    ]
    for _, (_, written, _) in zip(run, run_passes(model, ids, run, model.starts(ids)), strict=True):
        calls.append(-1)
        assert len(written.keys) == (cfg.layers if written.hidden is not None else cfg.source)
    for hook in hooks:
        hook.remove()
    text = " ".join(map(str, calls)).split(" -1")[:-1]
    blocks = [range(cfg.source), *[range(cfg.blocks_below, cfg.source)] * 3, range(cfg.layers)]
    assert [list(map(int, part.split())) for part in text] == [[i % cfg.depth for i in run] for run in blocks]
    assert cfg.blocks_below == {4: 2, 2: 1, 3: 1}[cfg.source]


# Causality and independence.


@few
@pytest.mark.parametrize("text", SCHEDULES)
def test_changing_a_token_changes_nothing_before_it(text: str, cfg: ModelConfig):
    """Row 1 + t of the batch has another token at t; row 0 has none changed. Every pass is compared, and the merged."""
    model, length = fixed(cfg), 7
    ids = packed(cfg, 1, length).repeat(length + 1, 1)
    changed = torch.arange(length)
    ids[changed + 1, changed] = (ids[0] % (cfg.vocab_size - 1)) + 1  # never a BOS, always another token
    run = passes(text, length)
    folded = list(run_passes(model, ids, run, model.starts(ids)))
    merged = outcome(model, ids, run).hidden
    for at, hidden in [*((list(p.positions), w.hidden) for p, w, _ in folded), (list(range(length)), merged)]:
        if hidden is not None:
            moved = differ(model.logits(hidden[1:]), model.logits(hidden[:1]))
            early = torch.tensor(at)[None] < changed[:, None]
            assert (moved[early] < TOLERANCE).all()
    assert differ(merged[1:], merged[:1]).diagonal().min() > 1e-6


@few
@pytest.mark.parametrize("text", SCHEDULES)
def test_rows_are_independent(text: str, cfg: ModelConfig):
    model, ids = fixed(cfg), packed(cfg, 3, 6)
    together = outcome(model, ids, passes(text, 6))
    for row in range(3):
        alone = outcome(model, ids[row : row + 1], passes(text, 6))
        assert near(together.hidden[row], alone.hidden[0])
        assert near(together.source[row], alone.source[0])


# Documents.


@recurrent
@pytest.mark.parametrize("at", [range(8), range(1, 8, 2), range(4, 5)])
def test_a_document_reads_no_memory_of_the_one_before(at: range, cfg: ModelConfig):
    """Perturb the memory that stands in the buffer before a document's start: nothing changes. Elsewhere it does."""
    model = fixed(cfg)
    ids = torch.randint(1, cfg.vocab_size, (2, 8), generator=torch.Generator().manual_seed(1))
    ids[0, 4] = 0  # row 0 begins a document there, row 1 does not
    starts = ids == 0  # given explicitly: one of the models knows no BOS
    _, _, buffer = next(run_passes(model, ids, [Pass(range(8))], starts))
    segment = buffer.segments[0]
    noise = torch.zeros_like(segment.written.memory)
    if 4 in at:
        noise[:, 3] = 1.0
    else:
        noise[:, 1] = 1.0  # read by position 2, which the pass may not visit; position 4 is not visited
    other = Buffer((segment._replace(written=segment.written._replace(memory=segment.written.memory + noise)),))
    hidden = [next(run_passes(model, ids, [Pass(at)], starts, b))[1].hidden for b in (buffer, other)]
    change = differ(*hidden).amax(1)
    assert change[0] == 0
    assert (change[1] > 1e-6) == (4 in at)


@recurrent
def test_no_gradient_reaches_the_memory_before_a_document(cfg: ModelConfig):
    model, ids = fixed(cfg), packed(cfg, 1, 8)  # BOS at position 3
    starts = ids == 0
    (_, first, _), (_, second, _) = run_passes(model, ids, passes("refinement-1", 8), starts)
    grad = torch.autograd.grad(second.hidden.pow(3).sum(), first.memory)[0][0].abs().amax(-1)
    assert grad[2] == 0
    assert grad[7] == 0  # nobody stands after the last position
    assert (grad[[0, 1, 3, 4, 5, 6]] > 1e-9).all()


def test_starts_default_to_bos_in_the_model_and_can_be_given():
    model, ids = fixed(FULL), packed(FULL, 2, 8)
    run = passes("refinement-2", 8)
    none = list(run_passes(model, ids, run))[-1][1].hidden
    inside = list(run_passes(model, ids, run, ids == 0))[-1][1].hidden
    assert differ(none, inside)[0].max() > 1e-6  # row 0 holds a BOS
    assert differ(none, inside)[1].max() < TOLERANCE  # row 1 none
    everywhere = list(run_passes(model, ids, run, torch.ones_like(ids, dtype=torch.bool)))[-1][1].hidden
    assert near(everywhere, outcome(model, ids, passes("parallel", 8)).hidden)  # memory always reset: none at all


def test_positions_and_attention_continue_across_documents():
    """Without memory a BOS inside a row is a token like any other: another id in its place, with the same weights."""
    model, ids = randomised(FULL), packed(FULL, 1, 8)
    swapped = torch.where(ids == 0, 5, ids)
    with torch.no_grad():
        for table in (m for m in model.modules() if isinstance(m, torch.nn.Embedding)):
            table.weight[5] = table.weight[0]
    assert near(
        outcome(model, ids, passes("parallel", 8)).hidden, outcome(model, swapped, passes("parallel", 8)).hidden
    )
