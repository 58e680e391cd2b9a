"""The optimizer: every parameter once, Muon against torch's, state that continues bit for bit, the rate, clipping."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from helpers import CORNERS, LLAMA, VARIANTS, config, fixed, label, packed, randomised
from torch import Tensor, nn

from lrt.config.model import ModelConfig
from lrt.config.run import OptimConfig
from lrt.model.loss import ScheduledLoss
from lrt.model.lrt import LRT
from lrt.schedule import Schedule
from lrt.training.optimizer import (
    REFERENCE_WIDTH,
    Muon,
    Optimizer,
    clip,
    memory_rate,
    parameter_groups,
    peak_rates,
    rate,
)

SHAPES = [(16, 16), (8, 32), (32, 8), (16, 16), (1, 24), (24, 1), (33, 32), (8, 32)]


@pytest.mark.parametrize("cfg", VARIANTS + CORNERS, ids=label)
def test_every_parameter_is_in_exactly_one_group(cfg: ModelConfig):
    model = fixed(cfg)
    groups = parameter_groups(model)
    names = [name for group in groups.values() for name in group]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    assert all(p.ndim == 2 for p in groups["matrix"].values())
    assert all(p.ndim == 0 for p in groups["scalar"].values())
    assert all(p.ndim == 1 for p in groups["vector"].values())
    assert set(groups["head"]) == {"embedding.weight" if cfg.backbone.tied else "head.weight"}
    assert all("embedding" in name for name in groups["embedding"])
    optimizer = Optimizer(model, OptimConfig())
    stepped = [id(p) for o in (optimizer.adam, optimizer.muon) for group in o.param_groups for p in group["params"]]
    assert sorted(stepped) == sorted(id(p) for p in model.parameters())
    assert {id(p) for p in optimizer.muon.param_groups[0]["params"]} == {id(p) for p in groups["matrix"].values()}


def test_rates_by_group_scale_with_width():
    model = LRT(config(width=192, heads=4))
    chosen = OptimConfig(matrix_lr=0.1, embedding_lr=0.2, head_lr=0.3, scalar_lr=0.4, weight_decay=0.5, momentum=0.6)
    optimizer = Optimizer(model, chosen)
    of = {id(p): g["lr"] for o in (optimizer.adam, optimizer.muon) for g in o.param_groups for p in g["params"]}
    scale = (192 / REFERENCE_WIDTH) ** -0.5
    assert scale == 2
    for name, p in model.named_parameters():
        embedding, head, scalar = "embedding" in name, name == "head.weight", p.ndim == 0
        expected = 0.4 if embedding else 0.6 if head else 0.4 if scalar else 0.1
        assert math.isclose(of[id(p)], expected), name
    assert optimizer.muon.param_groups[0]["weight_decay"] == 0.5
    assert optimizer.muon.param_groups[0]["momentum"] == 0.6
    assert all(group["weight_decay"] == 0 for group in optimizer.adam.param_groups)


def test_vectors_have_the_heads_rate():
    model = LRT(config(backbone=LLAMA))
    peaks = peak_rates(model, OptimConfig(embedding_lr=0.2, head_lr=0.3))
    vectors = parameter_groups(model)["vector"]
    assert vectors and {peaks[p].lr for p in vectors.values()} == {0.3 * (24 / REFERENCE_WIDTH) ** -0.5}


def test_the_memorys_and_the_scalars_rates_of_their_own():
    model = LRT(config(projection="shared", shift=True))
    chosen = OptimConfig(memory_lr=0.002, alpha_lr=0.005, beta_lr=0.5, gamma_lr=0.25)
    found = {name: peak_rates(model, chosen)[p] for name, p in model.named_parameters()}
    for name, (lr, warming) in found.items():
        own = {"alpha": 0.005, "beta": 0.5, "gamma": 0.25, "shift_gamma": 0.25}.get(name.rpartition(".")[2])
        assert not warming
        if name.startswith(("projection.", "shift_projection.")):
            assert lr == 0.002
        elif own is not None:
            assert lr == own
        else:
            assert lr == peak_rates(model, OptimConfig())[dict(model.named_parameters())[name]].lr
    assert sum(lr == 0.002 for lr, _ in found.values()) == 4


def test_rates_that_repeat_the_defaults_change_no_bit():
    """Groups of one rate are one group, as they were before rates could differ."""
    same = OptimConfig(memory_lr=0.02, alpha_lr=0.04, beta_lr=0.04, gamma_lr=0.04)
    ends = []
    for chosen in (OptimConfig(), same):
        model = LRT(config())
        take_steps(model, Optimizer(model, chosen), 0, 4)
        ends.append([p.detach() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


@pytest.mark.parametrize(("step", "expected"), [(0, 0.05), (9, 0.5), (19, 1.0), (20, 1.0), (99, 1.0)])
def test_the_memorys_rate_rises(step: int, expected: float):
    assert math.isclose(memory_rate(step, 100, OptimConfig(memory_warmup=0.2)), expected)
    assert memory_rate(step, 100, OptimConfig()) == 1.0


def test_only_the_memory_warms_up():
    """A step at half the memory's rate moves W_K, W_V and gamma half as far, everything else as far as without."""
    moves = []
    for memory in (1.0, 0.5):
        model = randomised(config())
        start = [p.detach().clone() for p in model.parameters()]
        ids = packed(model.config, 2, 8)
        ScheduledLoss(model, Schedule.parse("refinement-1"))(ids, ids.roll(-1, 1)).loss.backward()
        Optimizer(model, OptimConfig(memory_warmup=0.5), torch.float64).step(1.0, memory=memory)
        moves.append({name: p.detach() - x for (name, p), x in zip(model.named_parameters(), start, strict=True)})
    names = {id(p): name for name, p in model.named_parameters()}
    memorys = {names[id(p)] for p in model.memory_parameters()}
    assert len(memorys) == 3 * 3
    for name, whole in moves[0].items():
        assert torch.allclose(whole * (0.5 if name in memorys else 1.0), moves[1][name], rtol=1e-9), name
        assert whole.abs().max() > 0


