"""Answers of a given form: JSON of a schema, and calls of tools, kept by llguidance token by token."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from functools import cached_property
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from lrt.data.tokenizer import Tokenizer
from lrt.serve.messages import ResponseFormat, Tool
from lrt.utils.files import one_line

MOST_SCHEMA, MOST_SCHEMAS = 65_536, 131_072
"""Most characters of a schema, and of all that a request gives."""
FORM = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""JSON is written as Python writes it: where white space is free, a small model may write nothing else."""
BY_NAME = ("properties", "patternProperties", "dependentSchemas", "$defs", "definitions")
"""Keywords of a schema whose values are schemas by names of the author's."""
VALUES = ("enum", "const", "default", "examples")
"""Keywords whose values are no schemas."""
LOWER, UPPER = ("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")
MOST_BOUND = 2**63
"""Bounds as large become others."""
MOST_WRITTEN = 65_536
"""Most characters of a request's expressions, their counted repeats written out; and most remainders of divisions."""
MOST_PLACES = 18
"""Decimal places that numbers which may be combined can have."""
COMBINING = ("allOf", "anyOf", "oneOf", "$ref")
"""Keywords by which two schemas hold at one place."""
ATOM = re.compile(r"\\.|\[(?:\\.|[^\]\\])*\]|\{(\d+)(?:,(\d*))?\}|.", re.S)
"""A piece of an expression: a letter, a class, an escape, a parenthesis, or how often the one before stands."""
ANY_OBJECT = {"type": "object"}
CALL_HEAD = '{{"name": "{}", "arguments": '


@final
class Grammars:
    """Makes constraints for one tokenizer."""

    def __init__(self, tokenizer: Tokenizer, vocabulary: int):
        """`vocabulary` is the number of the model's tokens."""
        self.tokenizer, self.vocabulary = tokenizer, vocabulary

    @cached_property
    def _tokens(self) -> Any:
        from llguidance import LLTokenizer, TokenizerWrapper

        spellings = TokenizerWrapper(_Spellings(self.tokenizer, self.vocabulary))
        return LLTokenizer(spellings, n_vocab=self.vocabulary, eos_token=list(self.tokenizer.ends))

    def of(self, lark: str) -> GrammarConstraint:
        """The constraint of a grammar, at its beginning. ValueError: llguidance cannot keep it."""
        try:
            from llguidance import LLMatcher
        except ModuleNotFoundError:
            raise ValueError("llguidance is not installed, which keeps answers to a form: install it") from None
        if self.tokenizer.positions > 1:
            raise ValueError("a tokenizer with pauses cannot keep answers to a form: ask for text")
        matcher = LLMatcher(self._tokens, LLMatcher.grammar_from_lark(lark), log_level=0)
        trial = matcher.deep_copy()
        if not trial.is_error():  # what fails at its first token fails here, and not while others decode
            trial.compute_logit_bias()
        if trial.is_error():
            raise ValueError(f"the schema cannot be kept: {_reason(trial.get_error())}; leave that out")
        return GrammarConstraint(matcher)


def _reason(error: str) -> str:
    """llguidance's error without the grammar that it quotes, nor its own options."""
    return one_line(error.rpartition("failed to compile JSON schema: ")[2].split("\n")[0].partition(". Enable")[0], 160)


@final
class GrammarConstraint:
    """What one answer must look like; see `lrt.inference.batch.Constraint`."""

    def __init__(self, matcher: Any):
        self._matcher = matcher

    def copy(self) -> GrammarConstraint:
        """The same for another answer."""
        return GrammarConstraint(self._matcher.deep_copy())

    def allowed(self) -> Tensor:
        """Which tokens may come next, boolean [V] on the host."""
        allowed = torch.frombuffer(bytearray(self._matcher.compute_logit_bias()), dtype=torch.uint8).bool()
        self._check()
        return allowed

    def take(self, token: int) -> None:
        """Take in the token that was drawn."""
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise ValueError(f"the form could not be kept: {_reason(self._matcher.get_error())}")


