"""Requests of OpenAI's and vLLM's schemas one field at a time, and answers drawn at random against their schemas."""

from __future__ import annotations

import json
import random

import httpx
import pytest
from serving import Server, post

from lrt.data.tokenizer import ByteTokenizer
from lrt.serve.grammar import GrammarConstraint, Grammars, answer_form
from lrt.serve.messages import ResponseFormat
from lrt.serve.schemas import NEUTRAL, ChatRequest

CONTEXT = 768
TALK = [{"role": "user", "content": "the quick"}]
CALL = {"id": "1", "type": "function", "function": {"name": "area", "arguments": "{}"}}


def tool(name: str) -> dict:
    value = {"type": "integer", "minimum": 0, "maximum": 9}
    schema = {"type": "object", "properties": {"n": value}, "required": ["n"], "additionalProperties": False}
    return {"type": "function", "function": {"name": name, "parameters": schema}}


TOOLS = [tool("area"), tool("edge")]
SHORT = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"], "additionalProperties": False}


def chat(server: Server, **body) -> httpx.Response:
    return post(server, "/v1/chat/completions", {"messages": TALK, "max_tokens": 3, "seed": 1} | body)


def error_of(answer: httpx.Response) -> dict:
    assert answer.status_code == 400, answer.text
    return answer.json()["error"]


def said(server: Server, **body) -> str:
    answer = chat(server, **body)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["message"]["content"]


# Fields.


def test_a_null_in_any_field_is_as_good_as_absent(server):
    names = set(ChatRequest.model_fields) - {"messages", "max_tokens", "seed"} | set(NEUTRAL) | {"never_heard_of"}
    assert said(server, **dict.fromkeys(names)) == said(server)
    inside = {"stream_options": {"include_usage": None}, "response_format": {"type": "text", "json_schema": None}}
    assert chat(server, **inside, stream=True).text.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({"never_heard_of": 1}, "never_heard_of", "unknown_parameter"),
        ({"verbosity": "low"}, "verbosity", "unsupported_parameter"),
        ({"reasoning_effort": "high"}, "reasoning_effort", "unsupported_parameter"),
        ({"modalities": ["text", "audio"]}, "modalities", "unsupported_parameter"),
        ({"prompt_logprobs": 0}, "prompt_logprobs", "unsupported_parameter"),
        ({"echo": True}, "echo", "unsupported_parameter"),
        ({"guided_json": {}}, "guided_json", "unsupported_parameter"),
        ({"structured_outputs": {"choice": ["a"]}}, "structured_outputs", "unsupported_parameter"),
        ({"structured_outputs": {"json": SHORT, "regex": "a"}}, "structured_outputs", "unsupported_parameter"),
        ({"structured_outputs": 3}, "structured_outputs", "unsupported_parameter"),
        ({"guided_json": SHORT, "response_format": {"type": "json_object"}}, "guided_json", None),
        ({"guided_json": SHORT, "structured_outputs": {"json": SHORT}}, "guided_json", None),
        ({"json_schema": SHORT, "guided_json": SHORT}, "guided_json", None),
        ({"grammar": "root ::= 'a'"}, "grammar", "unsupported_parameter"),
        ({"mirostat": 2}, "mirostat", "unsupported_parameter"),
        ({"n_predict": 5}, "n_predict", "unsupported_parameter"),
        ({"repeat_last_n": 64, "presence_penalty": 1}, "repeat_last_n", "unsupported_parameter"),
        ({"repeat_last_n": 64, "repetition_penalty": 1.1}, "repeat_last_n", "unsupported_parameter"),
        ({"max_tokens": -2}, "max_tokens", None),
        ({"max_tokens": True}, "max_tokens", None),
        ({"dry_base": "x"}, "dry_base", None),
        ({"best_of": 2}, "best_of", "unsupported_parameter"),
        ({"stream_options": {}}, "stream_options", None),
        ({"top_logprobs": 1}, "top_logprobs", None),
        ({"tool_choice": "required"}, "tool_choice", None),
        ({"tool_choice": "any"}, "tool_choice", None),
        ({"service_tier": "first"}, "service_tier", None),
        ({"store": "yes"}, "store", None),
        ({"user": {}}, "user", None),
        ({"metadata": []}, "metadata", None),
        ({"messages": None}, "messages", "missing_required_parameter"),
    ],
)
def test_what_is_wrong_is_named(server, body, param, code):
    error = error_of(chat(server, **body))
    assert (error["param"], error["code"]) == (param, code) and param in error["message"]
    assert "literal[" not in error["message"] and len(error["message"]) < 300


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_vllms_own_fields_for_json_are_response_format(server, path: str):
    begin = {"prompt": "the"} if path == "/v1/completions" else {"messages": TALK}
    settings = begin | {"max_tokens": 40, "temperature": 1.0, "seed": 3}

    def answer(**form):
        response = post(server, path, settings | form)
        assert response.status_code == 200, response.text
        (choice,) = response.json()["choices"]
        return choice.get("text") or choice["message"]["content"]

    schema, any_object = {"type": "json_schema", "json_schema": {"schema": SHORT}}, {"type": "json_object"}
    expected = answer(response_format=schema)
    assert set(json.loads(expected)) == {"ok"} and expected != answer()
    assert answer(guided_json=SHORT) == expected
    assert answer(structured_outputs={"json": SHORT, "regex": None, "json_object": False}) == expected
    assert answer(structured_outputs={"json_object": True}) == answer(response_format=any_object)
    assert answer(structured_outputs={}) == answer(structured_outputs={"choice": None}) == answer()


