"""Clients of the npm registry against the server: installed by npm where node is at hand."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from serving import Server, opened, spelled

pytestmark = [pytest.mark.slow, pytest.mark.skipif(shutil.which("npm") is None, reason="needs node and npm")]

OPENAI = """
import OpenAI from "openai";
const client = new OpenAI({ baseURL: process.argv[2] + "/v1", apiKey: "none", maxRetries: 0 });
const model = (await client.models.list()).data[0].id;
const messages = [{ role: "user", content: "def" }];
const law = { model, max_tokens: 8, temperature: 0 };
const whole = await client.chat.completions.create({ ...law, messages });
let streamed = "", usage = null;
const options = { stream: true, stream_options: { include_usage: true } };
for await (const piece of await client.chat.completions.create({ ...law, messages, ...options })) {
  streamed += piece.choices[0]?.delta?.content ?? "";
  usage = piece.usage ?? usage;
}
const echoed = [...messages, whole.choices[0].message, ...messages];
const again = await client.chat.completions.create({ ...law, messages: echoed });
const text = await client.completions.create({ ...law, prompt: "def area(" });
let refused = null;
try { await client.chat.completions.create({ model: "other", messages }); }
catch (error) { refused = [error.status, error.code]; }
console.log(JSON.stringify({
  whole: whole.choices[0].message.content, streamed, tokens: usage.completion_tokens,
  again: again.choices.length, text: text.choices[0].text, refused,
}));
"""
AI_SDK = """
import { generateText, streamText } from "ai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
const provider = createOpenAICompatible({ name: "lrt", baseURL: process.argv[2] + "/v1", includeUsage: true });
const ask = { model: provider("tiny"), prompt: "def", maxOutputTokens: 8, temperature: 0, maxRetries: 0 };
const whole = await generateText(ask);
const stream = streamText(ask);
let streamed = "";
for await (const piece of stream.textStream) streamed += piece;
const tokens = (await stream.usage).outputTokens;
console.log(JSON.stringify({ whole: whole.text, streamed, tokens, finish: whole.finishReason }));
"""


def answers(script: str, packages: list[str], server: Server, folder: Path) -> dict:
    """What a script prints that uses these packages."""
    install = ["npm", "install", "--no-audit", "--no-fund", *packages]
    if subprocess.run(install, cwd=folder, capture_output=True).returncode:
        pytest.skip(f"npm cannot install {', '.join(packages)} here")
    (folder / "client.mjs").write_text(script, encoding="utf-8")
    ran = subprocess.run(["node", "client.mjs", server.url], cwd=folder, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


def test_the_openai_package_of_npm(server: Server, tmp_path: Path):
    told = answers(OPENAI, ["openai"], server, tmp_path)
    assert told["whole"] == told["streamed"] == spelled(server, opened(server, "USER: def\nBOT:"))
    assert told["text"] == spelled(server, opened(server, "def area("))
    assert (told["tokens"], told["again"], told["refused"]) == (8, 1, [404, "model_not_found"])


def test_the_ai_sdk(server: Server, tmp_path: Path):
    told = answers(AI_SDK, ["ai", "@ai-sdk/openai-compatible"], server, tmp_path)
    assert told["whole"] == told["streamed"] == spelled(server, opened(server, "USER: def\nBOT:"))
    assert (told["tokens"], told["finish"]) == (8, "length")