# Muon.


def drawn(seed: int) -> list[Tensor]:
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=random) for shape in SHAPES]


def moved(optimizer: torch.optim.Optimizer, matrices: list[nn.Parameter], steps: int = 4) -> list[Tensor]:
    """Where the matrices end up after `steps` with the same gradients for everyone, at two rates."""
    for step in range(steps):
        for p, grad in zip(matrices, drawn(100 + step), strict=True):
            p.grad = grad * 10.0**step
        optimizer.param_groups[0]["lr"] = 0.1 if step % 2 else 0.05
        optimizer.step()
    return [p.detach().clone() for p in matrices]


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 0.02), (torch.float32, 0.04)], ids=["bfloat16", "float32"]
)
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_muon_is_torchs(dtype: torch.dtype, tolerance: float, weight_decay: float):
    """Relative to the distance moved. torch's orthogonalises in bfloat16: ours does likewise, or better in float32."""
    mine, torchs = ([nn.Parameter(x) for x in drawn(0)] for _ in range(2))
    ours = moved(Muon(mine, lr=1.0, momentum=0.9, weight_decay=weight_decay, dtype=dtype), mine)
    theirs = moved(torch.optim.Muon(torchs, lr=1.0, momentum=0.9, weight_decay=weight_decay), torchs)
    for a, b, start in zip(ours, theirs, drawn(0), strict=True):
        assert (a - b).norm() <= tolerance * (b - start).norm()


def orthogonalised(x: Tensor) -> Tensor:
    """Newton-Schulz through the singular values, in float64: each goes through the same odd polynomial."""
    u, s, v = torch.linalg.svd(x.double() / x.double().norm(), full_matrices=False)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u * s @ v


def test_one_step_of_muon_from_the_singular_values():
    matrices = [nn.Parameter(x) for x in drawn(0)]
    optimizer = Muon(matrices, lr=0.1, momentum=0.9, weight_decay=0.2, dtype=torch.float32)
    for p, grad in zip(matrices, drawn(1), strict=True):
        p.grad = grad
    optimizer.step()
    for p, start, grad in zip(matrices, drawn(0), drawn(1), strict=True):
        look_ahead = 0.1 * grad + 0.9 * (0.1 * grad)  # Nesterov from an empty buffer; the scale does not matter
        tall = max(1, p.shape[0] / p.shape[1]) ** 0.5
        expected = start * (1 - 0.1 * 0.2) - 0.1 * tall * orthogonalised(look_ahead)
        torch.testing.assert_close(p.detach().double(), expected, rtol=1e-3, atol=1e-4)


