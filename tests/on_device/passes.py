"""A pass's parts, whole passes, and the step of the optimizer."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from helpers import SCHEDULES, packed
from torch import Tensor

from lrt.config.model import Execution, ModelConfig
from lrt.config.run import OptimConfig
from lrt.model.attention import Mask, attend, attention_mask
from lrt.model.cross_entropy import head_loss
from lrt.model.flex import block_mask
from lrt.model.loss import ScheduledLoss
from lrt.model.lrt import LRT
from lrt.model.ops import apply_rope, relu_squared, rms_norm, split, weighted_sum
from lrt.schedule import Schedule
from lrt.training.optimizer import Optimizer, clip
from on_device.common import CONFIG, DOCUMENTS, FLOATS, drawn, floats, graded, require_near, small

# The parts of a pass.

OPS = {
    "rms_norm": lambda a, b, c: rms_norm(a),
    "relu_squared": lambda a, b, c: relu_squared(a),
    "weighted_sum": lambda a, b, c: weighted_sum([a[0, 0, 0], b[..., :1]], [b, c]),
    "rotate": lambda a, b, c: apply_rope(a, b.detach(), torch.cat((c[..., :8], -c[..., :8]), -1).detach()),
    "split": lambda a, b, c: split(a, 1, (slice(0, 6, 2), slice(1, 6, 2)))[1],
}


@floats
@pytest.mark.parametrize("name", OPS)
def test_ops(name: str, kind: str, device: torch.device):
    """Each hand-written operation: value and gradients."""
    number, error = FLOATS[kind]
    inputs = [drawn(3, 6, 16, seed=seed) for seed in range(3)]

    def work(*xs: Tensor) -> Tensor:
        return OPS[name](*xs) + 0 * sum(x.sum() for x in xs)

    expected = graded(work, inputs, torch.device("cpu"), torch.float64)
    for got, exact in zip(graded(work, inputs, device, number), expected, strict=True):
        assert got.dtype == number
        require_near(got, exact, error, name)


@floats
@pytest.mark.parametrize("backend", ["masked", "flex"])
@pytest.mark.parametrize("case", ["strided", "window", "documents"])
def test_attention(case: str, backend: str, kind: str, device: torch.device):
    """A strided pass of 300 of 600 positions, by one mask and by FlexAttention; gradients where the device has them."""
    number, error = FLOATS[kind]
    q, k, v = drawn(2, 4, 300, 16), drawn(2, 2, 600, 16, seed=1), drawn(2, 2, 600, 16, seed=2)
    queries = torch.arange(1, 600, 2)
    keys = torch.cat((queries, torch.arange(0, 600, 2)))
    start = torch.stack([queries // 250 * 250, queries // 130 * 130]) if case == "documents" else None
    window = 90 if case == "window" else None

    def under(masks, on: torch.device) -> Mask:
        return masks(queries.to(on), keys.to(on), window, start if start is None else start.to(on))

    cpu = torch.device("cpu")
    expected = graded(lambda *x: attend(*x, under(attention_mask, cpu)), [q, k, v], cpu, torch.float64)
    if backend == "flex" and device.type != "cuda":  # FlexAttention has no gradient there
        with torch.no_grad():
            mask = under(block_mask, device)
            require_near(attend(*(x.to(device, number) for x in (q, k, v)), mask), expected[0], error)
        return
    mask = under(block_mask if backend == "flex" else attention_mask, device)
    for got, exact in zip(graded(lambda *x: attend(*x, mask), [q, k, v], device, number), expected, strict=True):
        require_near(got, exact, error, backend)


@floats
def test_head_loss(kind: str, device: torch.device):
    """Head and loss in one, against logits and cross-entropy; and a target that is no token."""
    number, error = FLOATS[kind]
    weight, hidden = drawn(29, 16), drawn(2, 7, 16, seed=1)
    targets = torch.randint(0, 29, (2, 7), generator=torch.Generator().manual_seed(0))

    def fused(w: Tensor, h: Tensor) -> Tensor:
        scales = torch.full((1,), 0.5, device=w.device)
        return head_loss(w, 15.0, [h], [targets.to(w.device)], scales)[0][None]

    def plain(w: Tensor, h: Tensor) -> Tensor:
        logits = 15 * torch.tanh(h @ w.T / 15)
        return 0.5 * F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")[None]

    expected = graded(plain, [weight, hidden], torch.device("cpu"), torch.float64)
    for got, exact in zip(graded(fused, [weight, hidden], device, number), expected, strict=True):
        require_near(got, exact, error)
    wrong = torch.full_like(targets, 29).to(device)
    scales, inputs = torch.ones(1, device=device), (weight.to(device, number), hidden.to(device, number))
    if device.type == "cpu":
        with pytest.raises(ValueError, match="target 29 is no token"):
            head_loss(inputs[0], None, [inputs[1]], [wrong], scales)
    else:
        assert head_loss(inputs[0], None, [inputs[1]], [wrong.clamp(max=29)], scales)[0].isnan()


# Whole passes.


def loss_and_gradients(model: LRT, schedule: str, number: torch.dtype) -> dict[str, Tensor]:
    """The loss of packed rows under a schedule, in mixed precision where `number` is lower, and every gradient."""
    model.zero_grad()
    ids = packed(model.config, 3, 24).to(model.device)
    mixed = number == torch.bfloat16
    with torch.autocast(model.device.type, number) if mixed else nullcontext():
        loss = ScheduledLoss(model, Schedule.parse(schedule))(ids, ids.roll(-1, 1)).loss
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters() if p.grad is not None}}


def require_same_step(got: dict[str, Tensor], expected: dict[str, Tensor], error: float) -> None:
    """All gradients as one vector, so that small ones may be coarse, and the loss, in which schedules differ less."""
    assert got.keys() == expected.keys()
    require_near(got["loss"], expected["loss"], error / 10, "loss")
    flat = [torch.cat([x[name].cpu().double().flatten() for name in x if name != "loss"]) for x in (got, expected)]
    require_near(flat[0], flat[1], error, "the gradient")


@floats
@pytest.mark.parametrize("schedule", [*SCHEDULES, "hop-1"])
def test_schedules(schedule: str, kind: str, device: torch.device):
    """Every schedule's loss and gradients, in float32 and mixed precision, against float64."""
    number, error = FLOATS[kind]
    expected = loss_and_gradients(small(), schedule, torch.float64)
    model = small().float().to(device)
    require_same_step(loss_and_gradients(model, schedule, number), expected, error)


