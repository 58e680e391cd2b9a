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
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import jinja2.ext
import jinja2.filters
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter
from jinja2.utils import Namespace

if TYPE_CHECKING or __name__ != "__main__":
    from lrt.data.marked_text import Marked, Safe, joined, literal, mask_of, spelled, text_of, unmarked
else:  # alone in its process, where the package would be slow to load and too large
    sys.path.insert(0, str(Path(__file__).parent))
    from marked_text import Marked, Safe, joined, literal, mask_of, spelled, text_of, unmarked

    sys.path.pop(0)

MEMORY = 2**29
"""Bytes of address space of this process."""
ROLES = ("system", "developer", "user", "assistant", "tool")
LEAST_JINJA = (3, 1, 6)
"""The first version without a known way out of the sandbox."""
MOST_MESSAGE = 300


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
        fields = dict(*rest, **attributes)
        for name in fields:
            _check_name(name)
        Namespace.__init__(self, fields)

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
        formatter, trusted, fields = SandboxedFormatter(self), all(form._mask), itertools.count()
        for text, name, spec, conversion in formatter.parse(form):
            yield literal(text) if trusted else text
            if name is None:
                continue
            name = f"{next(fields)}{name}" if name[:1] in ("", ".", "[") else name
            value, _ = formatter.get_field(name, args, kwargs)
            plain = formatter.vformat(f"{{0{'!' + conversion if conversion else ''}:{spec}}}", (value,), {})
            yield text_of(value) if text_of(value) == plain else plain


def environment() -> MarkingEnvironment:
    """The environment that templates are compiled in."""
    marking = MarkingEnvironment(
        trim_blocks=True, lstrip_blocks=True, optimized=False, extensions=[GenerationBlock, jinja2.ext.loopcontrols]
    )

    def raise_exception(message: Any) -> None:
        raise jinja2.TemplateError(str(message))

    def tojson(x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False):
        text = json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
        return spelled(text, x, lambda part: json.dumps(part, ensure_ascii=ensure_ascii), sort_keys)

    def safe(value: Any) -> Safe:
        text = text_of(value)
        return Safe(text, mask_of(text))

    def join(_context: Any, values: Iterable[Any], d: str = "", attribute: str | int | None = None) -> Any:
        """jinja2's filter, which would lose the marks of an empty separator."""
        if attribute is not None:
            values = map(jinja2.filters.make_attrgetter(marking, attribute), values)
        return Marked(d, mask_of(d)).join(map(text_of, values))

    marking.filters |= {"tojson": tojson, "safe": safe, "join": jinja2.pass_eval_context(join)}
    marking.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": lambda form: datetime.datetime.now().strftime(form),
        "dict": lambda *args, **kwargs: dict(*args, **kwargs),
        "namespace": TemplateNamespace,
    }
    return marking


@lru_cache(16)
def compiled(template: str) -> jinja2.Template:
    """A template, ready to render."""
    return environment().from_string(template)


def render(template: str, variables: Mapping[str, Any], trusted: Mapping[str, str], most: int) -> dict[str, Any]:
    """The rendered text and the runs [start, end) of it that the template wrote; ValueError: longer than `most`.

    `variables` are what messages hold; `trusted` are special tokens by their names.
    """
    marked_variables = unmarked(variables)
    messages = [m | {"role": literal(m["role"])} if m.get("role") in ROLES else m for m in marked_variables["messages"]]
    special_tokens = {name: literal(text) for name, text in trusted.items()}
    parts, size = [], 0
    for part in compiled(template).generate(**{**marked_variables, "messages": messages, **special_tokens}):
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
    """Answer until the input ends, or a request has taken its time: then the system's own timer kills this process."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    version = tuple(int(x) for x in jinja2.__version__.split(".")[:3] if x.isdigit())
    if version < LEAST_JINJA:
        sys.exit(f"jinja2 {jinja2.__version__} is unsafe; install 3.1.6 or newer")
    print("ready", flush=True)
    for line in sys.stdin.buffer:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, request["seconds"])
        reply = json.dumps(answer(request["task"])).encode() + b"\n"
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.buffer.write(reply)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
