"""The model as a caller meets it: `model(tokens)`, one pass against any state, initialisation, roles, adapters."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers import BOTH, CORNERS, LLAMA, SHIFT, VARIANTS, config, fixed, label, packed, passes, randomised, tokens
from torch import Tensor, nn

from lrt.config.decoding import SamplingParams
from lrt.config.model import ModelConfig
from lrt.inference.generate import generate, score
from lrt.model.kv_cache import KVCache
from lrt.model.loss import ScheduledLoss, token_nats
from lrt.model.lrt import LRT
from lrt.model.parameters import role
from lrt.model.reference import reference
from lrt.model.run_passes import run_passes
from lrt.model.shapes import IGNORE
from lrt.model.state import Buffer
from lrt.schedule import Schedule

SOME = pytest.mark.parametrize("cfg", [config(), SHIFT, BOTH, CORNERS[-1]], ids=label)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


def truth(model: LRT, rows: Tensor) -> Tensor:
    weights = {name: p.detach() for name, p in model.named_parameters()}
    return torch.stack([reference(weights, model.config, row.tolist()).logits for row in rows])


# model(tokens).


@SOME
@pytest.mark.parametrize("mode", [None, "exact", "jacobi", "interleaved-3"])
def test_a_call_gives_the_logits_of_the_decoded_model(mode, cfg: ModelConfig):
    model, rows = fixed(cfg), tokens(cfg, 2, 9)
    with torch.no_grad():
        close(model(rows, mode=mode, tolerance=1e-13), truth(model, rows))


@SOME
def test_a_call_with_gradient_is_exact_and_differentiable(cfg: ModelConfig):
    """The slope of the decoded logits along a random direction of all parameters, against a central difference."""
    model, rows = randomised(cfg), tokens(cfg, 2, 5)
    weight = torch.randn(2, 5, cfg.vocab_size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits = model(rows)
    close(logits.detach(), truth(model, rows))
    grads = torch.autograd.grad((logits * weight).sum(), list(model.parameters()))
    random, ends = torch.Generator().manual_seed(1), []
    ways = [torch.randn(p.shape, generator=random, dtype=p.dtype) for p in model.parameters()]
    for sign in (1, -2):
        with torch.no_grad():
            for p, way in zip(model.parameters(), ways, strict=True):
                p.add_(way, alpha=sign * 1e-6)
        ends.append((truth(model, rows) * weight).sum())
    claimed = sum((g * way).sum() for g, way in zip(grads, ways, strict=True))
    assert claimed == pytest.approx(((ends[0] - ends[1]) / 2e-6).item(), rel=1e-5)


def test_sweeps_refuse_a_gradient_in_one_sentence():
    model, rows = randomised(config()), tokens(config(), 1, 4)
    with pytest.raises(ValueError, match="no gradient flows through prefill mode jacobi.*exact.*ScheduledLoss"):
        model(rows, mode="jacobi")
    model.requires_grad_(False)
    close(model(rows, mode="jacobi", tolerance=1e-13), truth(model, rows))


@pytest.mark.parametrize("graded", [False, True])
def test_bad_calls_name_what_is_wrong(graded: bool):
    for cfg in (config(), SHIFT):
        model = randomised(cfg).requires_grad_(graded)
        with pytest.raises(ValueError, match="token 19 is outside the vocabulary of 19"):
            model(torch.tensor([[1, 19]]))
        with pytest.raises(ValueError, match="at least 1 token"):
            model(torch.zeros(1, 0, dtype=torch.int64))
        with pytest.raises(ValueError, match="'often' is unknown"):
            model(torch.tensor([[1, 2]]), mode="often")


def test_zero_memory_is_one_parallel_pass():
    model, rows = randomised(config()), tokens(config(), 2, 6)
    (_, written, _) = next(run_passes(model, rows, passes("parallel", 6), model.starts(rows)))
    close(model(rows, mode="zero_memory"), model.logits(written.hidden))
    assert (model(rows, mode="zero_memory") - model(rows)).abs().max() > 1e-3


# One pass.


@SOME
def test_one_pass_alone_is_the_parallel_schedules(cfg: ModelConfig):
    model, rows = fixed(cfg), tokens(cfg, 2, 6)
    written, buffer = model.run_pass(rows)
    (_, expected, _) = next(run_passes(model, rows, passes("parallel", 6)))
    close(written.hidden, expected.hidden)
    assert [s.positions for s in buffer.segments] == [range(6)]


@SOME
@pytest.mark.parametrize("text", ["interleaved-3", "chunked-2", "sequential", "refinement-1"])
def test_passes_one_by_one_are_the_schedule(text: str, cfg: ModelConfig):
    """Each with its positions and the state that the one before left: nothing is fetched or written by hand."""
    model, rows, state = fixed(cfg), packed(cfg, 2, 6), None
    starts = rows == 0
    for p, expected, _ in run_passes(model, rows, passes(text, 6), starts):
        at = p.positions
        written, state = model.run_pass(rows[:, list(at)], at, state, starts[:, list(at)])
        if expected.hidden is not None:
            close(written.hidden, expected.hidden)


@SOME
def test_one_pass_against_a_cache_decodes_a_token(cfg: ModelConfig):
    model, rows = fixed(cfg), tokens(cfg, 2, 6)
    cache, found = KVCache.empty(model, 2, 6), []
    with torch.no_grad():
        for t in range(6):
            written, cache = model.run_pass(rows[:, t : t + 1], state=cache, starts=model.starts(rows[:, t : t + 1]))
            found.append(model.logits(written.hidden))
    close(torch.cat(found, dim=1), truth(model, rows))
    assert cache.length.tolist() == [6, 6] and cache.last_token.tolist() == rows[:, -1].tolist()


# An initialised model.


def test_a_model_is_initialised_where_the_default_device_says():
    cfg = config()
    model = LRT(cfg, seed=3)
    assert all(p.isfinite().all() for p in model.parameters())
    with torch.device("meta"):
        empty = LRT(cfg)
    assert all(p.is_meta for p in empty.parameters())
    assert all(p.is_meta for p in LRT(cfg, "meta").parameters())
    same = LRT(cfg, "cpu", 3).state_dict()
    assert all(torch.equal(x, same[name]) for name, x in model.state_dict().items())
    assert model(tokens(cfg, 1, 4)).shape == (1, 4, cfg.vocab_size)


# Roles.


@pytest.mark.parametrize("cfg", VARIANTS + CORNERS, ids=label)
def test_the_role_of_a_parameter_is_that_of_the_module_that_holds_it(cfg: ModelConfig):
    """Told by the modules' classes and the parameters' shapes, not by names."""
    model, expected = fixed(cfg), {}
    for path, module in model.named_modules():
        for kind, p in module.named_parameters(recurse=False):
            name = f"{path}.{kind}"
            if kind == "bias":
                expected[name] = "bias"
            elif type(module).__name__ == "Norm":
                expected[name] = "norm"
            elif type(module).__name__ == "ResidualInjection":
                expected[name] = "gamma" if "gamma" in kind else "scalar"
            elif isinstance(module, nn.Embedding):
                expected[name] = "embedding" if module is model.embedding else "value embedding"
            elif module is model.head:
                expected[name] = "head"
            elif any(module is block.attention.gate for block in model.blocks):
                expected[name] = "gate"
            else:
                inside = type(model.get_submodule(path.rpartition(".")[0])).__name__ == "MemoryProjection"
                expected[name] = "memory matrix" if inside else "matrix"
                assert p.ndim == 2
    assert {name: role(name) for name, _ in model.named_parameters()} == expected


# Adapters.


class Adapter(nn.Module):
    """A low-rank addition to a module (as LoRA)."""

    def __init__(self, base: nn.Module, rows: int, columns: int):
        super().__init__()
        random = torch.Generator().manual_seed(4)
        self.base = base
        self.a = nn.Parameter(torch.randn(columns, 2, generator=random, dtype=torch.float64))
        self.b = nn.Parameter(torch.randn(2, rows, generator=random, dtype=torch.float64))


class LinearAdapter(Adapter):
    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.a @ self.b


class EmbeddingAdapter(Adapter):
    def forward(self, ids: Tensor) -> Tensor:
        return self.base(ids) + F.embedding(ids, self.b.T) @ self.a.T


def adapted(tied: bool) -> tuple[LRT, LRT]:
    """A model with an adapter on its head, and the same with the adapter's product added to the matrix."""
    cfg = config(backbone=replace(LLAMA, tied=True), source=3) if tied else config()
    model = randomised(cfg)
    fused, v, d = deepcopy(model), cfg.vocab_size, cfg.d
    if tied:
        model.embedding = EmbeddingAdapter(model.embedding, v, d)
        addition, matrix = (model.embedding.a @ model.embedding.b).T, fused.embedding.weight
    else:
        model.head = LinearAdapter(model.head, v, d)
        addition, matrix = (model.head.a @ model.head.b).T, fused.head.weight
    with torch.no_grad():
        matrix.add_(addition)
    return model, fused


