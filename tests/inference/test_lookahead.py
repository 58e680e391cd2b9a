"""Guessing ahead changes nothing but the number of passes: the same tokens, log-probabilities and state."""

from __future__ import annotations

import pytest
import torch
from helpers import BOTH, SHIFT, config, randomised, tokens

from lrt.config.decoding import SamplingParams
from lrt.data.tokenizer import ByteTokenizer
from lrt.inference.batch import RunningBatch
from lrt.inference.chat import Conversation
from lrt.inference.drafts import MOST_WAIT, PromptLookup
from lrt.inference.generate import Generated, generate
from lrt.inference.lookahead import Lookahead

CONFIGS = {
    "window": config(window=4, source=2),
    "windows everywhere": config(window_pattern="S", last_layer="S", window=3, source=3),
    "last block": config(source=3, projection="shared", window_pattern="L"),
    "shift beside": BOTH,
    "shift": SHIFT,
    "from the first block": config(source=1, window_pattern="SSL", window=3, kv_heads=1),
}
REPEATED = [0, *[5, 6, 7, 8] * 4, 5, 6]


def run(cfg, prompts, sampling, drafts: int, samples: int = 1) -> list[Generated]:
    """All steps; every state is copied, since steps fill it in place."""
    model = randomised(cfg)
    steps = generate(model, prompts, sampling, samples=samples, mode="exact", drafts=drafts, capacity=64)
    every = torch.arange(len(prompts) * samples)
    return [Generated(s.emissions, s.cache.take(every)) for s in steps]


def same(a: list[Generated], b: list[Generated]) -> None:
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert [(e.row, e.token, e.finish) for e in x.emissions] == [(e.row, e.token, e.finish) for e in y.emissions]
        for e, f in zip(x.emissions, y.emissions, strict=True):
            assert e.logprob == pytest.approx(f.logprob, abs=1e-10)
        rows = [e.row for e in x.emissions]
        for old, new in zip(x.cache.per_row(), y.cache.per_row(), strict=True):
            torch.testing.assert_close(old[rows], new[rows], atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("name", CONFIGS)
def test_tokens_and_states_are_those_of_steps(name: str):
    for temperature in (0.0, 0.5):
        sampling = SamplingParams(max_new_tokens=20, temperature=temperature, seed=3, stop_tokens=(), top_p=0.9)
        plain, ahead = (run(CONFIGS[name], [REPEATED], sampling, drafts) for drafts in (0, 6))
        same(plain, ahead)


def test_rows_of_different_lengths_and_ends_look_ahead_together():
    cfg = CONFIGS["window"]
    prompts = [REPEATED, tokens(cfg, 1, 9)[0].tolist(), [0, 3, 3, 3]]
    sampling = [SamplingParams(max_new_tokens=n, temperature=0.2, seed=n, repetition_penalty=1.1) for n in (5, 14, 10)]
    plain, ahead = (run(cfg, prompts, sampling, drafts, samples=2) for drafts in (0, 5))
    same(plain, ahead)


def test_answers_end_where_the_state_is_full():
    sampling = SamplingParams(max_new_tokens=500, temperature=0.0, stop_tokens=())
    plain, ahead = (run(CONFIGS["last block"], [REPEATED], sampling, drafts) for drafts in (0, 8))
    same(plain, ahead)
    assert int(ahead[-1].cache.length[0]) == 64


def test_right_drafts_spare_passes(monkeypatch):
    """The model repeats itself under greedy decoding sooner or later; wrong drafts are made and dropped on the way."""
    looked: list[Lookahead] = []
    plain_init = RunningBatch.__init__

    def spy(self, *args, **options):
        plain_init(self, *args, **options)
        looked.append(self.lookahead)

    monkeypatch.setattr(RunningBatch, "__init__", spy)
    sampling = SamplingParams(max_new_tokens=46, temperature=0.0, stop_tokens=())
    for name in ("window", "shift"):
        run(CONFIGS[name], [REPEATED], sampling, 8)
    assert all(ahead.solves > 2 for ahead in looked)
    assert sum(ahead.accepted for ahead in looked) > sum(ahead.solves for ahead in looked)


def test_a_number_of_drafts_that_means_nothing_is_refused():
    with pytest.raises(ValueError, match="drafts is -1"):
        run(CONFIGS["shift"], [REPEATED], SamplingParams(), -1)


def test_a_conversation_with_drafts_says_the_same():
    tokenizer, model = ByteTokenizer(), randomised(config(vocab_size=257, bos=256, context=96))
    sampling = SamplingParams(max_new_tokens=12, temperature=0.4, seed=2, stop=("b",))
    plain, ahead = (Conversation(model, tokenizer, "exact", drafts) for drafts in (0, 4))
    for text in ("abcabcabc", "abcabc"):
        assert "".join(ahead.say(text, sampling)) == "".join(plain.say(text, sampling))
    assert (ahead.used, ahead.turns, ahead.pending) == (plain.used, plain.turns, plain.pending)


def test_a_draft_is_what_followed_the_longest_known_ending():
    assert PromptLookup([1, 2, 3, 9, 8, 1, 2, 3, 4, 5, 1, 2, 3], 2).draft(9) == [4, 5]
    assert PromptLookup([7, 1, 2, 3, 5, 6, 1, 2, 3, 4, 7, 1, 2, 3], 2).draft(9) == [5, 6]
    assert PromptLookup([1, 2, 3, 4], 5).draft(9) == []
    looped = PromptLookup([1, 2] * 3, 5)
    assert looped.draft(9) == [1, 2]
    looped.judge(2)
    assert looped.draft(9) == [1, 2, 1, 2, 1]
    assert looped.draft(1) == [1]
    assert looped.draft(0) == []


def test_drafts_that_fail_are_made_less_often():
    lookup, made = PromptLookup([1, 2] * 3, 8), 0
    for _ in range(200):
        if lookup.draft(8):
            made += 1
            lookup.judge(0)
        lookup.take(lookup.tokens[-2])
    assert 1 < made <= 6 + 200 // MOST_WAIT
    lookup.judge(3)
    assert len(lookup.draft(20)) == 8
    lookup.judge(1)
    assert len(lookup.draft(20)) == 4
