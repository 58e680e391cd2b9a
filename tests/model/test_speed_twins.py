"""Twenty optimizer steps of the fast path and of its slow twin: the same losses. And how often blocks are compiled.

The slow twin has none of the hand-written backward passes: plain formulae, one dense mask over concatenated keys, all
logits at once.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import config, packed, randomised
from torch import Tensor
from torch._dynamo.utils import counters

import lrt.model.blocks
import lrt.model.state
import lrt.model.transformer
from lrt.config.model import Execution
from lrt.config.run import OptimConfig
from lrt.model.loss import ScheduledLoss, step_plan, token_nats
from lrt.model.lrt import LRT
from lrt.model.run_passes import run_passes
from lrt.schedule import Schedule
from lrt.training.optimizer import Optimizer

CONFIG = config(projection="shared", window_pattern="SL")
FAST = Execution()
RUNS = [(text, FAST) for text in ("interleaved-2", "interleaved-3", "refinement-1", "settled-1..3")]
RUNS += [("interleaved-2", Execution(recompute=True))]


def plain_rotation(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    (a, b), (cos, _), (sin, _) = (y.chunk(2, dim=-1) for y in (x, cos, sin))
    return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1)


@pytest.fixture
def slow(monkeypatch):
    """A switch to the plain formulae."""

    def switch() -> None:
        for module in (lrt.model.transformer, lrt.model.blocks):
            monkeypatch.setattr(module, "rms_norm", lambda x, eps: F.rms_norm(x, (x.shape[-1],), eps=eps))
        monkeypatch.setattr(lrt.model.blocks, "relu_squared", lambda x: F.relu(x).square())
        monkeypatch.setattr(
            lrt.model.blocks, "weighted_sum", lambda ws, xs: sum(w * x for w, x in zip(ws, xs, strict=True))
        )
        monkeypatch.setattr(lrt.model.blocks, "apply_rope", plain_rotation)
        monkeypatch.setattr(
            lrt.model.state, "split", lambda x, axis, cuts: [x[(slice(None),) * axis + (c,)] for c in cuts]
        )

    return switch


def fast_loss(model: LRT, ids: Tensor, targets: Tensor, schedule: Schedule, step: int) -> Tensor:
    return ScheduledLoss(model, schedule)(ids, targets, step=step).loss


def slow_loss(model: LRT, ids: Tensor, targets: Tensor, schedule: Schedule, step: int) -> Tensor:
    run = schedule.draw(0, step).passes(ids.shape[1])
    counts, losses = step_plan(targets, None, run).counts, []
    for p, written, _ in run_passes(model, ids, run, model.starts(ids)):
        if p.weight:
            losses.append(token_nats(model, written.hidden, targets[:, list(p.positions)]).sum() / counts[len(losses)])
    zero = sum(0.0 * p.sum() for p in model.memory_parameters())
    return torch.stack(losses).mean() + zero


def losses(loss, text: str, how: Execution, muon: bool) -> list[float]:
    """Of 20 steps."""
    model, schedule = LRT(CONFIG, seed=3), Schedule.parse(text)
    model.execution = how
    ids = packed(CONFIG, 2, 16)
    adam, both = torch.optim.AdamW(model.parameters(), lr=3e-3), Optimizer(model, OptimConfig())
    found = []
    for step in range(20):
        value = loss(model, ids, ids.roll(-1, 1), schedule, step)
        value.backward()
        found.append(value.item())
        if muon:
            both.step(1.0)
        else:
            adam.step()
            adam.zero_grad()
    return found


@pytest.mark.parametrize(("text", "how"), RUNS, ids=str)
def test_twenty_adamw_steps_lose_the_same_to_float32_rounding(text, how, slow):
    fast = losses(fast_loss, text, how, muon=False)
    slow()
    twin = losses(slow_loss, text, Execution(attention="masked"), muon=False)
    assert twin[-1] < twin[0] - 0.1
    assert max(abs(a - b) for a, b in zip(fast, twin, strict=True)) < 1e-4


@pytest.mark.parametrize("text", ["interleaved-2", "settled-1..3"])
def test_twenty_muon_steps_lose_the_same_to_a_thousandth(text, slow):
    """Newton-Schulz amplifies the rounding of small singular values, so that runs part sooner than with AdamW."""
    fast = losses(fast_loss, text, FAST, muon=True)
    slow()
    twin = losses(slow_loss, text, Execution(attention="masked"), muon=True)
    assert max(abs(a - b) for a, b in zip(fast, twin, strict=True)) < 1e-3


@pytest.fixture
def compiled(monkeypatch):
    """Blocks compiled by the tracer alone, without its slow code generator; counts graphs from 0."""
    torch._dynamo.reset()
    counters.clear()
    run = torch.compile(lrt.model.transformer._called, fullgraph=True, backend="eager")
    monkeypatch.setattr(lrt.model.transformer, "_compiled", lambda: run)
    yield lambda: counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


@pytest.mark.filterwarnings(  # of the compiler itself; the last one on Python 3.13.0 alone
    "ignore::DeprecationWarning", "ignore::UserWarning", "ignore:Guards may run slower:RuntimeWarning"
)
def test_blocks_are_compiled_once_per_kind_of_pass(compiled):
    """Not once per layer, pass, subset or draw: full and strided; and for sweeps, without gradient, with and without
    memory, then with both. The second stride compiles once more, for any size; a further one does not."""
    ids = packed(CONFIG, 2, 48)
    graphs = []
    for text in ("interleaved-4", "interleaved-6", "interleaved-3", "settled-1", "settled-3"):
        model = randomised(config(depth=2, window_pattern="L", value_embeddings="none"), seed=3)
        expected = fast_loss(model, ids, ids, Schedule.parse(text), 0)
        model.execution = Execution(compile=True)
        loss = fast_loss(model, ids, ids, Schedule.parse(text), 0)
        loss.backward()
        assert torch.allclose(loss, expected, rtol=1e-10)
        graphs.append(compiled())
    assert graphs == [2, 3, 3, 5, 6]
