"""What all prompts begin with is taken in once, and nobody can tell from the answers."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from helpers import BELOW, BOTH, SHIFT, VARIANTS, close, config, generated, label, randomised, tokens

from lrt.config.decoding import PrefillOptions, SamplingParams
from lrt.inference import generate as module
from lrt.inference.generate import SHARED_FROM

EXACT = [PrefillOptions.parse("exact"), PrefillOptions.parse("jacobi", 1e-13, max_sweeps=50, chunk=7)]
NARROW = config(window_pattern="S", last_layer="S", document_attention=True)
MODELS = [*VARIANTS[::3], SHIFT, BOTH, NARROW, *BELOW]
LAW = SamplingParams(max_new_tokens=6, stop_tokens=(), seed=1, repetition_penalty=1.3)
answers = partial(generated, sampling=LAW)


@pytest.fixture
def widths(monkeypatch) -> list[tuple[int, int]]:
    """Rows and columns of every prefill."""
    seen, prefill = [], module.prefill

    def recorded(model, rows, **options):
        seen.append(tuple(rows.shape))
        return prefill(model, rows, **options)

    monkeypatch.setattr(module, "prefill", recorded)
    return seen


@pytest.mark.parametrize("mode", EXACT, ids=["exact", "jacobi"])
@pytest.mark.parametrize("cfg", MODELS, ids=map(label, MODELS))
def test_answers_are_those_of_prompts_taken_in_alone(cfg, mode, widths):
    """Ragged ends, one of a single token; documents start in the beginning and after it."""
    model, rows = randomised(cfg), tokens(cfg, 3, 34)
    shared, ends = rows[0, :25].tolist(), [rows[i, 25 : 26 + 4 * i].tolist() for i in range(3)]
    prompts = [shared + end for end in ends]
    prompts[0][-1], prompts[1][25] = 1, 2  # the beginning ends where it was meant to
    together = answers(model, prompts, mode=mode, samples=2)
    assert widths == [(1, 25), (3, 9)]
    for i, prompt in enumerate(prompts):
        apart = answers(model, [prompt], mode=mode, samples=2)
        for made, alone in zip(together[2 * i : 2 * i + 2], apart, strict=True):
            assert [t for t, _ in made] == [t for t, _ in alone]
            close(torch.tensor([p for _, p in made]), torch.tensor([p for _, p in alone]))


def test_equal_prompts_leave_one_token_each_and_short_beginnings_are_not_split(widths):
    model = randomised(config())
    whole = tokens(config(), 1, SHARED_FROM + 1)[0].tolist()
    answers(model, [whole, whole])
    assert widths == [(1, SHARED_FROM), (2, 1)]
    widths.clear()
    answers(model, [whole[1:], whole[1:]])
    assert widths == [(2, SHARED_FROM)]


def test_a_prompt_that_does_not_fit_or_is_wrong_is_refused_before_any_work(widths):
    model = randomised(config())
    shared = tokens(config(), 1, 30)[0].tolist()
    with pytest.raises(ValueError, match="bring its row to 33 tokens"):
        answers(model, [[*shared, 1, 2, 3], [*shared, 4]], capacity=31)
    assert widths == [(2, 33)]
    with pytest.raises(ValueError, match="99"):
        answers(model, [[*shared, 99], shared])
    assert widths == [(2, 33)]
