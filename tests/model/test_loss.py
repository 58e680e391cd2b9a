"""ScheduledLoss: per-pass means, normalised weights, ignored targets, accumulation, gradients never missing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import CORNERS, SCHEDULES, config, fixed, outcome, packed, passes, randomised
from torch import Tensor

from lrt.inference.generate import score
from lrt.model import cross_entropy as head
from lrt.model.loss import IGNORE, LossOutput, ScheduledLoss, step_plan, token_nats
from lrt.model.run_passes import run_passes
from lrt.schedule import Curriculum, Schedule

FULL = config()
MODEL, IDS = fixed(FULL), packed(FULL, 4, 8)
TARGETS = packed(FULL, 4, 8, seed=1)
HOLES = TARGETS.clone()
HOLES[0, 2:] = HOLES[2, ::2] = HOLES[:, 5] = IGNORE
UNEVEN = [slice(0, 1), slice(1, 3), slice(3, 4)]


def loss_of(text: str, targets: Tensor = TARGETS, **options) -> LossOutput:
    with torch.no_grad():
        return ScheduledLoss(MODEL, Schedule.parse(text))(IDS, targets, **options)


def means_by_hand(text: str, targets: Tensor) -> list[float]:
    """Each pass's mean over its counted targets, one position at a time."""
    found = []
    for p, written, _ in run_passes(MODEL, IDS, passes(text, 8), MODEL.starts(IDS)):
        if p.weight > 0:
            log_probabilities = MODEL.logits(written.hidden).log_softmax(-1)
            nats = [
                -log_probabilities[row, i, targets[row, t]].item()
                for i, t in enumerate(p.positions)
                for row in range(4)
                if targets[row, t] != IGNORE
            ]
            found.append(sum(nats) / max(1, len(nats)))
    return found


@pytest.mark.parametrize("text", [*SCHEDULES, "interleaved-3:weights=0.2/0.5/1"])
@pytest.mark.parametrize("targets", [TARGETS, HOLES], ids=["all", "some ignored"])
def test_loss_is_the_normalised_weighted_mean_of_the_passes(text: str, targets: Tensor):
    out = loss_of(text, targets)
    means = means_by_hand(text, targets)
    weights = [p.weight for p in passes(text, 8) if p.weight > 0]
    expected = sum(w * x for w, x in zip(weights, means, strict=True)) / sum(weights)
    torch.testing.assert_close(out.per_pass, torch.tensor(means, dtype=torch.float64))
    torch.testing.assert_close(out.loss, torch.tensor(expected, dtype=torch.float64))
    assert out.passes == passes(text, 8)


def test_only_the_ratio_of_weights_counts():
    once, tenfold = loss_of("refinement-2:weights=0.1/0.3/0.6"), loss_of("refinement-2:weights=1/3/6")
    torch.testing.assert_close(once.loss, tenfold.loss)
    assert abs(once.loss - loss_of("refinement-2").loss) > 1e-6


def test_a_first_pass_of_weight_0_has_no_loss_but_serves_the_others():
    both, later = loss_of("interleaved-2"), loss_of("interleaved-2:weights=0/1")
    assert len(later.per_pass) == 2
    torch.testing.assert_close(later.per_pass, both.per_pass[1:])
    torch.testing.assert_close(later.loss, both.per_pass[1:].mean())


def test_settled_loss_is_the_last_of_refinement():
    torch.testing.assert_close(loss_of("settled-2").loss, loss_of("refinement-2").per_pass[-1])


def test_ignored_targets_have_no_loss():
    nats = token_nats(MODEL, outcome(MODEL, IDS, passes("parallel", 8)).hidden, HOLES)
    assert (nats[HOLES == IGNORE] == 0).all()
    assert (nats[HOLES != IGNORE] > 0).all()


def test_a_pass_whose_targets_are_all_ignored_counts_0():
    out = loss_of("sequential", HOLES)
    assert out.per_pass[5] == 0
    assert out.loss.isfinite()
    assert loss_of("parallel", torch.full_like(TARGETS, IGNORE)).loss == 0


def test_counts_of_targets():
    counts = step_plan(HOLES, None, passes("interleaved-2:settle=1", 8)).counts[:-1]
    kept = HOLES != IGNORE
    assert counts.tolist() == [kept.sum(), kept[:, ::2].sum(), kept[:, 1::2].sum()]
    ignored = torch.full_like(TARGETS, IGNORE)
    assert step_plan(ignored, None, passes("refinement-1", 8)).counts[:-1].tolist() == [0, 0]


@pytest.mark.parametrize("text", SCHEDULES)
def test_micro_batches_add_up_to_the_batch(text: str):
    """Given the step's counts, parts of unequal size with unequal shares of ignored targets sum to the whole."""
    whole, loss = loss_of(text, HOLES), ScheduledLoss(MODEL, Schedule.parse(text))
    plan = step_plan(HOLES, IDS == 0, whole.passes)
    with torch.no_grad():
        parts = [loss(IDS[rows], HOLES[rows], plan=plan) for rows in UNEVEN]
    torch.testing.assert_close(sum(p.loss for p in parts), whole.loss)
    torch.testing.assert_close(sum(p.per_pass for p in parts), whole.per_pass)


def test_starts_are_the_models_bos_unless_given():
    given = loss_of("refinement-1", starts=IDS == 0)
    assert torch.equal(given.loss, loss_of("refinement-1").loss)
    assert given.loss != loss_of("refinement-1", starts=torch.zeros_like(IDS, dtype=torch.bool)).loss


