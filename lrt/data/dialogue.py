"""Dialogues: rows that hold messages, or a prompt and its answer; and how they are written without a chat template."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

from lrt.config.decoding import NEXT, TOOL_TURN, TURN
from lrt.data.chat_template import Message, Tool

MESSAGES = ("messages", "conversations", "conversation")
"""Columns that hold lists of messages."""
PAIRS = (
    ("prompt", "completion"), ("prompt", "answer"), ("prompt", "response"), ("instruction", "output"),
    ("instruction", "response"), ("question", "answer"), ("question", "response"), ("query", "response"),
    ("query", "answer"), ("problem", "solution"), ("input", "output"), ("inputs", "targets"),
)  # fmt: skip
"""Columns that hold a prompt and its answer."""
ADDED = ("input", "context")
"""Columns that add to what a prompt, instruction or question says."""
SYSTEM = ("system", "system_prompt")
"""Columns that hold a system message."""
COLUMNS = tuple(
    dict.fromkeys([*MESSAGES, *(name for pair in PAIRS for name in pair), *ADDED, *SYSTEM, "tools", "history"])
)
"""Every column that a dialogue may be read from."""
ROLES = {
    "system": "system", "developer": "developer", "user": "user", "human": "user", "assistant": "assistant",
    "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant", "ai": "assistant",
    "tool": "tool", "function": "tool", "observation": "tool",
}  # fmt: skip


@final
@dataclass(frozen=True)
class Dialogue:
    """Messages as a chat template sees them, of which answers alone are learned."""

    messages: tuple[Message, ...]
    tools: tuple[Tool, ...] = ()
    place: str = field(default="", compare=False)
    """Where it was read."""

    @property
    def text(self) -> str:
        """It without a chat template: what a tokenizer is trained on, and what tells two of them apart."""
        return "".join(plain_pieces(self.messages, self.tools)) + NEXT

    @property
    def learned(self) -> list[int]:
        """Which messages are learned: the assistant's, but those of `weight` 0."""
        return [i for i, m in enumerate(self.messages) if m["role"] == "assistant" and m.get("weight", 1) != 0]


Document = str | Dialogue
"""What is tokenised: a text, every token of which is learned, or a dialogue."""


def text_of(document: Document) -> str:
    """A document as text."""
    return document if isinstance(document, str) else document.text


def valid_text(text: str) -> str:
    """A text that has a UTF-8 form: JSON escapes can spell surrogates; pairs join, lone ones become U+FFFD."""
    try:
        text.encode("utf-8")
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def plain_pieces(messages: Sequence[Message], tools: Sequence[Tool] = ()) -> Iterator[str]:
    """A dialogue as text without a template; every message is encoded by itself, so that an answer keeps its tokens."""
    if tools:
        yield f"TOOLS: {json.dumps([tool['function'] for tool in tools], ensure_ascii=False)}\n"
    answered = False
    for message in in_turns(messages):
        yield _turn(message, answered)
        answered = message["role"] == "assistant"


def in_turns(messages: Sequence[Message]) -> tuple[Message, ...]:
    """The messages, with an empty turn wherever two answers, or two that wait for one, follow each other.

    Without a template they would read as one. Nothing of an empty answer is learned.
    """
    turns: list[Message] = []
    waiting = False
    for message in messages:
        answer = message["role"] == "assistant"
        if waiting and not answer:
            turns.append({"role": "assistant", "content": "", "weight": 0})
        elif answer and not waiting:
            turns.append({"role": "user", "content": ""})
        turns.append(message)
        waiting = message["role"] in ("user", "tool")
    return tuple(turns)


def content_text(message: Message) -> str:
    """What a message says, its parts one after the other."""
    content = message.get("content", "")
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def _turn(message: Message, answered: bool) -> str:
    role, text = message["role"], content_text(message)
    if role == "assistant":
        functions = [call["function"] for call in message.get("tool_calls", ())]
        calls = [f'{{"name": {json.dumps(f["name"])}, "arguments": {_as_json(f["arguments"])}}}' for f in functions]
        text = "\n".join([text, *calls] if text else calls)
        return text if text[:1].isspace() else f" {text}"
    if role in ("user", "tool"):
        return ("\n" if answered else "") + (TURN if role == "user" else TOOL_TURN).replace("{}", text)
    return f"\n{text}\n" if answered else f"{text}\n"