class _Spellings:
    """The tokenizer as llguidance asks for it."""

    def __init__(self, tokenizer: Tokenizer, vocabulary: int):
        spellings = tokenizer.spellings()
        spellings += [b""] * (vocabulary - len(spellings))
        self.tokens = [spelling or f"<|{i}|>".encode() for i, spelling in enumerate(spellings)]
        self.special_token_ids = [i for i, spelling in enumerate(spellings) if not spelling]
        self.bos_token_id = self.eos_token_id = tokenizer.bos
        self._encode = tokenizer.encode

    def __call__(self, text: str) -> list[int]:
        return self._encode(text)


class AnswerForm(NamedTuple):
    """What an answer looks like, as a grammar and as how to read it."""

    lark: str
    tools: tuple[str, ...]
    """Names of the tools that it may call."""


def answer_form(format_: ResponseFormat | None, tools: Sequence[Tool], choice: str | None) -> AnswerForm | None:
    """The form that a request asks for; None: free text. ValueError: a schema that is too large.

    `choice` is auto, none or required. Where a call is free, the answer begins with `{` if and only if it is one (or
    the JSON that is asked for).
    """
    content = None if format_ is None or format_.type == "text" else ANY_OBJECT
    if format_ is not None and format_.json_schema is not None:
        content = format_.json_schema.schema_ or ANY_OBJECT
    named = list(tools) if choice in ("auto", "required") else []
    if content is None and not named:
        return None
    others = [] if named and choice != "auto" else ["text" if content is None else "content"]
    rules = [f"start: {' | '.join([*(f'call{i}' for i in range(len(named))), *others])}"]
    for i, tool in enumerate(named):
        head = json.dumps(CALL_HEAD.format(tool.function.name))
        rules += [f'call{i}: {head} arguments{i} "}}"', f"arguments{i}: {_json_rule(tool.function.parameters)}"]
    rules += ['text: /[^{](.|\\n)*/ | ""'] if content is None else [f"content: {_json_rule(content)}"]
    if sum(map(len, rules)) > MOST_SCHEMAS:
        raise ValueError(f"the schemas have more than {MOST_SCHEMAS} characters together; give fewer tools")
    _check_sizes([*(tool.function.parameters for tool in named), *([] if content is None else [content])])
    return AnswerForm("\n".join(rules), tuple(t.function.name for t in named))


def _json_rule(schema: Mapping[str, Any]) -> str:
    if "x-guidance" in schema:  # which may tell the library to leave keywords out
        raise ValueError("a schema may not hold x-guidance: leave it out")
    text = json.dumps({**schema, "x-guidance": FORM})
    if len(text) > MOST_SCHEMA:
        raise ValueError(f"a schema has {len(text)} characters; give at most {MOST_SCHEMA}")
    for part in _parts(schema):
        if any(_number(part.get(name)) for name in (*LOWER, *UPPER)):
            _check_bounds(part)
    return f"%json {text}"


def _check_sizes(schemas: Sequence[Mapping[str, Any]]) -> None:
    """ValueError: all schemas of a request together would keep the library at work for longer than half a second."""
    written, divisors, combined = 0, list[Any](), False
    for part in _parts(list(schemas)):
        written += sum(map(written_out, _patterns(part)))
        divisors += [part["multipleOf"]] if _number(part.get("multipleOf")) else []
        combined |= any(name in part for name in COMBINING)
    if written > MOST_WRITTEN:
        raise ValueError(f"patterns repeat more than {MOST_WRITTEN} characters: give smaller counts in braces")
    if remainders(divisors, combined) > MOST_WRITTEN:
        raise ValueError(f"multipleOf needs more than {MOST_WRITTEN} remainders, all together: give smaller numbers")


