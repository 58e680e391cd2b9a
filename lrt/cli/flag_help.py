"""How flags look in tyro's help: an optional value is called by its type, and a description flows as one text."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Annotated, Any, Union, get_args

import tyro
from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    PrimitiveTypeInfo,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)


def flag_rules() -> ConstructorRegistry:
    """Rules for `tyro.cli`."""
    rules = ConstructorRegistry()
    rules.primitive_rule(_optional)
    rules.primitive_rule(_path)
    rules.primitive_rule(_float)
    within: list[type] = []

    @rules.struct_rule
    def described(info: StructTypeInfo) -> StructConstructorSpec | None:
        if not dataclasses.is_dataclass(info.type) or info.type in within:
            return None
        within.append(info.type)
        try:
            spec = ConstructorRegistry.get_struct_spec(info)  # tyro's own rule
        finally:
            within.pop()
        if not isinstance(spec, StructConstructorSpec):
            return None
        return dataclasses.replace(spec, fields=tuple(map(_readable, spec.fields)))

    return rules


def _readable(field: StructFieldSpec) -> StructFieldSpec:
    """The field with a description whose lines are joined, since tyro keeps the breaks that the source file has.

    A default of nothing, or one that the description tells in words, is not told again.
    """

    def text() -> str | None:
        raw = field.helptext() if callable(field.helptext) else field.helptext
        return raw and " ".join(raw.split())

    def hint(default: str) -> str:
        in_words = default in ("None", "") or "by default" in (text() or "")
        return "" if in_words else f"(default: {default})"

    return dataclasses.replace(field, helptext=text, type=Annotated[field.type, tyro.conf.arg(help_behavior_hint=hint)])


def _path(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Path] | None:
    """A path; none is named by an empty text, as a shell leaves it of a variable that is not set."""
    if info.type is not Path:
        return None

    def value(texts: list[str]) -> Path:
        if not texts[0]:
            raise ValueError("is empty; give a path")
        return Path(texts[0])

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=value,
        is_instance=lambda instance: isinstance(instance, Path),
        str_from_instance=lambda instance: [str(instance)],
    )


def _float(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[float] | None:
    """A number; one that is too small for its type is refused, since 0 often means something else."""
    if info.type is not float:
        return None

    def value(texts: list[str]) -> float:
        number = float(texts[0])
        if number == 0 and any(c.isdigit() and int(c) for c in re.split("[eE]", texts[0])[0]):
            raise ValueError(f"is {texts[0]!r}, too small to hold; give 0, or a larger number")
        return number

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="FLOAT",
        instance_from_str=value,
        is_instance=lambda instance: isinstance(instance, float | int) and not isinstance(instance, bool),
        str_from_instance=lambda instance: [str(instance)],
    )


def _optional(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    """`int | None` is shown as INT, where tyro's own rule says {None}|INT; None is still taken."""
    kinds = get_args(info.type)
    if type(None) not in kinds:
        return None
    inner: Any = Union[tuple(k for k in kinds if k is not type(None))]  # noqa: UP007 (made at run time)
    spec = ConstructorRegistry.get_primitive_spec(PrimitiveTypeInfo.make(inner, info.markers))
    if not isinstance(spec, PrimitiveConstructorSpec):
        return None

    def value(texts: list[str]) -> Any:
        return None if texts == ["None"] else spec.instance_from_str(texts)

    return dataclasses.replace(
        spec,
        instance_from_str=value,
        is_instance=lambda x: x is None or spec.is_instance(x),
        str_from_instance=lambda x: ["None"] if x is None else spec.str_from_instance(x),
        choices=None if spec.choices is None else (*spec.choices, "None"),
    )