@pytest.mark.parametrize("mode", ["auto", "required"])
def test_tools_that_are_not_allowed_are_not_called(server, mode):
    allowed = {"mode": mode, "tools": [{"type": "function", "function": {"name": "edge"}}]}
    law = {"tools": TOOLS, "tool_choice": {"type": "allowed_tools", "allowed_tools": allowed}, "max_tokens": 60}
    brace = str(server.loaded.tokenizer.encode("{")[0])
    message = chat(server, **law, logit_bias={brace: 100}).json()["choices"][0]["message"]
    assert [call["function"]["name"] for call in message["tool_calls"]] == ["edge"]
    allowed["tools"].append({"type": "function", "function": {"name": "other"}})
    assert "'other', which is none of the tools" in error_of(chat(server, **law))["message"]


# Messages.


def test_forms_of_a_message_that_say_the_same(server):
    parts = [{"type": "text", "text": "the "}, {"type": "text", "text": "quick"}]
    same = {"role": "user", "content": parts, "name": "bob", "refusal": None, "tool_calls": None, "audio": None}
    assert said(server, messages=[same]) == said(server)
    asked = [*TALK, {"role": "assistant", "content": "no"}, *TALK]
    answers = [
        {"content": None, "refusal": "no", "function_call": None, "annotations": []},
        {"content": [{"type": "refusal", "refusal": "no"}], "tool_calls": [], "reasoning_content": ""},
    ]
    for answer in answers:
        assert said(server, messages=[*TALK, {"role": "assistant"} | answer, *TALK]) == said(server, messages=asked)
    called = [*TALK, {"role": "assistant", "content": None, "tool_calls": [CALL]}]
    result = {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "7"}]}
    assert said(server, messages=[*called, result]) == said(server, messages=[*called, result | {"content": "7"}])
    system = [{"role": "system", "content": "short"}, *TALK]
    assert said(server, messages=system) != said(server)
    assert said(server, messages=[system[0] | {"role": "developer"}, *TALK])


@pytest.mark.parametrize(
    ("message", "says"),
    [
        ({"role": "user"}, "messages.0: content is missing"),
        ({"role": "assistant", "content": None}, "messages.0: content is missing"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "messages.0.content.0.type: "),
        ({"role": "user", "content": [{"type": "text"}]}, "messages.0.content.0: a part of type text holds text"),
        ({"role": "user", "content": 5}, "messages.0.content: "),
        ({"role": "user", "content": "a", "tool_calls": [CALL]}, "messages.0: tool_calls belong to the assistant's"),
        ({"role": "assistant", "function_call": {"name": "f"}}, "messages.0.function_call is not known here"),
        ({"role": "assistant", "content": "a", "audio": {"id": "x"}}, "messages.0.audio is not known here"),
        ({"role": "function", "name": "f", "content": "1"}, "messages.0.role: "),
    ],
)  # fmt: skip
def test_messages_that_cannot_be_taken_are_named(server, message, says):
    error = error_of(chat(server, messages=[message, *TALK]))
    assert error["message"].startswith(says) and error["param"] == "messages"


# Paths.


def test_paths_and_methods_that_are_not_there(server):
    def asked(method: str, path: str) -> httpx.Response:
        return httpx.request(method, server.url + path, timeout=60)

    for method, path in (("GET", "/v1/files"), ("POST", "/v1/responses"), ("POST", "/v1/audio/translations")):
        error = asked(method, path).json()["error"]
        assert asked(method, path).status_code == 404 and error["message"].startswith(f"{method} {path} is not offered")
    wrong = asked("PUT", "/v1/chat/completions")
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")
    assert wrong.json()["error"]["message"] == "PUT /v1/chat/completions is not offered here; use POST"
    for path in ("/v1/models", "/v1/models/tiny", "/health"):
        head = asked("HEAD", path)
        assert (head.status_code, head.content) == (200, b"") and head.headers["x-request-id"]


# Answers.

ANY = random.Random(1)


def closed(**properties) -> dict:
    return {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}