@pytest.mark.parametrize("cfg", [CONFIG, DOCUMENTS], ids=["rows", "documents"])
@pytest.mark.parametrize("how", [{"attention": "masked"}, {"recompute": True}, {"attention": "flex"}], ids=str)
def test_executions(how: dict, cfg: ModelConfig, device: torch.device):
    """How passes are computed changes nothing; FlexAttention with gradient on cuda alone."""
    if how.get("attention") == "flex" and device.type != "cuda":
        pytest.skip("FlexAttention has no gradient here; tests/model/test_flex.py lifts that guard")
    expected = loss_and_gradients(small(cfg), "interleaved-2", torch.float64)
    model = small(cfg).float().to(device)
    model.execution = Execution(**how)
    require_same_step(loss_and_gradients(model, "interleaved-2", torch.float32), expected, 1e-3)


@floats
@pytest.mark.parametrize("attention", ["auto", "flex"])
@pytest.mark.parametrize("schedule", ["interleaved-2", "settled-1"])
def test_compiled_blocks(schedule: str, attention: str, kind: str, compiling: torch.device):
    """`train.compile` changes nothing, with either attention."""
    if attention == "flex" and compiling.type != "cuda":
        pytest.skip("FlexAttention has no gradient here")
    expected = loss_and_gradients(small(DOCUMENTS), schedule, torch.float64)
    model = small(DOCUMENTS).float().to(compiling)
    model.execution = Execution(attention=attention, compile=True)
    number, error = FLOATS[kind]
    require_same_step(loss_and_gradients(model, schedule, number), expected, error)


def test_optimizer(device: torch.device):
    """Three steps of Muon and AdamW with clipping move the weights as on the CPU."""
    states = []
    for on in (torch.device("cpu"), device):
        model = small().float().to(on)
        optimizer = Optimizer(model, OptimConfig(), torch.float32)
        for _ in range(3):
            loss_and_gradients(model, "settled-1", torch.float32)
            clip(model.parameters(), 1.0)
            optimizer.step(1.0, torch.zeros((), dtype=torch.bool, device=on))
        states.append(torch.cat([p.flatten() for p in model.parameters()]))
    require_near(states[1], states[0], 2e-3, "the weights")
