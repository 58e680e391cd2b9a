"""One model behind the endpoints: what it is, what it may be asked, and how a request becomes tokens."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, TypeVar, final

from pydantic import BaseModel, ValidationError

from lrt import __version__
from lrt.inference.loaded import Loaded
from lrt.inference.prefill import next_logits
from lrt.model.recurrence import OneToken
from lrt.serve.engine import Engine
from lrt.serve.fields import MOST_VALUES
from lrt.serve.grammar import GrammarConstraint, Grammars, answer_form
from lrt.serve.http import ApiError
from lrt.serve.inspect import trained_without_memory
from lrt.serve.intake import Intake
from lrt.serve.json_writer import AnswerWriter
from lrt.serve.messages import ResponseFormat, Tool
from lrt.serve.metrics import Metrics
from lrt.serve.prompts import prompts_of
from lrt.serve.schemas import Generation
from lrt.serve.settings import Settings
from lrt.serve.text import Vocabulary

B = TypeVar("B", bound=BaseModel)
WRONG = {
    "extra_forbidden": ("is not known here: leave it out", "unknown_parameter"),
    "missing": ("is missing", "missing_required_parameter"),
}
"""What is said of fields that are too many or too few, and OpenAI's codes for it."""
OBJECTS = ("model_type", "dict_type")
"""Errors where something else stands in an object's place."""
READ_SECONDS = 10.0
"""How long a body that has arrived may take to become tokens."""


@final
class Served:
    """One model behind the endpoints."""

    def __init__(self, loaded: Loaded, settings: Settings, name: str | None = None, run: OneToken = next_logits):
        """The name is by default that of the run's folder, so that two runs of a recipe differ."""
        self.model, self.config, self.settings = loaded.model, loaded.config, settings
        self.name, self.created = name or loaded.run.resolve().name, int(time.time())
        self.fingerprint = f"lrt-{__version__}-step{loaded.step}"
        self.words = Vocabulary(loaded.tokenizer)
        self.prompts = prompts_of(loaded.run, self.config.data.source)
        self.metrics = Metrics()
        self.engine = Engine(self.model, settings, loaded.tokenizer.decode_bytes, self.metrics, run)
        self.context = self.model.config.context
        values = settings.max_choices * self.longest_prompt + MOST_VALUES
        self.intake = Intake(settings.max_body, settings.body_seconds, READ_SECONDS, values)
        self.writer = AnswerWriter()
        self.vocabulary = self.model.config.vocab_size
        self.grammars = Grammars(loaded.tokenizer, self.vocabulary)
        self.mode = settings.prefill_options

    def about(self) -> dict[str, Any]:
        """What the page shows of the model."""
        c = self.model.config
        unaided = trained_without_memory(self.config.train.schedule, self.config.train.length)
        return {
            "name": self.name, "depth": c.depth, "width": c.d, "context": self.context, "source": c.source,
            "memory": c.memory.projection if c.memory.on else None, "residual": c.memory.residual,
            "shift": c.memory.shifted,
            "schedule": self.config.train.schedule, "trained_without_memory": unaided,
            "max_output": self.longest, "fingerprint": self.fingerprint, "prompts": list(self.prompts),
        }  # fmt: skip

    @property
    def longest(self) -> int:
        """Most tokens of an answer."""
        return self.settings.max_output or self.context

    @property
    def longest_prompt(self) -> int:
        """Most tokens of a prompt."""
        return min(self.settings.max_prompt or self.context, self.context - 1)

    def parsed(self, kind: type[B], data: Any) -> B:
        """A body. ApiError: the first thing that is wrong with it."""
        try:
            return kind.model_validate(
                data, context={"prompts": self.settings.max_choices, "tokens": self.longest_prompt}
            )
        except ValidationError as error:
            raise _invalid(error) from None

    def require_model(self, model: str | None) -> None:
        """ApiError: another model than this one is asked for."""
        if model is not None and model != self.name:
            message = f"the model {model!r} is not served here; use {self.name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    def check(self, body: Generation, prompts: int, most: int | None) -> None:
        """Raise what is wrong with a request before any of it is made tokens."""
        self.require_model(body.model)
        if most is not None and most > self.longest:
            raise ApiError(400, f"max_tokens is {most}; at most {self.longest} are generated here", param="max_tokens")
        if prompts * body.n > self.settings.max_choices:
            raise ApiError(400, f"{prompts} prompts with n = {body.n} make more than {self.settings.max_choices} "
                           "answers; send fewer at a time")  # fmt: skip
        for name, ids in (("logit_bias", [i for i, _ in body.logit_bias]), ("stop_token_ids", body.stop_token_ids)):
            self.require_known(ids, name)

    def require_known(self, ids: Sequence[int], param: str) -> None:
        """ApiError: a token that the model does not have."""
        wrong = next((i for i in ids if i >= self.vocabulary), None)
        if wrong is not None:
            raise ApiError(400, f"token {wrong} is outside the vocabulary of {self.vocabulary}", param=param)

    def opened(self, text: str, param: str = "prompt") -> list[int]:
        """A text as the beginning of a document. ApiError: it is too long, which its bytes may tell already."""
        least = 1 + self.words.least([text])
        if least > self.longest_prompt:
            self.refuse_length(f"at least {least}", param)
        ids = self.words.opened(text)
        self.require_fit(ids, param)
        return ids

    def require_fit(self, ids: Sequence[int], param: str = "prompt") -> None:
        """ApiError: a prompt that is too long, or holds unknown tokens."""
        if len(ids) > self.longest_prompt:
            self.refuse_length(str(len(ids)), param)
        self.require_known(ids, param)

    def refuse_length(self, count: str, param: str) -> None:
        """ApiError: a prompt of so many tokens."""
        message = f"the prompt has {count} tokens; at most {self.longest_prompt} fit here"
        raise ApiError(400, message, param=param, code="context_length_exceeded")

    def constraint(
        self, body: Generation, format_: ResponseFormat | None, tools: Sequence[Tool] = (), choice: str | None = None
    ) -> tuple[GrammarConstraint | None, tuple[str, ...]]:
        """What the answers must look like, and the tools that they may call. ApiError: it cannot be kept."""
        try:
            form = answer_form(format_, tools, choice)
            constraint = None if form is None else self.grammars.of(form.lark)
        except ValueError as error:
            by_format = format_ is not None and format_.type != "text"
            raise ApiError(400, str(error), param="response_format" if by_format else "tools") from None
        if constraint is not None and (body.ignore_eos or body.min_tokens):
            raise ApiError(400, "an answer of a given form ends with it: leave out ignore_eos and min_tokens")
        return constraint, () if form is None else form.tools


def _invalid(error: ValidationError) -> ApiError:
    """The first error as one sentence that names its field."""
    first = error.errors(include_url=False, include_input=False)[0]
    path = [str(part) for part in first["loc"] if not str(part).startswith("<")]  # a union's tag is no field
    where, details = ".".join(part or "''" for part in path), first.get("ctx", {})
    param, code = details.get("param", path[0] if path else None), details.get("code")
    message = "it must be an object" if first["type"] in OBJECTS else first["msg"].removeprefix("Value error, ")
    if first["type"] in WRONG:
        says, code = WRONG[first["type"]]
        return ApiError(400, f"{where} {says}", param=param, code=code)
    if message.startswith("it "):
        return ApiError(400, f"{where or 'the body'} {message.removeprefix('it ')}", param=param)
    return ApiError(400, f"{where}: {message}" if where else message, param=param, code=code)
