"""A process that renders chat templates, so that none can hang or fill the process that asked: run, not imported.

It reads one JSON request a line and writes one JSON answer a line. The environment is jinja2's immutable sandbox, set
up as transformers' `apply_chat_template` sets up its own. Beside the text it answers which characters the template
itself wrote: its own text, its constants, special tokens, roles and numbers. The others came from messages, and must
never spell a special token. An operation that loses track of characters counts them as a message's.
"""

from __future__ import annotations

import datetime
import itertools
import json
import re
import resource
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any

import jinja2
import jinja2.ext
import jinja2.filters
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter
from jinja2.utils import Namespace
from markupsafe import Markup

MEMORY = 2**29
"""Bytes of address space of this process."""
DIRECTIVE = re.compile(r"%(?:\(\w+\))?[-+ #0]*\d*(?:\.\d+)?[a-zA-Z%]")
"""What `%` fills in a text."""
ROLES = ("system", "developer", "user", "assistant", "tool")
LEAST_JINJA = (3, 1, 6)
"""The first version without a known way out of the sandbox."""
MOST_MESSAGE = 300


class Marked(str):
    """Text that knows which of its characters the template wrote."""

    _mask: bytes
    """One byte a character: 1 where the template wrote it."""

    def __new__(cls, text: str, mask: bytes | None = None) -> Marked:
        made = super().__new__(cls, text)
        made._mask = bytes(len(text)) if mask is None else mask
        return made

    def __str__(self) -> str:
        return self

    def __add__(self, other: Any) -> Any:
        return joined((self, other)) if isinstance(other, str) and not is_markup(other) else NotImplemented

    def __radd__(self, other: Any) -> Any:
        return joined((other, self)) if isinstance(other, str) else NotImplemented

    def __mul__(self, count: Any) -> Any:
        return Marked(str.__mul__(self, count), self._mask * count)

    def __rmul__(self, count: Any) -> Any:
        return self * count

    def __mod__(self, values: Any) -> Any:
        text, parts, end = str.__mod__(self, values), [], 0
        left = iter(values if isinstance(values, tuple) else (values,))
        for found in DIRECTIVE.finditer(self):
            parts += [self[end : found.start()], self._filled(found[0], values, left)]
            end = found.end()
        marked = joined([*parts, self[end:]])
        return marked if marked == text else text

    def _filled(self, directive: str, values: Any, left: Iterator[Any]) -> str:
        """What one directive of `%` becomes; "" where there is no value for it."""
        if directive == "%%":
            return self[:0] + literal("%")
        if directive.startswith("%("):
            value = values[directive[2 : directive.index(")")]] if isinstance(values, Mapping) else ""
            directive = "%" + directive[directive.index(")") + 1 :]
        else:
            value = next(left, "")
        return text_of(value) if directive == "%s" else str.__mod__(directive, (value,))

    def __getitem__(self, index: Any) -> Marked:
        mask = self._mask[index]
        return Marked(str.__getitem__(self, index), mask if isinstance(mask, bytes) else bytes([mask]))

    def __iter__(self) -> Iterator[Marked]:
        return (self[i] for i in range(len(self)))

    def lstrip(self, chars: str | None = None) -> Marked:
        return self[len(self) - len(str.lstrip(self, chars)) :]

    def rstrip(self, chars: str | None = None) -> Marked:
        return self[: len(str.rstrip(self, chars))]

    def strip(self, chars: str | None = None) -> Marked:
        return self.lstrip(chars).rstrip(chars)

    def removeprefix(self, prefix: str) -> Marked:
        return self[len(prefix) :] if self.startswith(prefix) else self

    def removesuffix(self, suffix: str) -> Marked:
        return self[: len(self) - len(suffix)] if suffix and self.endswith(suffix) else self

    def split(self, sep: str | None = None, maxsplit: Any = -1) -> list[Any]:
        return self._located(str.split(self, sep, maxsplit))

    def rsplit(self, sep: str | None = None, maxsplit: Any = -1) -> list[Any]:
        return self._located(str.rsplit(self, sep, maxsplit))

    def splitlines(self, keepends: bool = False) -> list[Any]:
        return self._located(str.splitlines(self, keepends))

    def partition(self, sep: str) -> tuple[Any, ...]:
        return tuple(self._located(str.partition(self, sep)))

    def rpartition(self, sep: str) -> tuple[Any, ...]:
        return tuple(self._located(str.rpartition(self, sep)))

    def replace(self, old: str, new: str, count: Any = -1) -> Any:
        parts = Marked.split(self, old, count) if old else ["", *self, ""]
        text, marked = str.replace(self, old, new, count), Marked(new, mask_of(new)).join(parts)
        return marked if marked == text else text

    def join(self, parts: Iterable[Any]) -> Any:
        together: list[Any] = []
        for part in parts:
            together += [self, part]
        str.join(self, together)  # the error where something is no text
        return joined(together[1:])

    def lower(self) -> Any:
        return self._as_long(str.lower(self))

    def upper(self) -> Any:
        return self._as_long(str.upper(self))

    def title(self) -> Any:
        return self._as_long(str.title(self))

    def capitalize(self) -> Any:
        return self._as_long(str.capitalize(self))

    def swapcase(self) -> Any:
        return self._as_long(str.swapcase(self))

    def casefold(self) -> Any:
        return self._as_long(str.casefold(self))

    def ljust(self, width: Any, fillchar: str = " ") -> Any:
        return self._padded(str.ljust(self, width, fillchar), 0, fillchar)

    def rjust(self, width: Any, fillchar: str = " ") -> Any:
        text = str.rjust(self, width, fillchar)
        return self._padded(text, len(text) - len(self), fillchar)

    def center(self, width: Any, fillchar: str = " ") -> Any:
        text = str.center(self, width, fillchar)
        return self._padded(text, len(str.center("\0" * len(self), width, "-").partition("\0")[0]), fillchar)

    def _padded(self, text: str, left: int, fill: str) -> Marked:
        """This text within `text`, `left` characters of filling before it."""
        one = mask_of(fill)
        return Marked(text, one * left + self._mask + one * (len(text) - left - len(self)))

    def _as_long(self, text: str) -> str:
        return Marked(text, self._mask) if len(text) == len(self) else text

    def _located(self, parts: Iterable[str]) -> list[Any]:
        """The same parts, which follow each other in this text."""
        pieces, at = [], 0
        for part in parts:
            at = str.find(self, part, at)
            pieces.append(self[at : at + len(part)])
            at += len(part)
        return pieces


