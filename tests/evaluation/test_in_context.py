"""The in-context score: which positions are early and late, and which targets count."""

from __future__ import annotations

import math

import pytest
import torch

from lrt.evaluation.in_context import in_context_score


def test_it_is_the_second_sixteenth_less_the_last_quarter():
    nats = torch.arange(32.0).expand(3, 32)
    scored = torch.ones_like(nats, dtype=torch.bool)
    assert in_context_score(nats, scored) == pytest.approx((2 + 3) / 2 - (24 + 31) / 2)


def test_targets_that_are_ignored_do_not_count():
    nats, scored = torch.arange(32.0).repeat(3, 1), torch.ones(3, 32, dtype=torch.bool)
    nats[1:], scored[1:] = 0.0, False
    assert in_context_score(nats, scored) == pytest.approx(2.5 - 27.5)
    scored[0, 2:4] = False
    assert math.isnan(in_context_score(nats, scored))


def test_a_row_too_short_for_early_and_late_is_refused():
    with pytest.raises(ValueError, match="rows of 15 positions are too short"):
        in_context_score(torch.zeros(1, 15), torch.ones(1, 15, dtype=torch.bool))
