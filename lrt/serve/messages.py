"""Conversations in requests: messages, tools, and what an answer must look like."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import FailFast, Field, model_validator

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
    """A piece of a message."""

    type: Literal["text", "refusal"]
    text: str = ""
    refusal: str = ""


class Message(Strict):
    """One message of a conversation; an answer of this server may be sent back as it is."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str | list[Part], at_most(MOST_PARTS)] = ""
    name: str | None = None
    """Taken, and not used."""
    refusal: str | None = None
    """Taken, and not used."""
    annotations: Annotated[list[Any], at_most(0)] = []  # noqa: RUF012
    tool_calls: Annotated[list[ToolCall], FailFast(), at_most(MOST_TOOLS)] = []  # noqa: RUF012
    tool_call_id: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _said(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("content") is None and not data.get("tool_calls"):
            raise ValueError("content is missing: give a text")
        return data

    def plain(self) -> dict[str, Any]:
        """What a template sees."""
        text = self.content if isinstance(self.content, str) else "".join(p.text or p.refusal for p in self.content)
        message: dict[str, Any] = {"role": self.role, "content": text}
        if self.tool_calls:
            message["tool_calls"] = [call.model_dump(include={"id", "type", "function"}) for call in self.tool_calls]
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        return message
