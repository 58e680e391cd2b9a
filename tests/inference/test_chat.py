"""Conversations: a state kept between turns holds exactly the text that was shown."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from helpers import config, randomised

from lrt.config.decoding import SamplingParams
from lrt.data.tokenizer import ByteTokenizer
from lrt.inference.chat import Conversation
from lrt.inference.prefill import prefill

GREEDY = SamplingParams(temperature=0.0, max_new_tokens=12, stop_tokens=())
TEXT = ByteTokenizer()
MODEL = randomised(config(vocab_size=257, bos=256, context=200, window_pattern="L"))


class Spelt(ByteTokenizer):
    """Bytes whose answers are always letters, so that a stop text is easy to choose."""

    def decode_bytes(self, ids) -> bytes:
        return bytes(97 + i % 26 if i < 257 else 0 for i in ids)

    def encode(self, text: str) -> list[int]:
        return [ord(c) - 97 + 26 * 2 if c.isalpha() else ord(c) for c in text]


def logits_after(talk: Conversation) -> torch.Tensor:
    """Next-token logits once everything pending has been taken in."""
    return prefill(MODEL, torch.tensor([talk.pending]), cache=talk.cache, mode="exact").logits


def finish(pieces: Iterator[str]) -> str:
    return "".join(pieces)


def test_a_stop_text_ends_the_answer_and_does_not_enter_the_state():
    tokenizer = Spelt()
    whole = finish(Conversation(MODEL, tokenizer, "exact").say("hello", GREEDY))
    stop = whole[5:8]
    shown = whole[: whole.find(stop)]
    talk = Conversation(MODEL, tokenizer, "exact")
    assert finish(talk.say("hello", replace(GREEDY, stop=(stop,)))) == shown
    finish(talk.say(stop[1:] + "more", replace(GREEDY, max_new_tokens=1)))
    text = [tokenizer.bos, *tokenizer.encode("hello" + shown + stop[:1] + stop[1:] + "more")]
    assert talk.used == len(text) + 1
    expected = prefill(MODEL, torch.tensor([[*text, *talk.pending]]), mode="exact").logits
    torch.testing.assert_close(logits_after(talk), expected, atol=1e-10, rtol=1e-10)


def test_without_a_stop_text_the_state_goes_on_from_the_tokens_themselves():
    talk = Conversation(MODEL, TEXT, "exact")
    finish(talk.say("ab", GREEDY))
    assert talk.ended == () and len(talk.pending) == 1 and talk.used == 1 + 2 + 12
    finish(talk.say("cd", GREEDY))
    assert talk.used == 1 + 2 + 12 + 2 + 12
