"""Between text and tokens: prompts, conversations, and tokens as the API spells them."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, final

from lrt.config.decoding import CALLED, NEXT
from lrt.data.chat_template import Message, Tool, chat_template_of
from lrt.data.dialogue import plain_pieces
from lrt.data.tokenizer import Tokenizer
from lrt.inference.batch import Ranked

NOTHING: Mapping[str, Any] = {}


@final
class Vocabulary:
    """A tokenizer as the API needs it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer, self._names = tokenizer, {i: name for name, i in tokenizer.specials.items()}
        self.longest_token = max(1, *map(len, tokenizer.spellings()))
        """Most bytes that one token spells."""
        self.template = chat_template_of(tokenizer)

    def opened(self, text: str) -> list[int]:
        """`text` as the beginning of a document."""
        return [self.tokenizer.bos, *self.tokenizer.encode(text)]

    def about(self) -> dict[str, Any]:
        """Special tokens and the chat template, as clients ask for them."""
        bos = self.spell(self.tokenizer.bos)
        named = {"bos_token": bos, "eos_token": self.spell(self.tokenizer.eos), "pad_token": None}
        templates = {} if self.template is None else self.template.templates
        named |= {} if self.template is None else self.template.specials
        return named | {"tokenizer_class": type(self.tokenizer).__name__, "vocab_size": self.tokenizer.vocab_size,
                        "chat_template": templates.get("default")}  # fmt: skip

    def spell(self, token: int) -> str:
        """A token as text; one that is no text by itself as `bytes:\\x..`, a special one by its name."""
        data = self.tokenizer.decode_bytes([token])
        if not data:
            return self._names.get(token, f"<|{token}|>" if token != self.tokenizer.bos else "<|bos|>")
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def conversation(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool] = (),
        variables: Mapping[str, Any] = NOTHING,
        fits: Callable[[int], None] = lambda _: None,
    ) -> tuple[list[int], tuple[str, ...]]:
        """A conversation as a prompt, and the texts that end its answer; `variables` are the template's.

        `fits` is told how many tokens there are at least, before any is made. ValueError: the template refuses it.
        """
        if self.template is None:
            if variables:
                raise ValueError("the model has no chat template: leave out chat_template_kwargs")
            return self._plain(messages, tools, fits), (NEXT, CALLED) if tools else (NEXT,)
        reserved = {"messages", "tools", "documents", "add_generation_prompt", *self.template.specials}
        if wrong := [name for name in variables if name in reserved or not name.isidentifier()]:
            raise ValueError(f"chat_template_kwargs may not name {wrong[0][:40]!r}")
        text, template_runs = self.template.render(messages, tools, **variables)
        fits(self.least([text]))
        ids = [token for token, _ in self.template.tokens(text, template_runs)]
        if not ids:
            raise ValueError("the model's chat template makes nothing of these messages: send some text")
        return ids, ()

    def least(self, texts: Iterable[str]) -> int:
        """The least number of tokens that texts of these lengths make."""
        return sum(len(text.encode("utf-8", "replace")) for text in texts) // self.longest_token

    def _plain(self, messages: Sequence[Message], tools: Sequence[Tool], fits: Callable[[int], None]) -> list[int]:
        """As `lrt chat` writes it; every message is encoded by itself, so that an answer keeps its tokens."""
        ids = [self.tokenizer.bos]
        if messages[-1]["role"] == "assistant":
            raise ValueError("messages end with the assistant's; the last one must be the user's")
        pieces = list(plain_pieces(messages, tools))
        fits(self.least(pieces))
        return [*ids, *(i for text in pieces for i in self.tokenizer.encode(text))]


@final
class Listing:
    """Tokens with their log-probabilities, in the shapes of the two endpoints; offsets count on from token to token."""

    def __init__(self, vocabulary: Vocabulary, offset: int = 0) -> None:
        self._words, self._offset = vocabulary, offset
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def completion(self, tokens: Sequence[tuple[int, float | None, Ranked]]) -> dict[str, list]:
        """`logprobs` of /v1/completions."""
        spell, offsets = self._words.spell, []
        for token, _, _ in tokens:
            offsets.append(self._offset)
            self._offset += len(self._utf8.decode(self._words.tokenizer.decode_bytes([token])))
        tops = [
            None if value is None else {spell(t): p for t, p in (*top, (token, value))} for token, value, top in tokens
        ]
        return {
            "tokens": [spell(token) for token, _, _ in tokens],
            "token_logprobs": [value for _, value, _ in tokens],
            "top_logprobs": tops,
            "text_offset": offsets,
        }

    def chat(self, tokens: Sequence[tuple[int, float | None, Ranked]]) -> dict[str, Any]:
        """`logprobs` of /v1/chat/completions."""

        def one(token: int, value: float | None) -> dict[str, Any]:
            data = self._words.tokenizer.decode_bytes([token])
            return {"token": self._words.spell(token), "logprob": value, "bytes": list(data)}

        listed = [one(token, value) | {"top_logprobs": [one(*pair) for pair in top]} for token, value, top in tokens]
        return {"content": listed, "refusal": None}
