"""Between text and tokens: prompts, conversations, and tokens as the API spells them."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

from lrt.data import Tokenizer
from lrt.inference.batch import Ranked
from lrt.inference.chat_template import ChatTemplate
from lrt.utils.files import MOST_SETTINGS, read_json, read_text

TURN, NEXT = "USER: {}\nBOT:", "\nUSER:"
"""How `lrt chat` writes a turn, and what ends an answer."""


@final
class Vocabulary:
    """A tokenizer as the API needs it."""

    def __init__(self, tokenizer: Tokenizer, folder: Path | None = None) -> None:
        """`folder` may hold a chat template: chat_template.jinja, or `chat_template` in tokenizer_config.json."""
        self.tokenizer, self._names = tokenizer, {i: name for name, i in tokenizer.specials.items()}
        self._template = _chat_template(tokenizer, folder)

    def opened(self, text: str) -> list[int]:
        """`text` as the beginning of a document."""
        return [self.tokenizer.bos, *self.tokenizer.encode(text)]

    def spell(self, token: int) -> str:
        """A token as text; one that is no text by itself as `bytes:\\x..`, a special one by its name."""
        data = self.tokenizer.decode_bytes([token])
        if not data:
            return self._names.get(token, f"<|{token}|>" if token != self.tokenizer.bos else "<|bos|>")
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def conversation(self, messages: Sequence[dict[str, str]]) -> tuple[list[int], tuple[str, ...]]:
        """A conversation as a prompt, and the texts that end its answer. ValueError: the template refuses it."""
        if self._template is None:
            return self._plain(messages), (NEXT,)
        ids = self._template.encode(messages)
        if not ids:
            raise ValueError("the model's chat template makes nothing of these messages: send some text")
        return ids, ()

    def _plain(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """As `lrt chat` writes it; every message is encoded by itself, so that an answer keeps its tokens."""
        ids, answered = [self.tokenizer.bos], False
        if messages[-1]["role"] == "assistant":
            raise ValueError("messages end with the assistant's; the last one must be the user's")
        for message in messages:
            text = message["content"]
            if message["role"] == "assistant":
                text = text if text[:1].isspace() else f" {text}"
            elif message["role"] == "user":
                text = ("\n" if answered else "") + TURN.replace("{}", text)
            else:
                text = f"{text}\n"
            answered = message["role"] == "assistant"
            ids += self.tokenizer.encode(text)
        return ids


def _chat_template(tokenizer: Tokenizer, folder: Path | None) -> ChatTemplate | None:
    """From chat_template.jinja, or `chat_template` in tokenizer_config.json: one, or a list of named ones."""
    if folder is None:
        return None
    own, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    facts = read_json(config, "tokenizer description") if config.exists() else {}
    found = read_text(own, "chat template", MOST_SETTINGS) if own.exists() else facts.get("chat_template")
    named = [x for x in found if isinstance(x, dict)] if isinstance(found, list) else []
    templates = {str(x["name"]): str(x["template"]) for x in named if "name" in x and "template" in x}
    if isinstance(found, str):
        templates = {"default": found}
    names = {i: name for name, i in tokenizer.specials.items()}
    specials = {key: value for key, value in facts.items() if key.endswith("_token") and isinstance(value, str)}
    if tokenizer.bos in names:
        specials["bos_token"] = names[tokenizer.bos]
    return ChatTemplate(tokenizer, templates, specials) if templates else None


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
