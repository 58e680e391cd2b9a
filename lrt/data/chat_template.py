"""Chat templates: a conversation as the tokens that transformers' `apply_chat_template` makes of it.

A template may come from anywhere, so it is rendered in a process of its own, in jinja2's sandbox, within limits of
time, memory and length. It is given the real messages. They can never spell a special token: the renderer tells which
characters the template wrote, and only those may form one; all others are encoded as text.
"""

from __future__ import annotations

import atexit
import json
import re
import subprocess
import sys
import threading
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, final

from lrt.data.tokenizer import Tokenizer
from lrt.data.tokenizer_config import DEFAULT

WORKER = Path(__file__).with_name("template_worker.py")
SECONDS = 2.0
"""Seconds of CPU time that a template may render."""
PATIENCE = 4
"""Times as long, by the clock, it may take on a machine that is busy."""
START_SECONDS = 60.0
"""How long the process that renders may take to start."""
CHARACTERS = 4_000_000
"""Most characters that a template may render."""
PROBE = "a1b2c3"
"""What a template that takes contents in parts writes of one that says this."""
REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names of a message's reasoning, the first one that is given first."""
Message = Mapping[str, Any]
Tool = Mapping[str, Any]
Runs = Sequence[Sequence[int]]
"""Runs [start, end) of characters."""
Placed = tuple[int, int]
"""A token, and the place of its first character."""


@final
class TemplateRenderer:
    """The process that renders, started when it is first needed and again after one that had to be ended.

    Any thread may call it; one template is rendered at a time.
    """

    def __init__(self, seconds: float = SECONDS, characters: int = CHARACTERS) -> None:
        self.seconds, self.characters = seconds, characters
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def render(self, template: str, variables: Mapping[str, Any], specials: Mapping[str, str]) -> tuple[str, Runs]:
        """The text, and the runs of it that the template wrote. ValueError: the template fails, or takes too much.

        `variables` hold `messages`; `specials` are special tokens by the template's names for them.
        """
        task = {"template": template, "variables": variables, "trusted": specials, "most": self.characters}
        line = json.dumps({"seconds": self.seconds, "task": task}).encode() + b"\n"
        with self._lock:
            reply = self._ask(line)
        if "error" in reply:
            raise ValueError(f"messages do not fit the model's chat template: {reply['error']}")
        return reply["text"], reply["own"]

    def close(self) -> None:
        """End the process."""
        with self._lock:
            self._end()

    def _ask(self, line: bytes) -> dict[str, Any]:
        if self._process is None or self._process.poll() is not None:
            self._end()
            self._process = self._start()
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(line)
            process.stdin.flush()
        except OSError:
            reply = b""
        else:
            reply = _line(process, PATIENCE * self.seconds)
        if reply.endswith(b"\n"):
            return json.loads(reply)
        self._end()
        return {"error": f"it takes longer than {self.seconds:g} seconds, or more memory than there is"}

    def _start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-I", str(WORKER)]
        started = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
        if not _line(started, START_SECONDS):
            started.wait()
            raise ValueError("chat templates cannot be rendered: is jinja2 3.1.6 or newer installed?")
        return started

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for stream in (self._process.stdin, self._process.stdout):
                assert stream is not None
                stream.close()
            self._process = None


def _line(process: subprocess.Popen[bytes], seconds: float) -> bytes:
    """What the process writes next; it is killed where that takes longer, and then its end is seen at once.

    Else one whose line came in the last moment would be taken for alive, and the next request would fail with it.
    """

    def end() -> None:
        process.kill()
        process.wait()

    assert process.stdout is not None
    timer = threading.Timer(seconds, end)
    timer.start()
    try:
        return process.stdout.readline()
    finally:
        timer.cancel()
        timer.join()


@lru_cache(1)
def shared_renderer() -> TemplateRenderer:
    """The renderer of this process; it ends with it."""
    renderer = TemplateRenderer()
    atexit.register(renderer.close)
    return renderer


def chat_template_of(tokenizer: Tokenizer) -> ChatTemplate | None:
    """The chat template of a tokenizer; None where there is none."""
    config = tokenizer.config
    named = {"eos_token": config.eos, "pad_token": config.pad, "unk_token": config.unknown}
    specials = dict(config.others) | {key: value for key, value in named.items() if value is not None}
    names = {i: name for name, i in tokenizer.specials.items()}
    if tokenizer.bos in names:
        specials["bos_token"] = names[tokenizer.bos]
    return ChatTemplate(tokenizer, config.chat_templates, specials) if config.chat_templates else None