def _as_json(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def dialogue_in(row: Mapping[str, Any], place: str, column: str | None = None) -> Dialogue | None:
    """The dialogue of a row, in `column` or where one is looked for; None if there is none.

    ValueError: something that is no message, or nothing to learn.
    """
    names = [name for name in (MESSAGES if column is None else (column,)) if row.get(name) is not None]
    if names:
        listed = _messages(row[names[0]], names[0], place)
    elif column is None and (pair := next((p for p in PAIRS if set(p) <= set(row)), None)):
        listed = _pair(row, pair, place)
    else:
        return None
    listed, tools = _plain([*_system(row, listed), *listed], place), _plain(row.get("tools"), place)
    dialogue = Dialogue(tuple(_message(m, place) for m in listed), tuple(_tools(tools, place)), place)
    if listed and not dialogue.learned:
        raise ValueError(f"{place}: no message of the assistant, so there is nothing to learn: leave the row out")
    return dialogue


def listed_in(value: Any) -> list[Any] | None:
    """A cell that is a list, or a list's JSON as text, as tables without lists hold it; None: it is neither."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except ValueError:
            return None
    return value if isinstance(value, list) else None


def _messages(cell: Any, name: str, place: str) -> list[Any]:
    listed = listed_in(cell)
    if listed is None:
        content = "text that is no JSON list" if isinstance(cell, str) else f"a {type(cell).__name__}"
        raise ValueError(
            f'{place}: column {name!r} holds {content}: write messages as [{{"role": "user", "content": "..."}}, ...], '
            "or name the text's column as text_column"
        )
    return listed


def _system(row: Mapping[str, Any], listed: Sequence[Any]) -> list[Any]:
    """The system message of a column of its own, where the messages have none."""
    texts = [row[name] for name in SYSTEM if isinstance(row.get(name), str) and row[name]]
    roles = [m.get("role", m.get("from")) for m in listed if isinstance(m, dict)]
    return [] if not texts or not listed or "system" in roles else [{"role": "system", "content": texts[0]}]


def _pair(row: Mapping[str, Any], pair: tuple[str, str], place: str) -> list[Any]:
    """A prompt and its answer as messages; of answers, those in the prompt are not learned."""
    if row.get("history"):
        raise ValueError(f"{place}: column 'history' is not read: write the turns as messages, or leave it out")
    prompt, answer = _side(row, pair[0], "user", place), _side(row, pair[1], "assistant", place)
    return [*(m | {"weight": 0} if _is_answer(m) else m for m in prompt), *answer]


def _is_answer(message: Any) -> bool:
    role = message.get("role", message.get("from")) if isinstance(message, dict) else None
    return isinstance(role, str) and ROLES.get(role.lower()) == "assistant"


def _plain(value: Any, place: str) -> Any:
    """Messages or tools as JSON has them, every text of them with a UTF-8 form. ValueError: JSON has no such value."""
    try:
        return json.loads(valid_text(json.dumps(value, ensure_ascii=False)))
    except (TypeError, ValueError):
        raise ValueError(
            f"{place}: a message holds a value that JSON does not have (a date, bytes, ...); leave that field out"
        ) from None


def _side(row: Mapping[str, Any], name: str, role: str, place: str) -> list[Any]:
    """A prompt or an answer: a text, or messages."""
    value = row[name]
    if isinstance(value, list):
        return value
    if not isinstance(value, str):
        raise ValueError(f"{place}: column {name!r} holds {type(value).__name__}: give a text, or messages")
    more = [row.get(other) for other in ADDED if role == "user" and other != name]
    return [{"role": role, "content": "\n\n".join([value, *(x for x in more if isinstance(x, str) and x)])}]


def _message(message: Any, place: str) -> Message:
    """A message as templates know it; columns that others of a table have are null here, and left out."""
    if not isinstance(message, dict):
        raise ValueError(f'{place}: a message is no object: write it like {{"role": "user", "content": "..."}}')
    fields = {name: value for name, value in message.items() if value is not None}
    role, content = fields.pop("role", fields.pop("from", None)), fields.pop("content", fields.pop("value", None))
    role = role.lower() if isinstance(role, str) else role
    if not isinstance(role, str) or role not in ROLES:
        raise ValueError(f"{place}: a message has the role {str(role)[:40]!r}: give one of {', '.join(ROLES)}")
    if (weight := fields.get("weight", 1)) not in (0, 1):
        raise ValueError(f"{place}: a message has the weight {str(weight)[:40]!r}: give 0, for not learned, or 1")
    old = fields.pop("function_call", None)
    calls = listed_in(fields.get("tool_calls")) or fields.get("tool_calls") or ([{"function": old}] if old else None)
    content = "" if content is None and calls else content
    parts = isinstance(content, list) and all(isinstance(x, dict) and isinstance(x.get("text"), str) for x in content)
    if not isinstance(content, str) and not parts:
        odd = [x.get("type") for x in content if isinstance(x, dict)] if isinstance(content, list) else []
        odd = [str(kind)[:40] for kind in odd if kind != "text"]
        if odd:
            raise ValueError(f"{place}: a message of the {role} holds a part of type {odd[0]!r}: texts alone are read")
        raise ValueError(f"{place}: a message of the {role} holds no text: give its content as text")
    if calls:
        fields["tool_calls"] = [_call(call, place) for call in (calls if isinstance(calls, list) else [calls])]
    return {"role": ROLES[role], "content": content} | fields


def _call(call: Any, place: str) -> dict[str, Any]:
    """A call of a tool."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError(f"{place}: a tool call names no function: give its name and arguments")
    function = {"name": function["name"], "arguments": function.get("arguments", {})}
    return dict(call) | {"type": "function", "function": function}


def _tools(tools: Any, place: str) -> list[Tool]:
    tools = listed_in(tools) or tools or []
    if isinstance(tools, list):
        tools = [{"type": "function", "function": t} if isinstance(t, dict) and "name" in t else t for t in tools]
    if not isinstance(tools, list) or not all(
        isinstance(t, dict) and isinstance(t.get("function"), dict) for t in tools
    ):
        raise ValueError(f"{place}: column 'tools' is no list of functions: leave it out, or write it as clients do")
    return tools