def is_markup(text: str) -> bool:
    """Whether the text escapes what it is joined with."""
    return isinstance(text, Markup)


def mask_of(text: str) -> bytes:
    """Which characters the template wrote."""
    return text._mask if isinstance(text, Marked) else bytes(len(text))


def joined(parts: Iterable[str]) -> Marked:
    """Texts one after the other."""
    parts = list(parts)
    return Marked("".join(parts), b"".join(map(mask_of, parts)))


@lru_cache(4096)
def literal(text: str) -> Marked:
    """Text that the template wrote."""
    return Marked(text, b"\1" * len(text))


def text_of(value: Any) -> str:
    """What an expression outputs; no number of a message can spell a token by itself."""
    if isinstance(value, str):
        return value
    return literal(str(value)) if value is None or isinstance(value, (bool, int, float)) else str(value)


class MarkingGenerator(CodeGenerator):
    """Compiles templates so that their own text and constants are marked."""

    def _output_const_repr(self, group: Iterable[Any]) -> str:
        return f"environment.literal({super()._output_const_repr(group)})"

    def _output_child_pre(self, node: nodes.Expr, frame: Frame, finalize: Any) -> None:
        if frame.eval_ctx.volatile or frame.eval_ctx.autoescape:
            super()._output_child_pre(node, frame, finalize)
        else:
            self.write("environment.text_of(")

    def visit_Const(self, node: nodes.Const, frame: Frame) -> None:
        value = node.as_const(frame.eval_ctx)
        if isinstance(value, str):
            self.write(f"environment.literal({value!r})")
        else:
            super().visit_Const(node, frame)

    def visit_TemplateData(self, node: nodes.TemplateData, frame: Frame) -> None:
        self.write(f"environment.literal({node.data!r})")

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        if frame.eval_ctx.volatile or frame.eval_ctx.autoescape:
            super().visit_Concat(node, frame)
            return
        self.write("environment.concat(map(environment.text_of, (")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write(")))")


class GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}`: marks the assistant's part in training data; here it outputs what it holds."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("inner"), [], [], body).set_lineno(line)

    def inner(self, caller: Callable[[], str]) -> str:
        """What the block holds."""
        return caller()


class TemplateNamespace(Namespace):
    """jinja2's, but for names that reach into Python."""

    def __init__(*args: Any, **attributes: Any) -> None:  # pyright: ignore[reportSelfClsParameterName]
        self, *rest = args
        known = dict(*rest, **attributes)
        for name in known:
            _check_name(name)
        Namespace.__init__(self, known)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace may not hold {name!r}: choose a name without underscore")


class MarkingEnvironment(ImmutableSandboxedEnvironment):
    """The sandbox, as `apply_chat_template` sets it up, with marked text."""

    code_generator_class = MarkingGenerator
    concat = staticmethod(joined)  # pyright: ignore[reportAssignmentType]
    literal = staticmethod(literal)
    text_of = staticmethod(text_of)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """`format` and `format_map` of a text, by the sandbox's rules; what the template wrote stays marked."""
        plain, of = super().wrap_str_format(value), getattr(value, "__self__", None)
        if plain is None or not isinstance(of, Marked):
            return plain

        def marking(*args: Any, **kwargs: Any) -> str:
            text = plain(*args, **kwargs)
            values = (args, kwargs) if value.__name__ == "format" else ((), args[0])
            marked = joined(self._formatted(of, *values))
            return marked if marked == text else text

        return marking

    def _formatted(self, form: Marked, args: Any, kwargs: Any) -> Iterator[str]:
        """The pieces of a formatted text; its own text counts as the template's where all of `form` is."""
        formatter, own, fields = SandboxedFormatter(self), all(form._mask), itertools.count()
        for text, name, spec, conversion in formatter.parse(form):
            yield literal(text) if own else text
            if name is None:
                continue
            name = f"{next(fields)}{name}" if name[:1] in ("", ".", "[") else name
            value, _ = formatter.get_field(name, args, kwargs)
            plain = formatter.vformat(f"{{0{'!' + conversion if conversion else ''}:{spec}}}", (value,), {})
            yield text_of(value) if text_of(value) == plain else plain


def environment() -> MarkingEnvironment:
    """The environment that templates are compiled in."""
    made = MarkingEnvironment(
        trim_blocks=True, lstrip_blocks=True, optimized=False, extensions=[GenerationBlock, jinja2.ext.loopcontrols]
    )

    def raise_exception(message: Any) -> None:
        raise jinja2.TemplateError(str(message))

    def tojson(x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False):
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def join(_context: Any, values: Iterable[Any], d: str = "", attribute: str | int | None = None) -> Any:
        """jinja2's filter, which would lose the marks of an empty separator."""
        if attribute is not None:
            values = map(jinja2.filters.make_attrgetter(made, attribute), values)
        return Marked(d, mask_of(d)).join(map(text_of, values))

    made.filters |= {"tojson": tojson, "join": jinja2.pass_eval_context(join)}
    made.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": lambda form: datetime.datetime.now().strftime(form),
        "dict": lambda *args, **kwargs: dict(*args, **kwargs),
        "namespace": TemplateNamespace,
    }
    return made


@lru_cache(16)
def compiled(template: str) -> jinja2.Template:
    """A template, ready to render."""
    return environment().from_string(template)


def render(template: str, variables: Mapping[str, Any], trusted: Mapping[str, str], most: int) -> dict[str, Any]:
    """The rendered text and the runs [start, end) of it that the template wrote; ValueError: longer than `most`.

    `variables` are what messages hold; `trusted` are special tokens by their names.
    """
    messages = [m | {"role": literal(m["role"])} if m.get("role") in ROLES else m for m in variables["messages"]]
    known = {name: literal(text) for name, text in trusted.items()}
    parts, size = [], 0
    for part in compiled(template).generate(**{**variables, "messages": messages, **known}):
        parts.append(part)
        size += len(part)
        if size > most:
            raise ValueError(f"it renders more than {most} characters")
    text = joined(parts)
    return {"text": str.__str__(text), "own": [m.span() for m in re.finditer(b"\1+", text._mask)]}


def answer(request: Mapping[str, Any]) -> dict[str, Any]:
    """The answer to a request, an error among them."""
    try:
        return render(**request)
    except MemoryError:
        return {"error": "it needs too much memory"}
    except Exception as error:  # whatever the template does
        kind = "" if isinstance(error, (jinja2.TemplateError, ValueError)) else f"{type(error).__name__}: "
        return {"error": " ".join(f"{kind}{error}".split())[:MOST_MESSAGE] or type(error).__name__}


def main() -> None:
    """Answer until the input ends."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    version = tuple(int(x) for x in jinja2.__version__.split(".")[:3] if x.isdigit())
    if version < LEAST_JINJA:
        sys.exit(f"jinja2 {jinja2.__version__} is unsafe; install 3.1.6 or newer")
    print("ready", flush=True)
    for line in sys.stdin.buffer:
        sys.stdout.buffer.write(json.dumps(answer(json.loads(line))).encode() + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
