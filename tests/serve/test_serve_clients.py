"""Clients that nobody here wrote, each against a live server: answers, streams, JSON of a schema, tools."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel, Field
from serving import Server, opened, spelled

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
CONTEXT = 768
TALK: list[Any] = [{"role": "user", "content": "def"}]
PROMPT = "USER: def\nBOT:"
"""The conversation as the model reads it."""


class Short(BaseModel, extra="forbid"):
    """A form that a random model fills in few tokens."""

    n: int = Field(ge=0, le=9)
    b: Literal["x", "yy"]


TOOL: Any = {"type": "function", "function": {"name": "area", "parameters": Short.model_json_schema()}}


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    """No client asks the network for anything, nor reads this machine's settings."""
    settings = {"OPENAI_API_KEY": "none", "LITELLM_LOCAL_MODEL_COST_MAP": "True", "LLM_USER_PATH": str(tmp_path)}
    for name, value in (settings | {"LANGSMITH_TRACING": "false", "LANGCHAIN_TRACING_V2": "false"}).items():
        monkeypatch.setenv(name, value)
    yield
    with contextlib.suppress(RuntimeError):  # the loop that some clients leave behind, if there is one
        asyncio.get_event_loop_policy().get_event_loop().close()
        asyncio.set_event_loop(None)
    gc.collect()  # connections that clients leave open are closed here, where warnings are ignored


def plain(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)


def test_litellm(server: Server):
    litellm = pytest.importorskip("litellm")
    where = {"api_base": server.url + "/v1", "api_key": "none", "max_retries": 0}
    law = where | {"model": "openai/tiny", "messages": TALK, "temperature": 0, "max_tokens": 8}
    expected = spelled(server, opened(server, PROMPT))
    assert litellm.completion(**law).choices[0].message.content == expected
    streamed = litellm.completion(**law, stream=True, stream_options={"include_usage": True})
    assert "".join(c.choices[0].delta.content or "" for c in streamed if c.choices) == expected
    form = litellm.completion(**law | {"max_tokens": 60}, response_format=Short)
    assert Short.model_validate_json(form.choices[0].message.content)
    called = litellm.completion(**law | {"max_tokens": 90}, tools=[TOOL], tool_choice="required")
    (call,) = called.choices[0].message.tool_calls
    assert call.function.name == "area" and Short.model_validate_json(call.function.arguments)
    result = {"role": "tool", "tool_call_id": call.id, "content": "7"}
    again = litellm.completion(**law | {"messages": [*TALK, called.choices[0].message, result]}, tools=[TOOL])
    assert again.choices[0].finish_reason
    text = where | {"model": "text-completion-openai/tiny", "prompt": "def area(", "temperature": 0, "max_tokens": 8}
    assert litellm.text_completion(**text).choices[0].text == spelled(server, opened(server, "def area("))
    with pytest.raises(litellm.BadRequestError, match="verbosity"):
        litellm.completion(**law, extra_body={"verbosity": "low"})


def test_langchain(server: Server):
    langchain = pytest.importorskip("langchain_openai")
    law: Any = {"model": "tiny", "base_url": server.url + "/v1", "api_key": "none", "temperature": 0, "max_retries": 0}
    model, long = (langchain.ChatOpenAI(**law, max_tokens=n) for n in (8, 90))
    expected = spelled(server, opened(server, PROMPT))
    whole = model.invoke("def")
    assert whole.content == expected and whole.usage_metadata["output_tokens"] == 8
    assert "".join(piece.content for piece in model.stream("def")) == expected
    for method in ("json_schema", "function_calling"):
        assert isinstance(long.with_structured_output(Short, method=method).invoke("def"), Short), method
    called = long.bind_tools([TOOL], tool_choice="any").invoke("def")
    assert [call["name"] for call in called.tool_calls] == ["area"]
    pieces = list(long.bind_tools([TOOL], tool_choice="area").stream("def"))
    total = pieces[0]
    for piece in pieces[1:]:
        total += piece
    assert [Short.model_validate(call["args"]) for call in total.tool_calls]
    messages = pytest.importorskip("langchain_core.messages")
    talk = [messages.SystemMessage("short"), messages.HumanMessage("def"), called]
    talk += [messages.ToolMessage("7", tool_call_id=called.tool_calls[0]["id"])]
    assert model.bind_tools([TOOL]).invoke(talk).response_metadata["finish_reason"]


@pytest.mark.parametrize("mode", ["TOOLS", "TOOLS_STRICT", "JSON_SCHEMA"])
def test_instructor(server: Server, mode: str):
    instructor = pytest.importorskip("instructor")
    with plain(server) as client_of_openai:
        client = instructor.from_openai(client_of_openai, mode=instructor.Mode[mode])
        law: Any = {"model": "tiny", "messages": TALK, "response_model": Short, "max_tokens": 90, "max_retries": 0}
        assert isinstance(client.chat.completions.create(**law, seed=1), Short)


MODELS = """
- model_id: ours
  model_name: tiny
  api_base: {url}/v1
  supports_schema: true
  supports_tools: true
"""


