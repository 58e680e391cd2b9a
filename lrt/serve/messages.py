"""Conversations in requests: messages, tools, and what an answer must look like."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, FailFast, Field, Tag, model_validator

from lrt.serve.fields import Strict, at_most

MOST_MESSAGES, MOST_PARTS, MOST_TOOLS = 4096, 256, 128


class JsonSchema(Strict):
    """A schema that an answer must keep."""

    name: str = Field("answer", max_length=256)
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None
    """An answer keeps the schema, whatever this says."""


class ResponseFormat(Strict):
    """What an answer looks like: free text, any JSON object, or JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _whole(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema belongs to type json_schema, and only there")
        return self


class FunctionDefinition(Strict):
    """A function that the model may ask to be called."""

    name: str = Field(pattern=r"^[a-zA-Z0-9_.:-]{1,128}$")
    description: str | None = None
    parameters: dict[str, Any] = {"type": "object", "properties": {}}  # noqa: RUF012
    strict: bool | None = None
    """Arguments keep the parameters' schema, whatever this says."""


class Tool(Strict):
    """A tool; functions are all there is."""

    type: Literal["function"] = "function"
    function: FunctionDefinition


class NamedFunction(Strict):
    """The function of a tool choice."""

    name: str


class NamedTool(Strict):
    """The one tool that must be called."""

    type: Literal["function"] = "function"
    function: NamedFunction

    def names(self) -> list[str]:
        """The tool's name."""
        return [self.function.name]

    def mode(self) -> str:
        """It is called in any case."""
        return "required"


class Subset(Strict):
    """Some of the tools, and whether one of them must be called."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], FailFast(), Field(min_length=1), at_most(MOST_TOOLS)]


class AllowedTools(Strict):
    """The tools that may be called, out of those that the model is told of."""

    type: Literal["allowed_tools"]
    allowed_tools: Subset

    def names(self) -> list[str]:
        """Their names."""
        return [tool.function.name for tool in self.allowed_tools.tools]

    def mode(self) -> str:
        """`auto` or `required`."""
        return self.allowed_tools.mode


def _choice(value: Any) -> str:
    if not isinstance(value, dict):
        return "<word>"
    return "<some>" if value.get("type") == "allowed_tools" else "<one>"


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("<word>")]
    | Annotated[NamedTool, Tag("<one>")]
    | Annotated[AllowedTools, Tag("<some>")],
    Discriminator(_choice),
]


class FunctionCall(Strict):
    """What the model asked for: a name, and arguments as JSON text."""

    name: str
    arguments: str


class ToolCall(Strict):
    """A call in an earlier answer."""

    id: str = ""
    type: Literal["function"] = "function"
    function: FunctionCall
    index: int = 0


class Part(Strict):
    """A piece of a message: a text, or a refusal's."""

    type: Literal["text", "refusal"]
    text: str | None = None
    refusal: str | None = None

    @model_validator(mode="after")
    def _one(self) -> Part:
        other = "refusal" if self.type == "text" else "text"
        if getattr(self, self.type) is None or getattr(self, other) is not None:
            raise ValueError(f"a part of type {self.type} holds {self.type}, and no {other}")
        return self

    @property
    def said(self) -> str:
        """What it says."""
        return (self.text or "") + (self.refusal or "")


Content = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[list[Part], Tag("<parts>")],
    Discriminator(lambda value: "<parts>" if isinstance(value, list) else "<text>"),
    at_most(MOST_PARTS),
]


class Message(Strict):
    """One message of a conversation; an answer of this server may be sent back as it is."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    name: str | None = None
    """Who speaks; a chat template may write it."""
    refusal: str | None = None
    """What the message says, where it has no content."""
    reasoning_content: Literal[""] | None = None
    annotations: Annotated[list[Any], at_most(0)] = []  # noqa: RUF012
    tool_calls: Annotated[list[ToolCall], FailFast(), at_most(MOST_TOOLS)] = []  # noqa: RUF012
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _whole(self) -> Message:
        if self.tool_calls and self.role != "assistant":
            raise ValueError(f"tool_calls belong to the assistant's messages; this one is of the role {self.role}")
        if self.content is None and self.refusal is None and not self.tool_calls:
            raise ValueError("content is missing: give a text")
        return self

    def plain(self) -> dict[str, Any]:
        """What a template sees; nothing is there in place of no content."""
        content = self.refusal if self.content is None else self.content
        if isinstance(content, list):
            content = [{"type": "text", "text": part.said} for part in content]
        message: dict[str, Any] = {"role": self.role, "content": content, "name": self.name}
        message = {field: value for field, value in message.items() if value is not None}
        if self.tool_calls:
            message["tool_calls"] = [call.model_dump(include={"id", "type", "function"}) for call in self.tool_calls]
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        return message