def test_updates_are_nearly_orthogonal():
    optimizer = Muon([nn.Parameter(torch.zeros(4, 4))], 0.1, 0.9, 0.0, torch.float32)
    for shape in ((3, 12, 20), (3, 20, 12)):
        updates = optimizer.orthogonalise(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
        assert updates.shape == shape
        singular = torch.linalg.svdvals(updates)
        assert singular.min() > 0.5
        assert singular.max() < 1.3
    assert optimizer.orthogonalise(torch.zeros(2, 4, 6)).abs().max() == 0  # a zero gradient, as of unread memory


def test_muon_leaves_what_has_no_gradient():
    matrices = [nn.Parameter(x) for x in drawn(0)]
    matrices[1].grad = drawn(1)[1]
    Muon(matrices, 0.1, 0.9, 0.5, torch.float32).step()
    same = [torch.equal(p, x) for p, x in zip(matrices, drawn(0), strict=True)]
    assert same == [i != 1 for i in range(len(SHAPES))]


# The optimizer as a whole.


def take_steps(model: LRT, optimizer: Optimizer, first: int, steps: int) -> None:
    loss = ScheduledLoss(model, Schedule.parse("settled-0..2"))
    for step in range(first, first + steps):
        ids = packed(model.config, 2, 8, seed=step)
        loss(ids, ids.roll(-1, 1), step=step).loss.backward()
        clip(model.parameters(), 1.0)
        optimizer.step(rate(step, 6, OptimConfig()))


def test_state_continues_bit_for_bit():
    chosen = OptimConfig(weight_decay=0.1)
    whole, first = randomised(config()).float(), randomised(config()).float()
    straight = Optimizer(whole, chosen)
    take_steps(whole, straight, 0, 6)
    before = Optimizer(first, chosen)
    take_steps(first, before, 0, 3)
    state = {key: value.clone() for key, value in before.state().items()}
    second = LRT(config())
    second.load_state_dict(first.state_dict())
    after = Optimizer(second, chosen)
    after.load(state)
    take_steps(second, after, 3, 3)
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), second.parameters(), strict=True))
    ends = straight.state(), after.state()
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])
    fresh = LRT(config())
    fresh.load_state_dict(first.state_dict())
    take_steps(fresh, Optimizer(fresh, chosen), 3, 3)  # without the state it goes elsewhere
    assert not torch.equal(fresh.head.weight, whole.head.weight)


def test_state_names_every_parameter_and_clears_gradients():
    model = randomised(config()).float()
    optimizer = Optimizer(model, OptimConfig())
    assert optimizer.state() == {}
    take_steps(model, optimizer, 0, 1)
    assert all(p.grad is None for p in model.parameters())
    state = optimizer.state()
    assert {key.rpartition("/")[0] for key in state} == {name for name, _ in model.named_parameters()}
    assert {key.rpartition("/")[2] for key in state} == {"momentum_buffer", "exp_avg", "exp_avg_sq", "step"}
    assert all(isinstance(value, Tensor) for value in state.values())


def test_a_state_from_before_the_first_step_is_empty_and_loads():
    optimizer = Optimizer(randomised(config()), OptimConfig())
    optimizer.load({})
    assert optimizer.state() == {}


MATRIX = "blocks.0.mlp.up.weight/momentum_buffer"


def altered(state: dict[str, Tensor], how: str) -> dict[str, Tensor]:
    return {
        "missing": {key: value for key, value in state.items() if key != MATRIX},
        "missing adam": {key: value for key, value in state.items() if key != "head.weight/exp_avg"},
        "foreign": state | {"blocks.9.mlp.up.weight/momentum_buffer": state[MATRIX]},
        "foreign slot": state | {"head.weight/momentum_buffer": state["head.weight/exp_avg"]},
        "shape": state | {MATRIX: state[MATRIX].T.contiguous()},
        "step shape": state | {"head.weight/step": torch.zeros(3)},
    }[how]


@pytest.mark.parametrize(
    ("how", "names"),
    [
        ("missing", MATRIX), ("missing adam", "head.weight/exp_avg"), ("foreign", "blocks.9.mlp.up"),
        ("foreign slot", "head.weight/momentum_buffer"), ("shape", "(24, 96)"), ("step shape", "head.weight/step"),
    ],
)  # fmt: skip
def test_a_state_of_another_model_raises(how: str, names: str):
    model = randomised(config()).float()
    optimizer = Optimizer(model, OptimConfig())
    take_steps(model, optimizer, 0, 1)
    with pytest.raises(ValueError) as error:
        Optimizer(model, OptimConfig()).load(altered(optimizer.state(), how))
    assert names in str(error.value)
    assert "\n" not in str(error.value)


def test_the_share_scales_every_rate():
    moves = []
    for share in (1.0, 0.5):
        model = randomised(config())
        start = [p.detach().clone() for p in model.parameters()]
        ids = packed(model.config, 2, 8)
        ScheduledLoss(model, Schedule.parse("refinement-1"))(ids, ids.roll(-1, 1)).loss.backward()
        Optimizer(model, OptimConfig(), torch.float64).step(share)
        moves.append([p.detach() - x for p, x in zip(model.parameters(), start, strict=True)])
    assert all(torch.allclose(whole * 0.5, half, rtol=1e-9) for whole, half in zip(*moves, strict=True))


