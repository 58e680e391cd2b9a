"""Text in, text out: prompts and conversations over `generate`."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import final

import torch

from lrt.config.decoding import DEFAULT_MODE, SamplingParams
from lrt.data.chat_template import ChatTemplate
from lrt.data.tokenizer import Tokenizer
from lrt.inference.generate import Generated, generate
from lrt.model.kv_cache import KVCache
from lrt.model.lrt import LRT


@torch.no_grad()
def complete(
    model: LRT,
    tokenizer: Tokenizer,
    prompt: str,
    sampling: SamplingParams,
    *,
    mode: str = DEFAULT_MODE,
    drafts: int = 0,
) -> Iterator[str]:
    """Continue `prompt` as the beginning of a document; yields text as it becomes certain.

    It ends at the tokenizer's `ends`, unless `sampling` names other tokens.
    ValueError if the prompt does not fit the model's context.
    """
    ids = [tokenizer.bos, *tokenizer.encode(prompt)]
    require_room(model, len(ids))
    params = ending(sampling, tokenizer)
    for step in generate(model, [ids], params, decode_bytes=tokenizer.decode_bytes, mode=mode, drafts=drafts):
        yield step.emissions[0].text


def ending(sampling: SamplingParams, tokenizer: Tokenizer) -> SamplingParams:
    """The same sampling, with the tokens that end an answer named."""
    return sampling if sampling.stop_tokens is not None else replace(sampling, stop_tokens=tokenizer.ends)


def require_room(model: LRT, tokens: int) -> None:
    """Raise ValueError if a prompt of `tokens` leaves no room for an answer in the model's context."""
    context = model.config.context
    if tokens >= context:
        raise ValueError(f"the prompt has {tokens} tokens, the model's context is {context}; shorten the prompt")


@dataclass
class KeptState:
    """A model, its tokenizer, and the state of one conversation."""

    model: LRT
    tokenizer: Tokenizer
    mode: str = DEFAULT_MODE
    drafts: int = 0
    """Most tokens guessed ahead, see `generate`."""
    cache: KVCache | None = None
    dropped: int = 0
    """Oldest turns that were forgotten for the last one, since the context was full."""

    def _answer(self, prompt: list[int], cache: KVCache | None, sampling: SamplingParams) -> Iterator[Generated]:
        """The steps of an answer to what `prompt` adds to a state; None is an empty one."""
        return generate(
            self.model,
            [prompt],
            ending(sampling, self.tokenizer),
            decode_bytes=self.tokenizer.decode_bytes,
            cache=cache or KVCache.empty(self.model, 1, self.model.config.context),
            mode=self.mode,
            drafts=self.drafts,
        )


