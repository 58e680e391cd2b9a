"""What requests may hold. Unknown fields are refused: a setting that is silently ignored changes results."""

from __future__ import annotations

import secrets
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from lrt.config.decoding import PENALTIES, SamplingParams

Text = Annotated[str, Field(max_length=10_000_000)]
Stop = Annotated[list[Annotated[str, Field(min_length=1, max_length=200)]], Field(max_length=16)]
Ids = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


class Strict(BaseModel):
    """No unknown fields, no conversions between types."""

    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(Strict):
    """Options of a stream."""

    include_usage: bool = False
    """End with a chunk that counts tokens."""


class Generation(Strict):
    """What both endpoints take."""

    model: str | None = None
    """Name of the model; by default the one that is served."""
    temperature: float = Field(1.0, ge=0, le=100, allow_inf_nan=False)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int | None = Field(None, ge=1, le=2**31)
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, ge=PENALTIES[0], le=PENALTIES[1], allow_inf_nan=False)
    n: int = Field(1, ge=1, le=1024)
    stop: Annotated[str, Field(min_length=1, max_length=200)] | Stop | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**64)
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None
    """Taken, and not used."""
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0

    @model_validator(mode="after")
    def _supported(self) -> Generation:
        if self.presence_penalty or self.frequency_penalty:
            raise ValueError("presence_penalty and frequency_penalty are not supported: use repetition_penalty")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options need stream to be true")
        return self

    def sampling(self, most: int, stop: tuple[str, ...] = ()) -> SamplingParams:
        """The library's form; without a seed one is drawn."""
        given = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        seed = secrets.randbelow(2**63) if self.seed is None else self.seed % 2**64
        return SamplingParams(
            max_new_tokens=max(1, most), temperature=self.temperature, top_k=self.top_k, top_p=self.top_p,
            min_p=self.min_p, repetition_penalty=self.repetition_penalty, seed=seed, stop=(*given, *stop),
        )  # fmt: skip


class CompletionRequest(Generation):
    """POST /v1/completions."""

    prompt: Text | Annotated[list[Text], Field(min_length=1)] | Ids | Annotated[list[Ids], Field(min_length=1)]
    """A text, several, token ids, or several lists of them. A text begins a document; ids are taken as they are."""
    max_tokens: int = Field(16, ge=0)
    logprobs: int | None = Field(None, ge=0, le=20)
    """Log-probabilities of the tokens, and of so many alternatives."""
    echo: bool = False
    """Begin the answer with the prompt; with `logprobs` the prompt's tokens are scored too."""

    @model_validator(mode="after")
    def _something_to_do(self) -> CompletionRequest:
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens is 0: nothing would be generated; ask for at least 1, or for echo")
        return self


class Part(Strict):
    """A piece of a message."""

    type: Literal["text"]
    text: Text


class Message(Strict):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[Part]
    name: str | None = None
    """Taken, and not used."""

    def plain(self) -> dict[str, str]:
        """Role and text."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": text}


class ChatRequest(Generation):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    """The same as max_tokens. By default an answer ends at a stop or where the context does."""
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)


class InspectRequest(Strict):
    """POST /api/inspect."""

    text: Text
    top: int = Field(5, ge=1, le=20)
    """Alternatives per token."""


class ErrorDetail(BaseModel):
    """What is wrong, in one sentence."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Every answer that is not 2xx."""

    error: ErrorDetail
