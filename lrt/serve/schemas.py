"""What requests may hold. A setting that changes results and is not honoured is refused; null is as good as absent."""

from __future__ import annotations

import secrets
from typing import Annotated, Any, Literal

from pydantic import BaseModel, FailFast, Field, PlainValidator, WithJsonSchema, model_validator
from pydantic.json_schema import models_json_schema

from lrt.config.decoding import PENALTIES, SamplingParams
from lrt.serve.fields import MOST_FIELDS, MOST_TOKENS, Bias, Prompt, Stop, Strict, at_most, id_list, refused
from lrt.serve.messages import MOST_MESSAGES, MOST_TOOLS, Message, ResponseFormat, Tool, ToolChoice

BY_FORMAT = "; ask for a form by response_format"
SCHEMAS = ("guided_json", "json_schema")
"""vLLM's and llama.cpp's own fields for the schema of an answer."""
FORMS = (*SCHEMAS, "structured_outputs", "grammar", "regex", "ebnf")
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "suffix": ("",), "use_beam_search": (False,), "length_penalty": (1,), "early_stopping": (False,),
    "include_stop_str_in_output": (False,), "skip_special_tokens": (True,), "add_special_tokens": (True,),
    "spaces_between_special_tokens": (True,), "add_generation_prompt": (True,), "continue_final_message": (False,),
    "truncate_prompt_tokens": (-1,), "priority": (0,), "functions": ([],), "function_call": ("none",),
    "modalities": (["text"],), "reasoning_effort": ("none", "medium"), "verbosity": ("medium",),
    "typical_p": (1,), "bad_words": ([],), "allowed_token_ids": ([],), "logits_processors": ([],), "vllm_xargs": ({},),
    "documents": ([],), "return_token_ids": (False,), "return_tokens_as_token_ids": (False,), "echo": (False,),
    "tools": ([],), "top_logprobs": (0,), "mm_processor_kwargs": ({},), "include_reasoning": (True, False),
    "enable_thinking": (False,), "thinking": ({"type": "disabled"},), "detokenize": (True,), "prompt_logprobs": (),
    "chat_template": (), "web_search_options": (), "audio": (), "moderation": (), "prompt_embeds": (),
    "kv_transfer_params": (), "guided_json": (), "guided_regex": (), "guided_choice": (), "guided_grammar": (),
    "guided_decoding_backend": (), "guided_whitespace_pattern": (), "structured_outputs": ({},),
    # llama.cpp's and SGLang's
    "n_predict": (), "repeat_penalty": (1,), "typ_p": (1,), "tfs_z": (1,), "top_n_sigma": (-1,), "mirostat": (0,),
    "mirostat_mode": (0,), "xtc_probability": (0,), "dry_multiplier": (0,), "dynatemp_range": (0,), "samplers": ([],),
    "min_keep": (0,), "n_keep": (0,), "n_probs": (0,), "n_indent": (0,), "t_max_predict_ms": (0,), "lora": ([],),
    "id_slot": (-1,), "n_cache_reuse": (0,), "timings_per_token": (False,), "post_sampling_probs": (False,),
    "return_progress": (False,), "return_tokens": (False,), "backend_sampling": (False,), "penalize_nl": (False,),
    "parse_tool_calls": (True,), "reasoning_format": ("none", "auto"), "grammar": ("",), "json_schema": ({},),
    "regex": ("",), "ebnf": ("",), "no_stop_trim": (False,), "separate_reasoning": (True, False),
    "stream_reasoning": (True, False),
}  # fmt: skip
"""Settings that are not honoured, and the values by which they change nothing: those are taken."""


class Unused(Strict):
    """Settings that no answer depends on: taken, and not used."""

    user: str | None = None
    store: bool | None = None
    metadata: dict[str, Any] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    request_id: str | None = None
    parallel_tool_calls: bool | None = None
    """An answer makes at most one call."""
    service_tier: Literal["auto", "default", "flex", "scale", "priority"] | None = None
    cache_prompt: bool | None = None
    prediction: dict[str, Any] | None = None
    """What the client expects: it would save time and change nothing."""


class Refinements(Strict):
    """What refines settings that are refused, or has a meaning beside penalties alone: it changes nothing by itself."""

    dynatemp_exponent: float = 1
    mirostat_tau: float = 5
    mirostat_eta: float = 0.1
    xtc_threshold: float = 0.1
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_penalty_last_n: int = -1
    repeat_last_n: int = -1


class StreamOptions(Strict):
    """Options of a stream."""

    include_usage: bool = False
    """End with a chunk that counts tokens."""
    continuous_usage_stats: Literal[False] = False
    include_obfuscation: bool = False
    """Taken, and not used."""