@final
class ChatTemplate:
    """A tokenizer's chat templates, ready to make prompts."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        templates: Mapping[str, str],
        specials: Mapping[str, str],
        renderer: TemplateRenderer | None = None,
    ) -> None:
        """`templates` by name: `default`, and `tool_use` where tools are given; `specials` such as `eos_token`."""
        self.tokenizer, self.templates, self.specials = tokenizer, templates, specials
        self._renderer = renderer or shared_renderer()
        self._with_parts: dict[str, bool] = {}
        self._core = tokenizer.fast() if tokenizer.positions == 1 else None
        names = sorted(tokenizer.specials, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, names)) or "(?!)")

    def encode(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = (), **variables: Any
    ) -> list[int]:
        """The prompt of a conversation; further variables go to the template. ValueError: it does not render."""
        text, template_runs = self.render(messages, tools, **variables)
        return [token for token, _ in self.tokens(text, template_runs)]

    def tokens(self, text: str, template_runs: Runs, cuts: Sequence[int] = ()) -> list[Placed]:
        """The tokens of a rendered text, each with the place of its first character.

        `cuts` are places that no token spans, where the library's own encoding has to be given up.
        """
        placed = self._as_transformers(text, template_runs)
        return self._piecewise(text, template_runs, cuts) if placed is None else placed

    def render(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = (), **more: Any
    ) -> tuple[str, Runs]:
        """The prompt as text, and the runs of it that the template wrote."""
        named = self.templates.get("tool_use") if tools else None
        template = named or self._usual()
        parts = any(isinstance(m.get("content"), list) for m in messages) and self._takes_parts(template)
        messages = [_as_given(message, parts) for message in messages]
        variables = {"messages": messages, "tools": tools or None, "documents": None, "add_generation_prompt": True}
        return self._renderer.render(template, variables | more, self.specials)

    def _usual(self) -> str:
        """The template that is meant where none is named. ValueError: there are several, none called default."""
        if DEFAULT not in self.templates and len(self.templates) > 1:
            names = ", ".join(self.templates)[:100]
            raise ValueError(f"the model has chat templates called {names}, but no default: name one of them default")
        return self.templates.get(DEFAULT) or next(iter(self.templates.values()))

    def _takes_parts(self, template: str) -> bool:
        """Whether a template writes the parts of a content, where others would print a list or fail."""
        if template not in self._with_parts:
            talk = [{"role": "user", "content": [{"type": "text", "text": PROBE}]}]
            variables = {"messages": talk, "tools": None, "documents": None, "add_generation_prompt": True}
            try:
                text, _ = self._renderer.render(template, variables, self.specials)
            except ValueError:
                text = ""
            self._with_parts[template] = PROBE in text and not re.search("['\"](text|type)['\"]", text)
        return self._with_parts[template]

    def _as_transformers(self, text: str, template_runs: Runs) -> list[Placed] | None:
        """The tokens of the text with special tokens; None where a message would have spelt one of them."""
        if self._core is None:
            return None
        try:
            encoding = self._core.encode(text, add_special_tokens=False)
        except TypeError:
            raise ValueError("the text holds lone surrogates: replace them before encoding") from None
        names = {i: name for name, i in self.tokenizer.specials.items()}
        for token, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if token in names:
                offset = text.find(names[token], start, end)  # its white space may be a message's
                if offset < 0 or not _within(template_runs, offset, offset + len(names[token])):
                    return None
        return [(token, start) for token, (start, _) in zip(encoding.ids, encoding.offsets, strict=True)]

    def _piecewise(self, text: str, template_runs: Runs, cuts: Sequence[int]) -> list[Placed]:
        """The tokens of the text: special tokens where the template wrote them, all else as text."""
        names = [name for start, end in template_runs for name in self._special.finditer(text, start, end)]
        placed, offset = [], 0
        for name in names:
            placed += self._text(text, offset, name.start(), cuts)
            placed.append((self.tokenizer.specials[name[0]], name.start()))
            offset = name.end()
        return placed + self._text(text, offset, len(text), cuts)

    def _text(self, text: str, start: int, end: int, cuts: Sequence[int]) -> list[Placed]:
        """The tokens of a run of text; each counts as placed where its piece between cuts begins."""
        ends = [*sorted(cut for cut in cuts if start < cut < end), end]
        pieces = [(a, b) for a, b in zip([start, *ends], ends, strict=False) if a < b]
        return [(token, a) for a, b in pieces for token in self.tokenizer.encode(text[a:b])]


def _as_given(message: Message, parts: bool) -> dict[str, Any]:
    """A message as transformers hands it to a template: nothing that is null, and its reasoning by every usual name.

    parts: whether the template takes contents that are lists; else theirs are joined, where transformers prints them.
    """
    fields = {name: value for name, value in message.items() if value is not None}
    if isinstance(fields.get("content"), list) and not parts:
        fields["content"] = "".join(part["text"] for part in fields["content"])
    reasoning = next((fields[name] for name in REASONING if name in fields), None)
    return fields if reasoning is None else {"thinking": reasoning} | fields | {"reasoning_content": reasoning}


def _within(template_runs: Runs, start: int, end: int) -> bool:
    """Whether one of the runs, which are in order, holds all of [start, end)."""
    index = bisect_right(template_runs, start, key=lambda run: run[0]) - 1
    return index >= 0 and end <= template_runs[index][1]
