"""Likelihoods of continuations: batches of padded rows give what one text at a time gives, token by token."""

from __future__ import annotations

import pytest
import torch
from helpers import config, randomised

from lrt.evaluation.likelihood import Candidate, Likelihood, likelihoods, of_like_length
from lrt.model.lrt import LRT
from lrt.model.recurrence import states


@torch.no_grad()
def slow(model: LRT, candidate: Candidate, mode: str) -> Likelihood:
    """One text alone, every position through the head."""
    ids = torch.tensor([candidate.ids[-model.config.context - 1 :]])
    hidden = torch.cat([h for _, h, _ in states(model, ids[:, :-1], mode=mode)], dim=1)
    logits, targets = model.logits(hidden)[0, -candidate.scored :], ids[0, -candidate.scored :]
    chosen = logits.log_softmax(-1)[torch.arange(candidate.scored), targets]
    return Likelihood(float(chosen.sum()), bool((logits.argmax(-1) == targets).all()))


@pytest.mark.parametrize("mode", ["exact", "zero_memory", "jacobi"])
@pytest.mark.parametrize("positions", [1, 60, 4096])
def test_batches_equal_one_text_at_a_time(mode: str, positions: int):
    model = randomised(config(context=40))
    with torch.random.fork_rng():
        torch.manual_seed(1)
        sizes = [2, 3, 9, 9, 17, 30, 41, 55]
        ids = [torch.randint(1, 19, (n,)).tolist() for n in sizes]
    asked = [Candidate(some, min(1 + i * 3, len(some) - 1, 40)) for i, some in enumerate(ids)]
    asked.append(greedy_one(model, mode))
    found = likelihoods(model, asked, mode, positions)
    expected = [slow(model, one, mode) for one in asked]
    tolerance = 1e-3 if mode == "jacobi" else 1e-10
    assert [f.logprob for f in found] == pytest.approx([e.logprob for e in expected], abs=tolerance)
    assert [f.greedy for f in found] == [e.greedy for e in expected]
    assert found[-1].greedy and not all(f.greedy for f in found)


def greedy_one(model: LRT, mode: str) -> Candidate:
    """A text that the model would write itself after its first token."""
    ids = [0]
    for _ in range(3):
        *_, (_, hidden, _) = states(model, torch.tensor([ids]), mode=mode)
        ids.append(int(model.logits(hidden)[0, -1].argmax()))
    return Candidate(ids, 3)


def test_what_fits_no_context_is_refused():
    model = randomised(config(context=40))
    with pytest.raises(ValueError, match="a continuation has 41 tokens, the model's context 40"):
        likelihoods(model, [Candidate([0, 1], 1), Candidate([1] * 60, 41)], "exact")
    with pytest.raises(ValueError, match="no token before it"):
        likelihoods(model, [Candidate([0, 1], 1), Candidate([1, 2], 2)], "exact")
    assert likelihoods(model, [], "exact") == []


def test_rows_of_like_length_stand_together_and_none_is_left_out():
    batches = list(of_like_length([3, 50, 4, 2, 49], 100))
    assert batches == [[1, 4], [2, 0, 3]]
    assert list(of_like_length([8, 7], 1)) == [[0], [1]]