class Generation(Unused, Refinements):
    """What both endpoints take."""

    model: str | None = None
    """Name of the model; by default the one that is served."""
    temperature: float = Field(1.0, ge=0, le=100, allow_inf_nan=False)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(-1, ge=-1, le=2**31)
    """Keep so many tokens; -1 and 0 keep all."""
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, ge=PENALTIES[0], le=PENALTIES[1], allow_inf_nan=False)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    logit_bias: Bias = ()
    n: int = Field(1, ge=1, le=1024)
    best_of: int | None = Field(None, ge=1, le=1024)
    """As many as n; more is refused."""
    stop: Stop = ()
    stop_token_ids: Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], FailFast(), at_most(128)] = []  # noqa: RUF012
    """Tokens that end an answer, beside the model's own."""
    ignore_eos: bool = False
    """Go on where the model would end."""
    min_tokens: int = Field(0, ge=0, le=2**31)
    """Tokens before which an answer does not end."""
    seed: int | None = Field(None, ge=-(2**63), lt=2**64)
    stream: bool = False
    stream_options: StreamOptions | None = None
    cache_salt: str | None = Field(None, min_length=1, max_length=512)
    """Answers of one salt share kept states with each other alone."""

    @model_validator(mode="before")
    @classmethod
    def _neutral(cls, data: Any) -> Any:
        """Leave out what changes nothing. ValueError: a setting that is not honoured."""
        if not isinstance(data, dict):
            return data
        data = _as_format(data)
        neutral = [name for name in data if name in NEUTRAL and name not in cls.model_fields]
        for name in neutral:
            if data[name] is not None and not any(_same(data[name], value) for value in NEUTRAL[name]):
                raise refused(name, _not_honoured(name), "unsupported_parameter")
        return {name: value for name, value in data.items() if name not in neutral}

    @model_validator(mode="after")
    def _supported(self) -> Generation:
        if self.best_of is not None and self.best_of != self.n:
            message = f"best_of is {self.best_of} and n is {self.n}: choosing the best is not supported"
            raise refused("best_of", message, "unsupported_parameter")
        if self.stream_options is not None and not self.stream:
            raise refused("stream_options", "stream_options need stream to be true")
        penalised = self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1
        if penalised and self.repeat_last_n != -1:
            message = f"repeat_last_n is {self.repeat_last_n}: penalties look at all of the text: leave it out"
            raise refused("repeat_last_n", message, "unsupported_parameter")
        return self

    def sampling(self, most: int, stop: tuple[str, ...], stop_tokens: tuple[int, ...]) -> SamplingParams:
        """The library's form; without a seed one is drawn. `stop` and `stop_tokens` come from the model."""
        seed = secrets.randbelow(2**63) if self.seed is None else self.seed % 2**64
        ends = () if self.ignore_eos else stop_tokens
        return SamplingParams(
            max_new_tokens=max(1, most), min_new_tokens=self.min_tokens, temperature=self.temperature,
            top_k=self.top_k if self.top_k > 0 else None, top_p=self.top_p, min_p=self.min_p,
            repetition_penalty=self.repetition_penalty, presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty, logit_bias=self.logit_bias, seed=seed,
            stop=(*self.stop, *stop), stop_tokens=tuple(dict.fromkeys((*ends, *self.stop_token_ids))),
        )  # fmt: skip


def _as_format(data: dict[str, Any]) -> dict[str, Any]:
    """The forms of vLLM's and llama.cpp's own fields that response_format has too, as that; all else is left as it is.

    ValueError: both are there.
    """
    settings = data.get("structured_outputs")
    wanted = settings if isinstance(settings, dict) and len(settings) <= MOST_FIELDS else {}
    wanted = {name: value for name, value in wanted.items() if value is not None and value is not False}
    if isinstance(settings, dict) and len(settings) <= MOST_FIELDS and not wanted:
        data = {key: value for key, value in data.items() if key != "structured_outputs"}
    forms: dict[str, Any] = {
        name: {"type": "json_schema", "json_schema": {"schema": schema}}
        for name, schema in (*((key, data.get(key)) for key in SCHEMAS), ("structured_outputs", wanted.get("json")))
        if isinstance(schema, dict) and schema
    }
    if wanted == {"json_object": True}:
        forms["structured_outputs"] = {"type": "json_object"}
    elif len(wanted) > 1:
        forms.pop("structured_outputs", None)
    if not forms:
        return data
    name, form = next(iter(forms.items()))
    others = [other for other in ("response_format", *forms) if other != name and data.get(other) is not None]
    if others:
        raise refused(name, f"{name} and {others[0]} both ask for a form: give one of them")
    return {key: value for key, value in data.items() if key != name} | {"response_format": form}