def test_shares_are_of_the_peak_whatever_came_before():
    optimizer = Optimizer(fixed(config()), OptimConfig())
    for share in (0.1, 1.0, 0.5):
        optimizer.step(share)
        assert [group["lr"] for group, _ in optimizer.peaks] == [peak * share for _, peak in optimizer.peaks]
    assert {peak for _, peak in optimizer.peaks} >= {OptimConfig().matrix_lr, OptimConfig().scalar_lr}


# The rate and the clip.


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0, 0.1), (4, 0.5), (9, 1.0), (10, 1.0), (60, 1.0), (61, 0.9755), (80, 0.51), (98, 0.069), (99, 0.0445)],
)
def test_rate_figures(step: int, expected: float):
    """100 steps: 10 of warm-up, 50 flat, 40 of decay that would reach 2 % at step 100."""
    assert math.isclose(rate(step, 100, OptimConfig(warmup=0.1, decay=0.4, final=0.02)), expected)


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 100])
@pytest.mark.parametrize(
    ("warmup", "decay", "final"), [(0, 0, 0), (0.01, 0.5, 0.02), (0.5, 0.5, 0), (0, 1, 0.1), (1, 0, 1)]
)
def test_rate_rises_then_falls_towards_final(steps: int, warmup: float, decay: float, final: float):
    chosen = OptimConfig(warmup=warmup, decay=decay, final=final)
    rates = [rate(step, steps, chosen) for step in range(steps)]
    assert all(0 <= share <= 1 for share in rates)
    peak = rates.index(max(rates))
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    if round(decay * steps) >= 1:
        assert math.isclose(rates[-1], final + (1 - final) / round(decay * steps))


def test_clip_scales_down_only_what_exceeds_the_norm():
    matrices = [nn.Parameter(x) for x in drawn(0)]
    for p, grad in zip(matrices, drawn(1), strict=True):
        p.grad = grad.clone()
    norm = math.sqrt(sum(grad.square().sum().item() for grad in drawn(1)))
    for limit, factor in ((None, 1.0), (2 * norm, 1.0), (norm / 4, 0.25)):
        assert math.isclose(clip(iter(matrices), limit).item(), norm, rel_tol=1e-5)  # an iterator is read once
        for p, grad in zip(matrices, drawn(1), strict=True):
            torch.testing.assert_close(p.grad, grad * factor, rtol=1e-4, atol=1e-6)


def test_a_skipped_step_changes_nothing():
    """Weights, momenta and step counts stay to the last bit, whatever the gradients; the next step is as if it had not
    been.
    """
    skipping, plain = trained_pair()
    for model, optimizer in (skipping, plain):
        if model is skipping[0]:
            before = {name: x.clone() for name, x in (model.state_dict() | optimizer.state()).items()}
            for p in model.parameters():
                p.grad = torch.full_like(p, math.nan)
            optimizer.step(1.0, torch.tensor(True))
            assert all(torch.equal(x, before[name]) for name, x in (model.state_dict() | optimizer.state()).items())
        learn(model, optimizer, torch.tensor(False))
    states = [model.state_dict() | optimizer.state() for model, optimizer in (skipping, plain)]
    assert all(torch.equal(x, states[1][name]) for name, x in states[0].items())


def learn(model: LRT, optimizer: Optimizer, skip: Tensor | None) -> None:
    ids = packed(model.config, 2, 8)
    ScheduledLoss(model, Schedule.parse("interleaved-2"))(ids, ids.roll(-1, 1)).loss.backward()
    optimizer.step(1.0, skip)


def trained_pair() -> list[tuple[LRT, Optimizer]]:
    """Two equal models one step away from their initialisation."""
    pairs = []
    for _ in range(2):
        model = LRT(config())
        optimizer = Optimizer(model, OptimConfig(weight_decay=0.1))
        learn(model, optimizer, torch.tensor(False))
        pairs.append((model, optimizer))
    return pairs


def test_replacing_a_rate_replaces_its_group_alone():
    base, other = OptimConfig(), replace(OptimConfig(), head_lr=0.5)
    peaks = [[lr for _, lr in Optimizer(fixed(config()), chosen).peaks] for chosen in (base, other)]
    assert sum(a != b for a, b in zip(*peaks, strict=True)) == 1
