"""Sweeps against exact decoding: keys, values, distributions by the oracle; exact after as many sweeps as tokens."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import CORNERS, VARIANTS, config, fixed, label, packed, passes, slow_passes
from torch import Tensor

from lrt.evaluation import bits_per_byte as evaluation
from lrt.evaluation.bits_per_byte import HeldOut, Rows, ScoredText, evaluate
from lrt.evaluation.contraction import SWEEPS, SweepErrors, contraction, exact_states, sweep_errors
from lrt.inference import generate as scoring
from lrt.model.lrt import LRT
from lrt.model.reference import reference
from lrt.model.run_passes import run_passes
from lrt.schedule import Schedule

LENGTH = 7
RECURRENT = [cfg for cfg in [*VARIANTS, *CORNERS] if cfg.memory.recurrent]


def compared(cfg, rows: int = 2, length: int = LENGTH) -> tuple[LRT, Tensor, SweepErrors]:
    model, ids = fixed(cfg), packed(cfg, rows, length)
    return model, ids, sweep_errors(model, ids, model.starts(ids), exact_states(model, ids))


@pytest.mark.parametrize("cfg", RECURRENT, ids=label)
def test_exact_states_are_the_oracles(cfg):
    model, ids = fixed(cfg), packed(cfg, 2, LENGTH)
    found = exact_states(model, ids)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    for row, hidden in zip(ids.tolist(), found.hidden, strict=True):
        torch.testing.assert_close(model.logits(hidden), reference(weights, cfg, row)[0], rtol=1e-9, atol=1e-9)
        states = slow_passes(model, row, passes("sequential", LENGTH))
    torch.testing.assert_close(found.memory[-1], torch.cat([m for _, m in states]), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("cfg", RECURRENT, ids=label)
def test_sweeps_are_right_after_as_many_as_positions(cfg):
    """And not before: each makes one more position exact, so errors fall to rounding, agreement rises to 1."""
    _, _, found = compared(cfg)
    error = found.kv[..., 0] / found.kv[..., 1]
    assert (error[:, 0] > 1e-6).all() and (found.kl[:, 0] > 1e-6).all()
    assert (error[:, LENGTH - 1 :] < 1e-24).all() and (found.kl[:, LENGTH - 1 :].abs() < 1e-12).all()
    assert (found.agreement[:, LENGTH - 1 :] == 1).all()


@pytest.mark.parametrize("cfg", [config(), config(projection="shared", shift=True), CORNERS[1]], ids=label)
def test_figures_are_those_of_the_oracle(cfg):
    """Distributions one token at a time; keys and values against passes folded without this module."""
    model, ids, found = compared(cfg)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    for row, line in enumerate(ids.tolist()):
        truth = reference(weights, cfg, line)[0]
        for k, (logits, _) in enumerate(slow_passes(model, line, passes("refinement-3", LENGTH))):
            kl = [
                sum(p * (math.log(p) - math.log(q)) for p, q in zip(ps, qs, strict=True))
                for ps, qs in zip(truth.softmax(-1).tolist(), logits.softmax(-1).tolist(), strict=True)
            ]
            same = [int(a.argmax()) == int(b.argmax()) for a, b in zip(truth, logits, strict=True)]
            assert found.kl[row, k].item() == pytest.approx(sum(kl) / LENGTH, rel=1e-7, abs=1e-12)
            assert found.agreement[row, k].item() == pytest.approx(sum(same) / LENGTH)
    with torch.no_grad():
        exact = last_keys_values(model, ids, "sequential")
        for k in range(3):
            here = last_keys_values(model, ids, f"refinement-{k}" if k else "parallel")
            error = sum((a - b).square().sum((1, 2, 3)) for a, b in zip(here, exact, strict=True))
            torch.testing.assert_close(found.kv[:, k, 0], error, rtol=1e-8, atol=1e-14)
            norm = sum(b.square().sum((1, 2, 3)) for b in exact)
            torch.testing.assert_close(found.kv[:, k, 1], norm, rtol=1e-8, atol=0)


def last_keys_values(model: LRT, ids: Tensor, text: str) -> list[Tensor]:
    """Newest keys and values of every block, [B, K, T, E] each."""
    newest: dict[tuple[int, int], Tensor] = {}
    for p, written, _ in run_passes(model, ids, passes(text, ids.shape[1]), model.starts(ids)):
        for i, x in enumerate([*written.keys, *written.values]):
            for j, t in enumerate(p.positions):
                newest[i, t] = x[:, :, j]
    return [torch.stack([newest[i, t] for t in range(ids.shape[1])], dim=2) for i in range(2 * model.config.layers)]


def of(rows: Rows) -> HeldOut:
    return HeldOut(rows, ScoredText("a text", 0.25))


def test_in_parts_it_is_the_same(monkeypatch):
    """However many logits, keys and values exist at a time."""
    rows = Rows(packed(config(), 3, LENGTH), packed(config(), 3, LENGTH, seed=1), packed(config(), 3, LENGTH) == 0,
                torch.ones(3, LENGTH, dtype=torch.int64))  # fmt: skip
    whole = evaluate(fixed(config()), Schedule.parse("settled-2"), of(rows))
    assert len(whole.kl) == SWEEPS + 1 and whole.kv_errors[1] > whole.kv_errors[4] > 0
    monkeypatch.setattr(scoring, "LOGITS_AT_ONCE", 1)
    monkeypatch.setattr(evaluation, "KEYS_AT_ONCE", 1)
    parts = evaluate(fixed(config()), Schedule.parse("settled-2"), of(rows))
    for name in ("kl", "kv_errors", "argmax_agreement"):
        assert getattr(parts, name) == pytest.approx(getattr(whole, name), rel=1e-9, abs=1e-14), name
    monkeypatch.setattr(evaluation, "COMPARED", 1)
    first = evaluate(fixed(config()), Schedule.parse("settled-2"), of(rows))
    alone = evaluate(fixed(config()), Schedule.parse("settled-2"), of(Rows(*(x[:1] for x in rows))))
    assert first.kl == pytest.approx(alone.kl) and first.rows == 3


@pytest.mark.parametrize(
    ("residuals", "rate"),
    [([0.8, 0.4, 0.2, 0.1], 0.5), ([0.1, 0.01, 1e-9, 0.0], 0.1), ([0.1, 0.4], 4.0), ([1e-9], 0.0), ([], 0.0)],
)
def test_contraction_is_the_mean_factor_while_there_is_change(residuals: list[float], rate: float):
    assert contraction(residuals) == pytest.approx(rate)