@final
@dataclass
class Conversation(KeptState):
    """A kept state that turns are added to: nothing is prefilled twice while the context has room."""

    pending: list[int] = field(default_factory=list)
    """Tokens emitted or fixed that the state has not taken in yet."""
    ended: Sequence[str] = ()
    """The stop texts, one of which ended the last answer; empty if none did."""
    turns: list[str] = field(default_factory=list)
    """The text of each turn that the state holds, answer included."""

    @property
    def used(self) -> int:
        """Tokens of the context that are taken."""
        return len(self.pending) + (int(self.cache.length[0]) if self.cache else 0)

    def say(self, text: str, sampling: SamplingParams) -> Generator[str, None, None]:
        """Add `text` and stream the model's continuation; a caller may stop early, and go on with the next turn.

        A stop text that ends the answer does not enter the state: the answer as shown is taken in with the next turn,
        and after it as much of the stop text as the turn's own text does not begin with. Nor does BOS, which would
        reset the memory. Where the context is full, the oldest turns are forgotten and the rest is taken in again.
        ValueError: the turn alone leaves no room for an answer.
        """
        text = _lead(self.ended, text) + text
        prompt = self._prompt(text, sampling)
        self.ended, before, tokens, shown = (), None, [], ""
        try:
            for step in self._answer(prompt, self.cache, sampling):
                if before is None and sampling.stop:
                    before = step.cache.take(torch.zeros(1, dtype=torch.int64, device=self.model.device))
                emission = step.emissions[0]
                self.cache, self.pending = step.cache, self._without_bos([emission.token])
                tokens.append(emission.token)
                shown += emission.text
                yield emission.text
        finally:
            if tokens:
                self.turns.append(text + shown)
        raw = self.tokenizer.decode_bytes(tokens).decode("utf-8", errors="replace")
        if before is not None and any(stop in raw for stop in sampling.stop):
            self.cache, self.pending, self.ended = before, self.tokenizer.encode(shown), sampling.stop

    def _prompt(self, text: str, sampling: SamplingParams) -> list[int]:
        """The tokens to take in for a new turn; drops the oldest turns until they leave room for an answer.

        ValueError: the turn alone leaves none. Then nothing is dropped.
        """
        context, dropped, in_cache = self.model.config.context, 0, self.used - len(self.pending)
        room = min(sampling.max_new_tokens, context // 4)
        prompt = [*self.pending, *self._opening(), *self.tokenizer.encode(text)]
        while dropped < len(self.turns) and in_cache + len(prompt) + room > context:
            dropped, in_cache = dropped + 1, 0
            prompt = [self.tokenizer.bos, *self.tokenizer.encode("".join(self.turns[dropped:]) + text)]
        require_room(self.model, in_cache + len(prompt))
        self.dropped = dropped
        if dropped:
            self.turns, self.cache, self.pending = self.turns[dropped:], None, []
        return prompt

    def _opening(self) -> list[int]:
        return [] if self.cache or self.pending else [self.tokenizer.bos]

    def _without_bos(self, tokens: list[int]) -> list[int]:
        """Tokens without BOS: what ends an answer must not open a document in the next turn."""
        return [token for token in tokens if token != self.tokenizer.bos]


@final
@dataclass
class TemplatedConversation(KeptState):
    """Turns written by the model's own chat template; of the state what still fits the next prompt is kept."""

    template: ChatTemplate = field(kw_only=True)
    tokens: list[int] = field(default_factory=list)
    """What the state has taken in."""
    messages: list[dict[str, str]] = field(default_factory=list)

    def say(self, text: str, sampling: SamplingParams) -> Generator[str, None, None]:
        """Add a turn of the user and stream the answer; a caller may stop early, and go on with the next turn.

        ValueError: the turn alone leaves no room for an answer, or the template refuses it.
        """
        ids, shown = self._prompt({"role": "user", "content": text}, sampling), ""
        begun = self.cache is not None and len(self.tokens) < len(ids) and ids[: len(self.tokens)] == self.tokens
        prompt, cache = (ids[len(self.tokens) :], self.cache) if begun else (ids, None)
        self.cache, emitted = None, []
        try:
            for step in self._answer(prompt, cache, sampling):
                self.cache, self.tokens = step.cache, [*ids, *emitted]  # what was emitted last is not in it yet
                emitted.append(step.emissions[0].token)
                shown += step.emissions[0].text
                yield step.emissions[0].text
        finally:
            if emitted:
                self.messages.append({"role": "assistant", "content": shown})
            else:  # a turn that failed leaves nothing behind
                self.messages.pop()

    def _prompt(self, turn: dict[str, str], sampling: SamplingParams) -> list[int]:
        """The tokens of the conversation with a new turn, before which the oldest are dropped until there is room."""
        context = self.model.config.context
        room, messages, dropped = min(sampling.max_new_tokens, context // 4), [*self.messages, turn], 0
        ids = self.template.encode(messages)
        while len(messages) > 2 and len(ids) + room > context:
            messages, dropped = messages[2:], dropped + 1
            ids = self.template.encode(messages)
        require_room(self.model, len(ids))
        self.messages, self.dropped = messages, dropped
        return ids


def _lead(ended: Sequence[str], text: str) -> str:
    """What comes before `text` where one of these stop texts ended an answer and `text` begins with its end."""
    leads = [stop[:-n] for stop in ended for n in range(len(stop), 0, -1) if text.startswith(stop[-n:])]
    return min(leads, key=len, default="")