def remainders(divisors: Sequence[int | float], combined: bool) -> int:
    """How many remainders the library follows to keep `multipleOf`, or more than `MOST_WRITTEN`.

    It takes five seconds for a million of them. A decimal counts as its digits do: 0.25 has 25. Where two may be
    `combined`, they have as many as the least common multiple.
    """
    exact = [abs(Decimal(value if isinstance(value, int) else str(value))) for value in divisors]
    if any(value >= 2**63 for value in exact):
        return 2**63
    places = [max(0, -int(value.normalize().as_tuple().exponent)) for value in exact]
    total = sum(int(value.scaleb(n)) for value, n in zip(exact, places, strict=True))
    if not combined or total > MOST_WRITTEN:
        return total
    if max(places, default=0) > MOST_PLACES:
        return MOST_WRITTEN + 1
    together = 1
    for value in set(exact):
        together = math.lcm(together, max(1, int(value.scaleb(max(places)))))
        if together > MOST_WRITTEN:
            break
    return max(total, together)


def _patterns(part: Mapping[str, Any]) -> list[str]:
    named = part.get("patternProperties")
    return [p for p in (part.get("pattern"), *(named if isinstance(named, Mapping) else ())) if isinstance(p, str)]


def written_out(pattern: str) -> int:
    """Characters of an expression whose counted repeats are written out; far above `MOST_WRITTEN` it stops counting.

    That many characters the library looks at while others decode, a second for a million.
    """
    levels, last = [0], 0
    for atom in ATOM.finditer(pattern):
        if atom[1]:
            times = max(int(atom[1][:9]), int((atom[2] or "0")[:9]))
            levels[-1] += last * (times - 1)
            last *= times
        elif atom[0] == "(":
            levels.append(0)
        elif atom[0] == ")" and len(levels) > 1:
            last = levels.pop()
            levels[-1] += last
        else:
            last = 1
            levels[-1] += 1
        if last > MOST_WRITTEN:
            break
    return max(last, sum(levels))


def _parts(schema: object) -> Iterator[Mapping[str, Any]]:
    """The schema and all below it; its size has been looked at."""
    waiting = [schema]
    while waiting:
        part = waiting.pop()
        if isinstance(part, Mapping):
            for name, value in part.items():
                if name in BY_NAME and isinstance(value, Mapping):
                    waiting += value.values()  # names of the author's: `default` is a property there
                elif name not in VALUES:
                    waiting.append(value)
            yield part
        elif isinstance(part, list):
            waiting += part


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_bounds(part: Mapping[str, Any]) -> None:
    """ValueError: bounds that llguidance 1.9.1 takes and does not keep (found by drawing answers, docs/log.md)."""
    excluded = [name for name in (LOWER[1], UPPER[1]) if isinstance(part.get(name), bool)]
    if excluded:
        raise ValueError(f"the schema cannot be kept: {excluded[0]} must be a number")
    low, high = ([part[name] for name in names if _number(part.get(name))] for names in (LOWER, UPPER))
    if max(map(abs, low + high)) >= MOST_BOUND:
        raise ValueError(f"the schema cannot be kept: a bound of {MOST_BOUND:.3g} or more is too large")
    near = low and high and min(high) - max(low) < 1
    if near and part.get("type") != "integer" and any(_number(part.get(name)) for name in (LOWER[1], UPPER[1])):
        raise ValueError(f"the schema cannot be kept: {LOWER[1]} and {UPPER[1]} need bounds at least 1 apart")


@final
class CallReader:
    """Tells calls of tools from text, as an answer grows."""

    def __init__(self, tools: Sequence[str]):
        self._heads = {CALL_HEAD.format(name): name for name in tools}
        self.name: str | None = None
        """The tool that is called."""
        self._undecided = bool(tools)
        self._text = ""

    def push(self, text: str, finish: str | None) -> tuple[str, str]:
        """What has become certain: text, and arguments of the call. With a `finish` nothing follows."""
        self._text += text
        if self._undecided:
            self._decide(finish is not None)
        if self._undecided:
            return "", ""
        if self.name is None:
            certain, self._text = self._text, ""
            return certain, ""
        keep = 1 if finish in (None, "stop") else 0  # the brace that ends the call
        certain, self._text = self._text[: len(self._text) - keep], self._text[len(self._text) - keep :]
        return "", certain

    def _decide(self, ended: bool) -> None:
        for head, name in self._heads.items():
            if self._text.startswith(head):
                self.name, self._text, self._undecided = name, self._text[len(head) :], False
                return
        self._undecided = not ended and any(head.startswith(self._text) for head in self._heads)
