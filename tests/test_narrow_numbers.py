"""Numbers narrower than float32, and numbers that are none: every way of taking text in stops where rounding does."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from helpers import config, packed, randomised, tokens

from lrt.benchmarks import latency
from lrt.config.decoding import SamplingParams
from lrt.config.run import to_dict
from lrt.data.synthetic import TaskRows
from lrt.data.tokenizer import ByteTokenizer
from lrt.evaluation.bits_per_byte import Rows, bits_per_byte
from lrt.evaluation.contraction import contraction, exact_states, sweep_errors
from lrt.evaluation.likelihood import Candidate, likelihoods
from lrt.evaluation.memory_analysis import ablations
from lrt.evaluation.task_accuracy import accuracy
from lrt.inference import weights
from lrt.inference.chat import complete
from lrt.inference.generate import generate, score
from lrt.inference.prefill import prefill
from lrt.inference.weights import with_weights
from lrt.model import recurrence
from lrt.model.lrt import LRT
from lrt.model.recurrence import ROUNDING
from lrt.serve.engine import Engine
from lrt.serve.inspect import score as inspected
from lrt.serve.metrics import Metrics
from lrt.serve.settings import Settings

CFG = config(vocab_size=257, bos=256, window_pattern="L", context=64)


def narrow(kind: str, monkeypatch) -> LRT:
    """A model whose memory settles, in a narrow type."""
    model = randomised(CFG, scale=0.2).eval().requires_grad_(False)
    if kind == "int8":
        monkeypatch.setattr(weights, "LEAST", 1)
        monkeypatch.setattr(weights, "ALIGNED", 8)
        monkeypatch.setattr(weights, "int8_matmul", weights.int8_product)
        return with_weights(model.float(), "int8")
    return model.to(torch.bfloat16 if kind == "bfloat16" else torch.float16)


def through_transformers(model: LRT, rows: torch.Tensor) -> None:
    hf = pytest.importorskip("lrt.integrations.hf")
    wrapped = hf.LRTForCausalLM(hf.LRTConfig(lrt=to_dict(CFG), prefill="sweeps")).to(model.stream_dtype).eval()
    wrapped.model.core.load_state_dict(model.state_dict())
    with torch.no_grad():
        wrapped(rows)


def ways(model: LRT) -> dict[str, Callable[[], object]]:
    """Everything that takes text in by sweeps, to be called."""
    rows = tokens(CFG, 2, 24)
    targets = Rows(rows, rows, rows == CFG.bos, torch.ones_like(rows))
    few = SamplingParams(max_new_tokens=2)
    return {
        "model": lambda: model(rows),
        "prefill": lambda: prefill(model, rows),
        "score": lambda: score(model, rows, rows),
        "generate": lambda: next(generate(model, rows.tolist())),
        "complete": lambda: list(complete(model, ByteTokenizer(), "what is said here", few)),
        "likelihoods": lambda: likelihoods(model, [Candidate(rows[0].tolist(), 3)]),
        "accuracy": lambda: accuracy(model, TaskRows("parity", 1), 24, 2, "interleaved-8"),
        "ablations": lambda: ablations(model, targets),
        "inspect": lambda: list(inspected(model, rows[0].tolist(), 1, "jacobi")),
        "bench": lambda: latency._take_in(model, rows, latency.prefill_options(model, "jacobi")),
        "transformers": lambda: through_transformers(model, rows),
    }


@pytest.mark.parametrize("kind", ["bfloat16", "float16", "int8"])
def test_every_way_of_taking_text_in_stops_where_rounding_does(kind: str, monkeypatch):
    """Below that no row would settle: everything would be taken in token by token, and called swept."""
    model = narrow(kind, monkeypatch)
    floor, plans = ROUNDING[torch.float16 if kind == "float16" else torch.bfloat16], []
    settle = recurrence.settle

    def watched(model, ids, count, cache, plan):
        plans.append(plan.tolerance)
        return settle(model, ids, count, cache, plan)

    monkeypatch.setattr(recurrence, "settle", watched)
    for name, way in ways(model).items():
        if kind == "int8" and name in ("ablations", "transformers"):
            continue  # neither takes matrices in 8 bits
        plans.clear()
        way()
        assert plans and min(plans) >= floor, name
    assert Engine(model, Settings(), lambda ids: b"", Metrics()).plan.tolerance >= floor


@pytest.fixture
def unsound() -> LRT:
    """A model one of whose logits is no number."""
    model = randomised(CFG).eval().requires_grad_(False)
    model.head_matrix()[3] = math.nan  # pyright: ignore
    return model


def test_logits_that_are_not_finite_are_not_scored(unsound: LRT):
    """The largest of such logits names an answer all the same: half of parity's would be right."""
    one, rows = Candidate([0, 1, 2], 1), packed(CFG, 2, 8)
    for score_it in (lambda: likelihoods(unsound, [one]), lambda: accuracy(unsound, TaskRows("parity", 1), 8, 2)):
        with pytest.raises(ValueError, match="logits are not finite, so nothing is scored; use an earlier checkpoint"):
            score_it()
    nats = score(unsound, rows, rows, mode="exact").nats
    assert math.isnan(bits_per_byte(nats, torch.ones_like(rows)))
    found = sweep_errors(unsound, rows, unsound.starts(rows), exact_states(unsound, rows))
    assert found.agreement.isnan().all() and found.kl.isnan().all()


@pytest.mark.parametrize("residuals", [[math.nan, 0.1], [0.1, math.inf, 0.01], [0.1, math.nan]])
def test_a_contraction_of_what_is_not_finite_is_none(residuals: list[float]):
    assert math.isnan(contraction(residuals))
