"""Conversations: a state kept between turns holds exactly the text that was shown."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from helpers import config, randomised

from lrt.config.decoding import SamplingParams
from lrt.data.chat_template import ChatTemplate
from lrt.data.tokenizer import ByteTokenizer
from lrt.inference.chat import Conversation, TemplatedConversation
from lrt.inference.generate import generate
from lrt.inference.prefill import prefill

GREEDY = SamplingParams(temperature=0.0, max_new_tokens=12, stop_tokens=())
TEXT = ByteTokenizer()
LETTERS = tuple((i, 1e4) for i in range(97, 123))
"""A bias by which every answer is of letters, and so comes back from its text."""
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


def prompts_of(talk: Conversation, monkeypatch) -> list[list[int]]:
    """The tokens that each turn hands to the decoder from now on."""
    from lrt.inference import chat

    seen: list[list[int]] = []
    real = chat.generate

    def watched(model, prompts, *rest, **options):
        seen.extend([list(p) for p in prompts])
        return real(model, prompts, *rest, **options)

    monkeypatch.setattr(chat, "generate", watched)
    return seen


def test_an_answer_of_bos_does_not_open_the_next_turn(monkeypatch):
    """A model that answers with BOS at once: the second turn goes on in the same document, its memory not reset."""
    silent = SamplingParams(temperature=0.0, max_new_tokens=5, logit_bias=((TEXT.bos, 1e4),))
    talk = Conversation(MODEL, TEXT, "exact")
    prompts = prompts_of(talk, monkeypatch)
    assert finish(talk.say("ab", silent)) == ""
    assert finish(talk.say("cd", silent)) == ""
    assert prompts == [[TEXT.bos, *b"ab"], [*b"cd"]]
    assert talk.pending == []
    finish(talk.say("e", replace(GREEDY, max_new_tokens=1)))
    expected = prefill(MODEL, torch.tensor([[TEXT.bos, *b"abcde", *talk.pending]]), mode="exact").logits
    torch.testing.assert_close(logits_after(talk), expected, atol=1e-10, rtol=1e-10)


def test_a_full_context_drops_the_oldest_turns(monkeypatch):
    talk = Conversation(MODEL, TEXT, "exact")
    prompts = prompts_of(talk, monkeypatch)
    short = replace(GREEDY, max_new_tokens=4)
    texts = [chr(97 + i) * 40 for i in range(8)]
    dropped = []
    for text in texts:
        finish(talk.say(text, short))
        dropped.append(talk.dropped)
    assert dropped[:3] == [0, 0, 0] and sum(dropped) >= 3
    assert talk.turns[-1].startswith(texts[-1]) and talk.used <= MODEL.config.context
    first = dropped.index(next(d for d in dropped if d))
    assert prompts[first][0] == TEXT.bos and texts[0].encode() not in bytes(prompts[first][1:])
    assert texts[1].encode() in bytes(prompts[first][1:]) and prompts[first][-40:] == list(texts[first].encode())


def test_turns_are_dropped_for_the_answer_too():
    talk, short = Conversation(MODEL, TEXT, "exact"), replace(GREEDY, max_new_tokens=4)
    for letter in "abc":
        finish(talk.say(letter * 40, short))
    pieces = list(talk.say("d" * 50, replace(GREEDY, max_new_tokens=40)))  # it fits, and leaves room for 17 tokens
    assert talk.dropped == 1 and len(pieces) == 40


def test_a_turn_that_is_refused_forgets_nothing():
    talk, short = Conversation(MODEL, TEXT, "exact"), replace(GREEDY, max_new_tokens=4)
    finish(talk.say("ab", short))
    before = (list(talk.turns), talk.used, list(talk.pending), talk.dropped, talk.cache)
    with pytest.raises(ValueError, match="shorten the prompt"):
        finish(talk.say("x" * 300, short))
    assert (list(talk.turns), talk.used, list(talk.pending), talk.dropped, talk.cache) == before
    finish(talk.say("cd", short))
    assert len(talk.turns) == 2 and talk.used == 1 + 2 + 4 + 2 + 4


def test_an_answer_that_is_stopped_leaves_a_whole_state():
    talk = Conversation(MODEL, TEXT, "exact")
    pieces = talk.say("ab", GREEDY)
    for _ in range(3):
        next(pieces)
    pieces.close()
    assert talk.used == 1 + 2 + 3 and len(talk.turns) == 1
    finish(talk.say("cd", replace(GREEDY, max_new_tokens=2)))
    assert talk.used == 1 + 2 + 3 + 2 + 2 and len(talk.turns) == 2


PLAIN = (
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)


def test_a_chat_template_writes_the_turns_and_the_state_is_kept_while_it_fits():
    template = ChatTemplate(TEXT, {"default": PLAIN}, {})
    talk, sampling = TemplatedConversation(MODEL, TEXT, "exact", template=template), replace(GREEDY, logit_bias=LETTERS)
    messages: list[dict[str, str]] = []
    for said in ("hello", "more of it"):
        messages.append({"role": "user", "content": said})
        fresh = generate(MODEL, [template.encode(messages)], sampling, decode_bytes=TEXT.decode_bytes, mode="exact")
        expected = "".join(step.emissions[0].text for step in fresh)
        before = list(talk.tokens)
        assert finish(talk.say(said, sampling)) == expected and len(expected) == 12
        assert talk.tokens[: len(before)] == before  # nothing was taken in twice
        messages.append({"role": "assistant", "content": expected})
    assert talk.messages == messages and int(talk.cache.length[0]) == len(talk.tokens)


def test_a_templated_turn_that_fails_leaves_nothing_behind():
    template = ChatTemplate(TEXT, {"default": PLAIN}, {})
    talk, sampling = TemplatedConversation(MODEL, TEXT, "exact", template=template), replace(GREEDY, logit_bias=LETTERS)
    with pytest.raises(ValueError, match="logit_bias"):
        finish(talk.say("hi", replace(GREEDY, logit_bias=((10**6, 1.0),))))
    assert talk.messages == []
    finish(talk.say("hi", sampling))
    assert [m["role"] for m in talk.messages] == ["user", "assistant"]


def test_a_template_of_the_last_turn_alone_may_be_asked_the_same_again():
    template = ChatTemplate(TEXT, {"default": "u:{{ messages[-1].content }}"}, {})
    talk = TemplatedConversation(MODEL, TEXT, "exact", template=template)
    one = replace(GREEDY, logit_bias=LETTERS, max_new_tokens=1)
    assert finish(talk.say("hi", one)) == finish(talk.say("hi", one))


def test_a_full_context_forgets_the_oldest_templated_turns():
    template = ChatTemplate(TEXT, {"default": PLAIN}, {})
    talk, sampling = TemplatedConversation(MODEL, TEXT, "exact", template=template), replace(GREEDY, logit_bias=LETTERS)
    finish(talk.say("x" * 90, sampling))
    finish(talk.say("y" * 90, sampling))
    assert talk.dropped == 1 and [m["content"][:1] for m in talk.messages if m["role"] == "user"] == ["y"]
    with pytest.raises(ValueError, match="shorten the prompt"):
        finish(talk.say("z" * 300, sampling))
    assert len(talk.messages) == 2