def test_llm(server: Server, tmp_path: Path):
    pytest.importorskip("llm")
    (tmp_path / "extra-openai-models.yaml").write_text(MODELS.format(url=server.url), encoding="utf-8")

    def asked(*options: str) -> str:
        command = [sys.executable, "-m", "llm", "-m", "ours", "def", "--no-log", "-o", "temperature", "0", *options]
        ran = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=os.environ, timeout=120)
        assert ran.returncode == 0, ran.stderr
        return ran.stdout

    expected = spelled(server, opened(server, PROMPT))
    for stream in ([], ["--no-stream"]):
        assert asked("-o", "max_tokens", "8", *stream).rstrip("\n") == expected.rstrip("\n")
    schema = json.dumps(Short.model_json_schema())
    assert Short.model_validate_json(asked("-o", "max_tokens", "60", "--schema", schema))


def test_aisuite(server: Server):
    aisuite = pytest.importorskip("aisuite")
    client = aisuite.Client({"openai": {"base_url": server.url + "/v1", "api_key": "none"}})
    answer = client.chat.completions.create(model="openai:tiny", messages=TALK, temperature=0, max_tokens=8)
    assert answer.choices[0].message.content == spelled(server, opened(server, PROMPT))


def test_smolagents(server: Server):
    smolagents = pytest.importorskip("smolagents")
    settings = {"model_id": "tiny", "api_base": server.url + "/v1", "api_key": "none", "temperature": 0}
    model = smolagents.OpenAIModel(**settings, max_tokens=8)
    talk = [smolagents.ChatMessage(role="user", content=[{"type": "text", "text": "def"}])]
    expected = spelled(server, opened(server, PROMPT))
    assert model.generate(talk).content == expected
    assert "".join(piece.content or "" for piece in model.generate_stream(talk)) == expected


def test_pydantic_ai(server: Server):
    pydantic_ai = pytest.importorskip("pydantic_ai")
    models = pytest.importorskip("pydantic_ai.models.openai")
    providers = pytest.importorskip("pydantic_ai.providers.openai")
    where = providers.OpenAIProvider(base_url=server.url + "/v1", api_key="none")
    model, short = models.OpenAIChatModel("tiny", provider=where), {"temperature": 0, "max_tokens": 8}
    text = pydantic_ai.Agent(model).run_sync("def", model_settings=short)
    assert text.output == spelled(server, opened(server, PROMPT))
    for form in (Short, pydantic_ai.NativeOutput(Short)):  # by a call, and by a schema
        made = pydantic_ai.Agent(model, output_type=form).run_sync("def", model_settings={"max_tokens": 90})
        assert isinstance(made.output, Short)


def test_outlines(server: Server):
    outlines = pytest.importorskip("outlines")
    with plain(server) as client:
        model, expected = outlines.from_openai(client, "tiny"), spelled(server, opened(server, PROMPT))
        assert model("def", temperature=0, max_tokens=8) == expected
        assert "".join(model.stream("def", temperature=0, max_tokens=8)) == expected
        assert Short.model_validate_json(model("def", Short, max_tokens=60))
        as_vllm = outlines.from_vllm(client, "tiny")
        assert Short.model_validate_json(as_vllm("def", Short, max_tokens=60))
        with pytest.raises(Exception, match="structured_outputs is not supported"):
            as_vllm("def", Literal["x", "yy"], max_tokens=8)


def test_haystack(server: Server):
    chat = pytest.importorskip("haystack.components.generators.chat")
    kinds, utils = pytest.importorskip("haystack.dataclasses"), pytest.importorskip("haystack.utils")
    settings: Any = {"model": "tiny", "api_base_url": server.url + "/v1", "api_key": utils.Secret.from_token("none")}
    talk, pieces = [kinds.ChatMessage.from_user("def")], []
    short = {"temperature": 0, "max_tokens": 8}
    whole = chat.OpenAIChatGenerator(**settings, generation_kwargs=short)
    streamed = chat.OpenAIChatGenerator(**settings, generation_kwargs=short, streaming_callback=pieces.append)
    expected = spelled(server, opened(server, PROMPT))
    assert [one.run(talk)["replies"][0].text for one in (whole, streamed)] == [expected, expected]
    assert "".join(piece.content for piece in pieces) == expected
    form = chat.OpenAIChatGenerator(**settings, generation_kwargs={"max_tokens": 60, "response_format": Short})
    assert Short.model_validate_json(form.run(talk)["replies"][0].text)


def test_dspy(server: Server):
    dspy = pytest.importorskip("dspy")
    where = {"api_base": server.url + "/v1", "api_key": "none", "cache": False, "num_retries": 0}
    model = dspy.LM("openai/tiny", temperature=0, max_tokens=8, **where)
    assert model(messages=TALK) == [spelled(server, opened(server, PROMPT))]


def test_openai_agents(server: Server):
    agents = pytest.importorskip("agents")
    agents.set_tracing_disabled(True)
    client = openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
    model = agents.OpenAIChatCompletionsModel(model="tiny", openai_client=client)

    def answer(output_type: type | None, limit: int):
        settings = agents.ModelSettings(temperature=0, max_tokens=limit)
        agent = agents.Agent(name="a", model=model, model_settings=settings, output_type=output_type)
        return agents.Runner.run_sync(agent, "def", max_turns=1).final_output

    assert answer(None, 8) == spelled(server, opened(server, PROMPT))
    assert isinstance(answer(Short, 90), Short)
