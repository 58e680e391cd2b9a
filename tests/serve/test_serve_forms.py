"""What ordinary clients send is taken; what changes results is honoured or refused; answers keep the form asked for."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from serving import Server, post

from lrt.serve.grammar import CallReader, GrammarConstraint
from lrt.serve.schemas import NEUTRAL, CompletionRequest, Unused

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
CONTEXT = 768
TALK = [{"role": "user", "content": "the quick"}]
DIGIT = {"type": "integer", "minimum": 0, "maximum": 9}
SHORT = {"type": "object", "properties": {"n": DIGIT, "b": {"enum": ["x", "yy"]}},
         "required": ["n", "b"], "additionalProperties": False}  # fmt: skip
TOOL = {"type": "function", "function": {"name": "area", "description": "of a box", "parameters": SHORT}}
LAW = {"max_tokens": 60, "seed": 1}


def text(server: Server, **body) -> str:
    found = post(server, "/v1/completions", {"prompt": "def", "max_tokens": 12, "seed": 3} | body)
    assert found.status_code == 200, found.text
    return found.json()["choices"][0]["text"]


def test_an_answer_may_be_sent_back_as_it_is(client):
    messages: list = [*TALK]
    said = client.chat.completions.create(model="tiny", messages=messages, max_tokens=3).choices[0].message
    messages += [said, {"role": "user", "content": "go on"}]
    assert client.chat.completions.create(model="tiny", messages=messages, max_tokens=3).choices[0].finish_reason
    assert (
        client.completions.create(model="tiny", prompt="the", max_tokens=3, temperature=None).choices[0].finish_reason
    )


def test_null_is_as_good_as_absent(server):
    plain = text(server)
    names = ("temperature", "top_p", "n", "stop", "logit_bias", "stream", "logprobs", "best_of", "user", "suffix",
             "model", "stream_options", "response_format", "top_k", "min_tokens", "presence_penalty")  # fmt: skip
    assert text(server, **dict.fromkeys(names)) == plain


def test_values_that_change_nothing_are_taken_and_others_refused(server):
    plain = text(server)
    foreign = {name: values for name, values in NEUTRAL.items() if name not in CompletionRequest.model_fields}
    for i in range(max(map(len, foreign.values()))):
        assert text(server, **{name: values[i] for name, values in foreign.items() if i < len(values)}) == plain
    for name in foreign:
        refused = post(server, "/v1/completions", {"prompt": "def", name: ["other"]})
        error = refused.json()["error"]
        assert refused.status_code == 400 and name in error["message"]
        assert (error["param"], error["code"]) == (name, "unsupported_parameter")
    unused = {"store": True, "metadata": {"a": "b"}, "parallel_tool_calls": False, "service_tier": "flex"}
    unused |= {"prediction": {"type": "content", "content": "x"}, "cache_prompt": False}
    assert text(server, **dict.fromkeys(Unused.model_fields, "x") | unused) == plain
    extra = {"best_of": 1, "logit_bias": {}, "top_k": -1, "min_tokens": 0, "stop_token_ids": [], "ignore_eos": False,
             "response_format": {"type": "text"}, "presence_penalty": 0, "stop": []}  # fmt: skip
    assert text(server, **extra) == plain
    assert text(server, top_k=0) == plain
    chat = post(server, "/v1/chat/completions", {"messages": TALK, "tools": [], "max_tokens": 2})
    assert chat.status_code == 200


LLAMA_CPP = {
    "samplers": [], "temperature": 0, "dynatemp_range": 0, "dynatemp_exponent": 1, "top_k": 0, "top_p": 1, "min_p": 0,
    "xtc_probability": 0, "xtc_threshold": 0.1, "typ_p": 1, "repeat_last_n": 64, "repeat_penalty": 1,
    "presence_penalty": 0, "frequency_penalty": 0, "dry_multiplier": 0, "dry_base": 1.75, "dry_allowed_length": 2,
    "dry_penalty_last_n": -1, "timings_per_token": False, "cache_prompt": True, "id_slot": -1, "mirostat": 0,
}  # fmt: skip
"""What its own page and clients send when nothing was set."""


def test_a_client_of_llama_cpp_is_answered_as_any_other(server):
    assert text(server, **LLAMA_CPP) == text(server, temperature=0)
    talk = {"messages": TALK, "temperature": 0}
    plain, *others = (
        post(server, "/v1/chat/completions", talk | more).json()["choices"]
        for more in ({}, {"max_tokens": -1}, {"max_completion_tokens": -1}, LLAMA_CPP | {"max_tokens": -1})
    )
    assert others == [plain] * 3
    formed = post(server, "/v1/chat/completions", talk | {"json_schema": SHORT, "max_tokens": 60}).json()
    assert json.loads(formed["choices"][0]["message"]["content"])["b"] in ("x", "yy")


def test_penalties_bias_and_stop_tokens_act(server):
    ids = server.loaded.tokenizer.encode("def")
    biased = post(
        server, "/v1/completions", {"prompt": "def", "max_tokens": 4, "logit_bias": {str(ids[0]): 100}}
    ).json()
    assert biased["choices"][0]["text"] == server.loaded.tokenizer.decode([ids[0]] * 4)
    stopped = {"prompt": "def", "max_tokens": 9, "logit_bias": {str(ids[0]): 100}, "stop_token_ids": [ids[0]]}
    found = post(server, "/v1/completions", stopped).json()
    assert (found["choices"][0]["text"], found["choices"][0]["finish_reason"]) == ("", "stop")
    longer = post(server, "/v1/completions", stopped | {"min_tokens": 3}).json()
    assert longer["usage"]["completion_tokens"] >= 4
    often = {"prompt": "def", "max_tokens": 12, "temperature": 0, "logit_bias": {str(ids[0]): 1}}
    assert text(server, **often) != text(server, **often, presence_penalty=2, frequency_penalty=2)


def test_json_of_a_schema_is_kept_whole_and_streamed(client):
    form = {"type": "json_schema", "json_schema": {"name": "short", "strict": True, "schema": SHORT}}
    law = {"model": "tiny", "messages": TALK, "response_format": form, "n": 3, **LAW}
    found = client.chat.completions.create(**law)
    for choice in found.choices:
        made = json.loads(choice.message.content)
        assert set(made) == {"n", "b"} and 0 <= made["n"] <= 9 and made["b"] in ("x", "yy")
        assert choice.finish_reason == "stop"
    texts = [""] * 3
    for chunk in client.chat.completions.create(**law, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == [c.message.content for c in found.choices]


def test_any_json_object(server):
    bias = {str(server.loaded.tokenizer.encode("}")[0]): 8}
    found = text(server, response_format={"type": "json_object"}, max_tokens=200, logit_bias=bias)
    assert isinstance(json.loads(found), dict)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "area"}}])
def test_a_call_that_is_asked_for_is_made(client, choice):
    law = {"model": "tiny", "messages": TALK, "tools": [TOOL], "tool_choice": choice, **LAW}
    found = client.chat.completions.create(**law).choices[0]
    (call,) = found.message.tool_calls
    assert (found.finish_reason, found.message.content, call.function.name) == ("tool_calls", None, "area")
    assert set(json.loads(call.function.arguments)) == {"n", "b"}
    name, arguments = "", ""
    for chunk in client.chat.completions.create(**law, stream=True):
        for piece in chunk.choices[0].delta.tool_calls or []:
            name += piece.function.name or ""
            arguments += piece.function.arguments or ""
    assert (name, arguments) == ("area", call.function.arguments)
    messages = [*TALK, found.message, {"role": "tool", "tool_call_id": call.id, "content": "7"}]
    assert client.chat.completions.create(model="tiny", messages=messages, max_tokens=3).choices[0].finish_reason


def test_a_free_choice_is_a_call_or_text_that_is_none(server):
    kinds = set()
    brace = str(server.loaded.tokenizer.encode("{")[0])
    for bias in (100, -100):
        body = {"messages": TALK, "tools": [TOOL], "logit_bias": {brace: bias}, **LAW}
        choice = post(server, "/v1/chat/completions", body).json()["choices"][0]
        kinds.add(bool(choice["message"].get("tool_calls")))
        assert choice["message"].get("tool_calls") or not choice["message"]["content"].startswith("{")
    assert kinds == {True, False}


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"response_format": {"type": "json_schema"}}, "json_schema belongs to type json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "foo"}}}}, "cannot be kept"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}}, "cannot be kept"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"$ref": "http://x/y"}}}}, "be kept"),
        ({"response_format": {"type": "json_object"}, "ignore_eos": True}, "leave out ignore_eos"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "none of the tools"),
        ({"tool_choice": "required"}, "there are no tools"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name"),
        ({"top_logprobs": 2}, "need logprobs"),
        ({"chat_template_kwargs": {"a": 1}}, "no chat template"),
    ],
)  # fmt: skip
def test_forms_that_cannot_be_kept_are_refused(server, body, says):
    found = post(server, "/v1/chat/completions", {"messages": TALK} | body)
    assert found.status_code == 400 and says in found.json()["error"]["message"], found.text


@pytest.mark.parametrize("size", [1, 2, 5, 100])
def test_calls_are_told_from_text_however_they_are_cut(size):
    def read(said: str, finish: str) -> tuple[str | None, str, str]:
        reader, got = CallReader(["area"]), ["", ""]
        cuts = [said[i : i + size] for i in range(0, len(said), size)]
        for i, piece in enumerate(cuts):
            text, arguments = reader.push(piece, finish if i == len(cuts) - 1 else None)
            got = [got[0] + text, got[1] + arguments]
        return reader.name, got[0], got[1]

    head = '{"name": "area", "arguments": '
    assert read(head + '{"n": 1}}', "stop") == ("area", "", '{"n": 1}')
    assert read(head + '{"n": 1', "length") == ("area", "", '{"n": 1')
    assert read("text {", "stop") == (None, "text {", "")
    assert read('{"name": "ar', "length") == (None, '{"name": "ar', "")


def test_tokens_as_vllm_answers(server):
    made = post(server, "/tokenize", {"prompt": "def area", "return_token_strs": True}).json()
    tokenizer = server.loaded.tokenizer
    assert made["tokens"] == [tokenizer.bos, *tokenizer.encode("def area")]
    assert (made["count"], made["max_model_len"], made["token_strs"][0]) == (len(made["tokens"]), 768, "<|bos|>")
    plain = post(server, "/tokenize", {"prompt": "def area", "add_special_tokens": False}).json()["tokens"]
    assert post(server, "/detokenize", {"tokens": plain}).json() == {"prompt": "def area"}
    assert post(server, "/tokenize", {"messages": TALK}).json()["count"] > 3
    assert httpx.get(server.url + "/tokenizer_info", timeout=60).json()["bos_token"] == "<|bos|>"
    assert post(server, "/detokenize", {"tokens": [9999]}).status_code == 400
    assert post(server, "/tokenize", {}).status_code == 400


def test_error_codes_and_names_of_models(server):
    long = post(server, "/v1/completions", {"prompt": [1] * 768}).json()["error"]
    assert long["param"] == "prompt" and "at most 767" in long["message"]
    assert (
        post(server, "/v1/completions", {"prompt": "x" * 90_000}).json()["error"]["code"] == "context_length_exceeded"
    )
    assert post(server, "/v1/completions", {"prompt": "x", "model": "o/x"}).json()["error"]["code"] == "model_not_found"
    assert httpx.get(server.url + "/v1/models/org/other", timeout=60).status_code == 404
    server.served.name = "org/tiny"
    try:
        assert httpx.get(server.url + "/v1/models/org/tiny", timeout=60).json()["id"] == "org/tiny"
    finally:
        server.served.name = "tiny"


def test_kept_states_are_apart_by_salt_and_metrics_do_not_tell(server):
    prompt, law = "fox jumps over the lazy dog, width and height", {"max_tokens": 2, "temperature": 0}
    before = server.metric("lrt_reused_tokens_total")
    for salt in ("a", "b"):
        post(server, "/v1/completions", {"prompt": prompt, "cache_salt": salt} | law)
    assert server.metric("lrt_reused_tokens_total") == before
    post(server, "/v1/completions", {"prompt": prompt + " more", "cache_salt": "a"} | law)
    assert server.metric("lrt_reused_tokens_total") > before
    shown = httpx.get(server.url + "/metrics", timeout=60).text
    for name in ("reused", "swept", "steps", "kept"):
        assert f"lrt_{name}" not in shown


def formed(schema: dict) -> dict:
    return {"prompt": "a", "seed": 1, "max_tokens": 4,
            "response_format": {"type": "json_schema", "json_schema": {"schema": schema}}}  # fmt: skip


def doubled(kind: str) -> dict:
    """A schema that is 2 ** 24 times as large once its references are written out."""
    two = {f"d{i}": {kind: [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(24)}
    return {"$defs": two | {"d24": {"type": "string"}}, "$ref": "#/$defs/d0"}


HOSTILE = {
    "itself": {"$ref": "#"},
    "circle": {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
    "many": {"anyOf": [{"type": "object", "properties": {f"p{i}": {"type": "string"}}} for i in range(800)]},
    "every": {"allOf": [{"type": "object", "properties": {f"p{i}": {"type": "string"}}} for i in range(800)]},
    "anyOf doubled": doubled("anyOf"),
    "allOf doubled": doubled("allOf"),
    "backtracking": {"type": "string", "pattern": "^(a|aa)*b{1,5000}$"},
    "states": {"type": "string", "pattern": ".*[ab].{20}"},
    "repeated": {"type": "string", "pattern": "^((a{0,100}){0,100}){0,100}$"},
    "look ahead": {"type": "string", "pattern": "^(?=.*a)(?=.*b).*$"},
    "long": {"type": "string", "minLength": 100_000, "maxLength": 2**31},
    "items": {"type": "array", "items": {"type": "string"}, "minItems": 2**40},
    "digits": {"type": "integer", "minimum": -(10**300), "maximum": 10**300},
    "multiple": {"type": "integer", "multipleOf": 999_999_937},
    "one text": {"enum": ["x" * 60_000]},
    "no value": {"properties": {"a": False}, "required": ["a"]},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_schemas_are_kept_or_refused_and_touch_nobody(server, name, caplog):
    honest = {"prompt": "the quick", "max_tokens": 8, "seed": 7}
    alone = post(server, "/v1/completions", honest).json()["choices"][0]["text"]
    with ThreadPoolExecutor(4) as pool:
        hostile = pool.submit(post, server, "/v1/completions", formed(HOSTILE[name]))
        beside = [pool.submit(post, server, "/v1/completions", honest) for _ in range(3)]
        assert {r.result().json()["choices"][0]["text"] for r in beside} == {alone}
        found = hostile.result()
    assert found.status_code in (200, 400), found.text
    if found.status_code == 400:
        refusal = found.json()["error"]["message"]
        assert ("kept" in refusal or "give smaller" in refusal) and len(found.text) < 800
    assert caplog.text == ""


def test_a_form_that_fails_on_its_way_is_the_requests_own_fault(server, caplog, monkeypatch):
    """Before anything has been sent it is 400, afterwards the stream's last event; it is logged as nobody's error."""
    many = formed(HOSTILE["many"]) | {"max_tokens": 60}  # alternatives begin alike: llguidance gives up at the quote
    found = post(server, "/v1/completions", many)
    assert (found.status_code, "kept" in found.json()["error"]["message"]) == (400, True)
    take = GrammarConstraint.take

    def until_the_third(self: GrammarConstraint, token: int) -> None:
        taken.append(token)
        if len(taken) == 3:
            raise ValueError("the form could not be kept")
        take(self, token)

    taken: list[int] = []
    monkeypatch.setattr(GrammarConstraint, "take", until_the_third)
    body = formed({"type": "string", "minLength": 40}) | {"max_tokens": 60, "stream": True}
    with httpx.stream("POST", server.url + "/v1/completions", timeout=60, json=body) as stream:
        events = [line for line in stream.iter_lines() if line]
    assert stream.status_code == 200 and "kept" in json.loads(events[-1].removeprefix("data: "))["error"]["message"]
    assert caplog.text == ""


def test_tools_are_measured_together_and_before_anything_is_tokenised(server, monkeypatch):
    many = [{"type": "function", "function": {"name": f"f{i}", "description": "x" * 400}} for i in range(128)]
    monkeypatch.setattr(server.served.words.tokenizer, "encode", None)
    found = post(server, "/v1/chat/completions", {"messages": TALK, "tools": many, "tool_choice": "none"})
    assert (found.status_code, found.json()["error"]["code"]) == (400, "context_length_exceeded")
    wide = {"type": "object", "properties": {f"property{i}": {"type": "string"} for i in range(100)}}
    many = [{"type": "function", "function": {"name": f"f{i}", "parameters": wide}} for i in range(128)]
    found = post(server, "/v1/chat/completions", {"messages": TALK, "tools": many})
    assert found.status_code == 400 and "schemas have more than" in found.json()["error"]["message"]