def test_the_step_draws_the_schedule_whatever_the_rank():
    loss = ScheduledLoss(MODEL, Schedule.parse("settled-1..3"), seed=7)
    sweeps = [len(loss.passes(step, 8)) - 1 for step in range(30)]
    assert sweeps == [Schedule.parse("settled-1..3").draw(7, step).size.low for step in range(30)]
    assert set(sweeps) == {1, 2, 3}
    with torch.no_grad():
        assert len(loss(IDS, TARGETS, step=sweeps.index(3)).passes) == 4


EVERY = [*SCHEDULES, "chunked-8", "refinement-1:weights=1/0"]


@pytest.mark.parametrize("text", EVERY)
@pytest.mark.parametrize(
    "cfg", [FULL, config(projection="shared", source=3), CORNERS[-1]], ids=["full", "shared", "plain"]
)
def test_no_gradient_is_ever_missing(text: str, cfg):
    """Steps without memory give its parameters zeros, as DDP needs; T need not be a multiple of S."""
    check_gradients(text, cfg, 7)


def test_no_gradient_is_missing_in_rows_of_one_position():
    for text in EVERY:
        check_gradients(text, FULL, 1)


def check_gradients(text: str, cfg, length: int) -> None:
    model, ids = fixed(cfg), packed(cfg, 2, length)
    model.zero_grad(set_to_none=True)
    ScheduledLoss(model, Schedule.parse(text))(ids, ids).loss.backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None]
    reads = length > 1 and any(p.weight > 0 for p in passes(text, length)[1:])
    for p in model.memory_parameters():
        assert (p.grad.abs().max() > 0) == reads
    model.zero_grad(set_to_none=True)


@pytest.mark.parametrize("chunk", [1, 40, 100, 2**20])
@pytest.mark.parametrize("softcap", [2.0, None])
def test_the_chunked_head_is_its_slow_twin(chunk: int, softcap: float | None, monkeypatch: pytest.MonkeyPatch):
    """Value and gradients, with targets ignored, for chunks of a row, of a few, and for all logits at once."""
    monkeypatch.setitem(head.CHUNK, "cpu", chunk)
    model = fixed(config(softcap=softcap))
    with torch.no_grad():
        states = [w.hidden for _, w, _ in run_passes(model, IDS, passes("interleaved-2", 8), model.starts(IDS))]
    hidden = [h.clone().requires_grad_() for h in states]
    aims = [HOLES, HOLES[:, ::2], HOLES[:, 1::2]]
    scales = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
    weight = model.head.weight
    loss, sums = head.head_loss(weight, softcap, hidden, aims, scales)
    twin = [token_nats(model, h, t).sum() for h, t in zip(hidden, aims, strict=True)]
    torch.testing.assert_close(sums, torch.stack(twin).detach())
    slow = (torch.stack(twin) * scales).sum()
    torch.testing.assert_close(loss, slow)
    ours, theirs = (torch.autograd.grad(3 * x, [weight, *hidden]) for x in (loss, slow))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_parameters_are_those_of_the_model():
    loss = ScheduledLoss(MODEL, Schedule.parse("parallel"))
    assert {id(p) for p in loss.parameters()} == {id(p) for p in MODEL.parameters()}


@pytest.mark.parametrize("wrong", [-1, -99, -101, 19, 10**6])
@pytest.mark.parametrize("text", ["parallel", "interleaved-2", "refinement-1:weights=0/1"])
def test_targets_that_are_no_tokens_are_refused(text: str, wrong: int):
    targets = HOLES.clone()
    targets[1, 1] = wrong
    assert loss_of(text, HOLES).loss.isfinite()
    with pytest.raises(ValueError, match=f"target {wrong} is no token .* put -100"):
        loss_of(text, targets)
    with pytest.raises(ValueError, match=f"target {wrong} is no token"):
        score(MODEL, IDS, targets)


def test_a_schedule_may_be_given_by_its_name_but_stages_need_the_number_of_steps():
    text = "parallel@0.5,settled-1..3"
    by_name, parsed = (ScheduledLoss(MODEL, s) for s in ("settled-1..3", Schedule.parse("settled-1..3")))
    assert [by_name.passes(step, 9) for step in range(6)] == [parsed.passes(step, 9) for step in range(6)]
    with pytest.raises(ValueError, match="say of how many"):
        ScheduledLoss(MODEL, text)(IDS, IDS)
    staged = ScheduledLoss(MODEL, replace(Curriculum.parse(text), steps=2))
    assert len(staged.passes(0, 9)) == 1 < len(staged.passes(1, 9))


class Packed(Tensor):
    """A weight as quantisers keep it: a linear module may use it, and nothing else is defined on it."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        allowed = (torch.nn.functional.linear, Tensor.detach, Tensor.requires_grad_)
        if func not in allowed and not getattr(func, "__name__", "") == "__get__":
            raise NotImplementedError(f"{func}")
        with torch._C.DisableTorchFunctionSubclass():
            out = func(*args, **kwargs or {})
            return out.as_subclass(cls) if func is Tensor.detach else out


def test_a_quantised_head_is_called_and_not_taken_for_a_matrix():
    model = randomised(FULL)
    expected = ScheduledLoss(model, Schedule.parse("settled-2"))(IDS, TARGETS)
    expected.loss.backward()
    grad = model.blocks[0].mlp.up.weight.grad.clone()
    model.zero_grad()
    model.head.weight = torch.nn.Parameter(model.head.weight.detach().as_subclass(Packed), requires_grad=False)
    assert type(model.head.weight) is Packed
    assert model.head_matrix() is None
    got = ScheduledLoss(model, Schedule.parse("settled-2"))(IDS, TARGETS)
    got.loss.backward()
    assert torch.allclose(got.loss, expected.loss, rtol=1e-12)
    assert torch.allclose(model.blocks[0].mlp.up.weight.grad, grad, rtol=1e-9, atol=1e-12)