DIGIT = {"type": "integer", "minimum": 0, "maximum": 9}
KEPT = {
    "enum": closed(a={"enum": ["x", 3, None, {"b": [1]}]}), "const": closed(a={"const": {"b": [1, 2]}}),
    "ref": closed(a={"$ref": "#/$defs/p"}) | {"$defs": {"p": closed(n=DIGIT)}},
    "ref beside others": closed(a={"$ref": "#/$defs/p", "maximum": 3}) | {"$defs": {"p": DIGIT}},
    "recursive": closed(a={"anyOf": [{"$ref": "#"}, {"type": "null"}]}),
    "anyOf beside others": closed(a={"type": "integer", "anyOf": [{"minimum": 5}, {"maximum": -5}]}),
    "allOf": closed(a={"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 9}]}),
    "oneOf by a word": {"oneOf": [closed(k={"const": "x"}, n=DIGIT), closed(k={"const": "y"}, m={"type": "null"})]},
    "nested": closed(a={"type": "array", "minItems": 2, "maxItems": 3, "items": {"type": "array", "items": DIGIT}}),
    "tuple": closed(a={"type": "array", "prefixItems": [{"type": "null"}, DIGIT], "items": False, "minItems": 2}),
    "pattern": closed(a={"type": "string", "pattern": "^[ab]+$", "minLength": 2, "maxLength": 3}),
    "length": closed(a={"type": "string", "minLength": 2, "maxLength": 3}),
    "date": closed(a={"type": "string", "format": "date"}), "uuid": closed(a={"type": "string", "format": "uuid"}),
    "exclusive": closed(a={"type": "integer", "exclusiveMinimum": 0, "exclusiveMaximum": 3}),
    "number": closed(a={"type": "number", "exclusiveMinimum": -1, "maximum": 1}),
    "multiple": closed(a={"type": "integer", "multipleOf": 5, "minimum": -20, "maximum": 20}),
    "types": closed(a={"type": ["boolean", "null"]}),
    "names": {"type": "object", "patternProperties": {"^a": {"type": "null"}}, "additionalProperties": False},
    "how many names": {"type": "object", "minProperties": 1, "maxProperties": 2, "additionalProperties": DIGIT},
}  # fmt: skip


@pytest.fixture(scope="module")
def grammars():
    tokenizer = ByteTokenizer()
    return Grammars(tokenizer, tokenizer.vocab_size)


def constraint(grammars: Grammars, schema: dict) -> GrammarConstraint:
    form = ResponseFormat.model_validate({"type": "json_schema", "json_schema": {"schema": schema}})
    made = answer_form(form, [], None)
    assert made is not None
    return grammars.of(made.lark)


def drawn(form: GrammarConstraint) -> bytes | None:
    """An answer of bytes that the form allows, those that end something preferred; None: it grew too long."""
    answer = bytearray()
    for _ in range(300):
        allowed = form.allowed().nonzero()[:, 0].tolist()
        assert allowed, f"nothing may follow {bytes(answer)}"
        ending = [i for i in allowed if i < 256 and chr(i) in '"}],0123456789']
        token = ANY.choice(ending if ending and ANY.random() < 0.6 else allowed)
        if token >= 256:
            return bytes(answer)
        form.take(token)
        answer.append(token)
    return None


@pytest.mark.parametrize("name", KEPT)
def test_answers_at_random_keep_their_schema(grammars, name):
    validator = pytest.importorskip("jsonschema")
    form, whole = constraint(grammars, KEPT[name]), 0
    for answer in (drawn(form.copy()) for _ in range(12)):
        if answer is not None:
            validator.validate(json.loads(answer), KEPT[name], format_checker=validator.FormatChecker())
            whole += 1
    assert whole >= 6


@pytest.mark.parametrize(
    ("part", "says"),
    [
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "array", "contains": DIGIT}, "contains"),
        ({"not": {"type": "null"}}, "not"),
        ({"type": "string", "format": "unheard-of"}, "unheard-of"),
        ({"type": "string", "pattern": "^(?=a)a$"}, "regex"),
        ({"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 0.01}, "at least 1 apart"),
        ({"type": "number", "minimum": 1, "exclusiveMinimum": 1, "maximum": 1.5}, "at least 1 apart"),
        ({"type": "integer", "minimum": 10**20}, "too large"),
        ({"type": "integer", "minimum": 10**400}, "too large"),
        ({"properties": {"default": {"type": "number", "exclusiveMinimum": 0, "maximum": 0.5}}}, "at least 1 apart"),
        ({"type": "integer", "minimum": 0, "exclusiveMinimum": True}, "must be a number"),
        ({"type": "integer", "minimum": 5, "maximum": 2}, "unsatisfiable"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf"),
    ],
)
def test_what_cannot_be_kept_is_refused_by_name(grammars, part, says):
    for schema in (closed(a=part), closed(a={"type": "array", "minItems": 1, "items": part})):
        with pytest.raises(ValueError, match=says) as caught:
            constraint(grammars, schema)
        assert len(str(caught.value)) < 300 and "%json" not in str(caught.value)


def test_a_schema_cannot_tell_the_library_to_look_away(grammars):
    with pytest.raises(ValueError, match="may not hold x-guidance"):
        constraint(grammars, closed(a={"type": "array", "uniqueItems": True}) | {"x-guidance": {"lenient": True}})