def _not_honoured(name: str) -> str:
    fine = "".join(f", or give {value!r}" for value in NEUTRAL[name])
    by_format = name.startswith("guided_") or name in FORMS
    return f"{name} is not supported: leave it out{fine}{BY_FORMAT if by_format else ''}"


def _same(value: Any, neutral: Any) -> bool:
    return isinstance(value, bool) == isinstance(neutral, bool) and value == neutral


class CompletionRequest(Generation):
    """POST /v1/completions."""

    prompt: Prompt
    """A text, several, token ids, or several lists of them. A text begins a document; ids are taken as they are."""
    max_tokens: int = Field(16, ge=0, le=2**31)
    logprobs: int | None = Field(None, ge=0, le=20)
    """Log-probabilities of the tokens, and of so many alternatives."""
    echo: bool = False
    """Begin the answer with the prompt; with `logprobs` the prompt's tokens are scored too."""
    response_format: ResponseFormat | None = None

    @model_validator(mode="after")
    def _something_to_do(self) -> CompletionRequest:
        if self.max_tokens == 0 and not self.echo:
            raise refused("max_tokens", "max_tokens is 0: nothing would be generated; ask for at least 1, or for echo")
        return self


class ChatRequest(Generation):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], FailFast(), Field(min_length=1), at_most(MOST_MESSAGES)]
    max_tokens: int | None = Field(None, ge=1, le=2**31)
    max_completion_tokens: int | None = Field(None, ge=1, le=2**31)
    """The same as max_tokens. By default, or with -1, an answer ends at a stop or where the context does."""
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], FailFast(), at_most(MOST_TOOLS)] = []  # noqa: RUF012
    tool_choice: ToolChoice | None = None
    """By default auto where there are tools."""
    chat_template_kwargs: Annotated[dict[str, Any], at_most(32)] = {}  # noqa: RUF012
    """Variables for the model's chat template."""

    @model_validator(mode="before")
    @classmethod
    def _unlimited(cls, data: Any) -> Any:
        """Leave out a limit of -1, by which other servers mean none."""
        if not isinstance(data, dict):
            return data
        limits = ("max_tokens", "max_completion_tokens")
        return {name: value for name, value in data.items() if not (name in limits and _same(value, -1))}

    @model_validator(mode="after")
    def _choosable(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise refused("top_logprobs", "top_logprobs need logprobs to be true")
        names = {tool.function.name for tool in self.tools}
        choice = self.tool_choice
        unknown = () if choice is None or isinstance(choice, str) else sorted(set(choice.names()) - names)
        if unknown:
            raise refused("tool_choice", f"tool_choice names {unknown[0]!r}, which is none of the tools")
        if choice == "required" and not names:
            raise refused("tool_choice", "tool_choice is required, but there are no tools")
        return self

    def callable(self) -> tuple[list[Tool], str | None]:
        """The tools that the answer may call, and whether it may, must (`required`) or must not."""
        choice = self.tool_choice or ("auto" if self.tools else None)
        if choice is None or isinstance(choice, str):
            return self.tools, choice
        return [tool for tool in self.tools if tool.function.name in choice.names()], choice.mode()


class InspectRequest(Strict):
    """POST /api/inspect."""

    text: str
    top: int = Field(5, ge=1, le=20)
    """Alternatives per token."""


class TokenizeRequest(Strict):
    """POST /tokenize: of a text, or of a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], FailFast(), at_most(MOST_MESSAGES)] = []  # noqa: RUF012
    add_special_tokens: bool = True
    """Put BOS in front of a text."""
    add_generation_prompt: Literal[True] = True
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _one(self) -> TokenizeRequest:
        if (self.prompt is None) == (not self.messages):
            raise refused("prompt", "give a prompt or messages, one of them")
        return self


class DetokenizeRequest(Strict):
    """POST /detokenize."""

    model: str | None = None
    tokens: Annotated[Any, PlainValidator(lambda value: id_list(value, MOST_TOKENS) if value else []), WithJsonSchema(
        {"type": "array", "items": {"type": "integer", "minimum": 0}}
    )]  # fmt: skip


class ErrorDetail(BaseModel):
    """What is wrong, in one sentence."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Every answer that is not 2xx."""

    error: ErrorDetail


BODIES = (CompletionRequest, ChatRequest, InspectRequest, TokenizeRequest, DetokenizeRequest)
REFERENCE = "#/components/schemas/{model}"


def described(kind: type[BaseModel]) -> dict[str, Any]:
    """A body in OpenAPI."""
    schema = {"$ref": REFERENCE.format(model=kind.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def components() -> dict[str, Any]:
    """The schemas of all bodies and of what they hold, by name."""
    _, schema = models_json_schema([(kind, "validation") for kind in BODIES], ref_template=REFERENCE)
    return schema["$defs"]