@pytest.mark.parametrize("tied", [False, True])
def test_an_adapter_on_the_head_acts_in_loss_logits_and_generation(tied: bool):
    model, fused = adapted(tied)
    rows = packed(model.config, 2, 8)
    aims = rows.roll(-1, 1)
    aims[:, 3] = IGNORE
    for text in ("interleaved-2", "settled-1"):
        found, expected = (ScheduledLoss(m, Schedule.parse(text))(rows, aims) for m in (model, fused))
        close(found.loss, expected.loss)
        close(found.per_pass, expected.per_pass)
    found.loss.backward()
    trained = model.embedding if tied else model.head
    assert trained.a.grad.abs().max() > 1e-6 and trained.b.grad.abs().max() > 1e-6
    with torch.no_grad():
        close(model(rows), fused(rows))
    close(score(model, rows, aims).nats, score(fused, rows, aims).nats)
    ways = SamplingParams(temperature=0, max_new_tokens=6, stop_tokens=())
    texts = [[e.token for step in generate(m, [[1, 2, 3]], ways) for e in step.emissions] for m in (model, fused)]
    assert texts[0] == texts[1]


def test_a_hook_on_the_head_acts_in_the_loss():
    model, rows = randomised(config()), packed(config(), 2, 8)
    loss = ScheduledLoss(model, Schedule.parse("parallel"))
    before = loss(rows, rows).loss
    hook = model.head.register_forward_hook(lambda module, inputs, out: 2 * out)
    (_, written, _) = next(run_passes(model, rows, passes("parallel", 8), model.starts(rows)))
    close(loss(rows, rows).loss, token_nats(model, written.hidden, rows).mean())
    assert abs(loss(rows, rows).loss - before) > 1e-3
    hook.remove()
    assert loss(rows, rows).loss == before


def test_a_hook_on_the_heads_gradient_acts_and_so_does_a_forward_of_its_own():
    model, rows = randomised(config()), packed(config(), 2, 8)
    loss = ScheduledLoss(model, Schedule.parse("settled-2"))
    seen: list[str] = []
    hooks = [
        model.head.register_full_backward_pre_hook(lambda module, grads: seen.append("before")),
        model.head.register_full_backward_hook(lambda module, inputs, outputs: seen.append("after")),
    ]
    loss(rows, rows).loss.backward()
    assert seen == ["before", "after"]
    for hook in hooks:
        hook.remove()
    before, forward = loss(rows, rows).loss, model.head.forward
    model.head.forward = lambda hidden: 2 * forward(hidden)
    assert abs(loss(rows, rows).loss - before) > 1e-3


def test_buffers_are_read_through_their_state_alone():
    """A buffer handed on after a pass is a value: what was read before does not change with it."""
    model, rows = fixed(config()), packed(config(), 2, 6)
    _, first = model.run_pass(rows)
    kept = first.memory(range(1, 7)).clone()
    model.run_pass(rows[:, ::2], range(0, 6, 2), first)
    assert torch.equal(first.memory(range(1, 7)), kept)
    assert Buffer().memory(range(6)) is None
