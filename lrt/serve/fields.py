"""Fields of requests whose contents are looked at within bounds: lengths first, and no further than the first error.

Lists are looked at from outside in: their length, then the kind of their first element, then the others until one is
wrong. So nothing that a body of a megabyte may hold takes longer than reading it.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    PlainValidator,
    ValidationInfo,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError

MOST_FIELDS = 100
"""Most fields of one object."""
MOST_PROMPTS, MOST_TOKENS = 1024, 1_000_000
"""Most prompts, and tokens of one, where no server says what it allows."""
MOST_LISTS, MOST_VALUES = 16_384, 32_768
"""Most lists and objects of a body, and commas between values; a server whose prompts need more takes more commas."""
MOST_BIASES, STOP_TEXTS, STOP_LENGTH = 1024, 16, 200


class Strict(BaseModel):
    """No unknown fields, no conversions between types; null is as good as absent."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _no_nulls(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        if len(data) > MOST_FIELDS:
            raise ValueError(f"it has {len(data)} fields; give at most {MOST_FIELDS}")
        return {name: value for name, value in data.items() if value is not None}


def refused(name: str, message: str, code: str | None = None) -> PydanticCustomError:
    """An error that names its field, from where a whole object is looked at."""
    return PydanticCustomError("refused", "{message}", {"message": message, "param": name, "code": code})


def too_many(body: bytes, values: int = MOST_VALUES) -> str | None:
    """What a body has too many of, before it is parsed: each list and each value holds the interpreter a while.

    Texts are left out, as they may be long; counting takes a millisecond or two for a body of a megabyte.
    """
    least = 2 * values + 4 * MOST_LISTS
    if body.count(b"[") + body.count(b"{") <= MOST_LISTS and body.count(b",") < values:
        return None
    if body.replace(b'\\"', b"").count(b'"') > 2 * least:  # each would take a while to look past
        return f"more than {least} texts"
    lists, commas = counted(body)
    if lists > MOST_LISTS:
        return f"{lists} lists and objects, and at most {MOST_LISTS} are taken"
    return f"{commas + 1} values, and at most {values} are taken" if commas >= values else None


def counted(body: bytes) -> tuple[int, int]:
    """The lists and objects of a body, and the commas between their values; what its texts hold is left out."""
    texts = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    outside = b"".join(texts.split(b'"')[::2])
    return outside.count(b"[") + outside.count(b"{"), outside.count(b",")


def at_most(count: int) -> BeforeValidator:
    """Refuse a longer list or object before its contents are looked at."""

    def check(value: Any) -> Any:
        if isinstance(value, (list, dict)) and len(value) > count:
            raise ValueError(f"it has {len(value)} entries; give at most {count}")
        return value

    return BeforeValidator(check)


def _limit(info: ValidationInfo, name: str, default: int) -> int:
    return (info.context or {}).get(name, default)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("not a text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError("text without UTF-8 form") from None
    return value


PROMPT = "it must be a text, a list of texts, a list of token ids, or a list of such lists"
STOP = f"it must be a text of 1 to {STOP_LENGTH} characters, or a list of at most {STOP_TEXTS}"


def _prompt(value: Any, info: ValidationInfo) -> Any:
    """A text, texts, token ids, or lists of them; what the first element is decides."""
    prompts, tokens = _limit(info, "prompts", MOST_PROMPTS), _limit(info, "tokens", MOST_TOKENS)
    if isinstance(value, str):
        return _texts([value], PROMPT)[0]
    if not isinstance(value, list) or not value:
        raise ValueError(PROMPT)
    if _is_id(value[0]):
        return id_list(value, tokens)
    if len(value) > prompts:
        raise ValueError(f"it has {len(value)} prompts; send at most {prompts} at a time")
    if isinstance(value[0], str):
        return _texts(value, PROMPT)
    return [id_list(ids, tokens) for ids in value]


def _texts(values: list[Any], shape: str) -> list[str]:
    try:
        return [_text(value) for value in values]
    except ValueError:
        raise ValueError(shape) from None


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def id_list(value: Any, most: int) -> list[int]:
    if not isinstance(value, list) or not value:
        raise ValueError(PROMPT)
    if len(value) > most:
        raise ValueError(f"the prompt has {len(value)} tokens; at most {most} fit here")
    if not all(_is_id(i) and 0 <= i < 2**63 for i in value):
        raise ValueError(PROMPT)
    return value


def _stop(value: Any) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or len(texts) > STOP_TEXTS:
        raise ValueError(STOP)
    texts = _texts(texts, STOP)
    if not all(0 < len(text) <= STOP_LENGTH for text in texts):
        raise ValueError(STOP)
    return tuple(texts)


def _bias(value: Any) -> tuple[tuple[int, float], ...]:
    if not isinstance(value, dict) or len(value) > MOST_BIASES:
        raise ValueError(f"it must be an object of at most {MOST_BIASES} token ids and numbers")
    pairs = []
    for token, bias in value.items():
        fine = isinstance(token, str) and token.isascii() and token.isdigit() and len(token) < 10
        fine = fine and (token == "0" or token[0] != "0")  # or two names would be one token
        if not fine or isinstance(bias, bool) or not isinstance(bias, (int, float)) or not -100 <= bias <= 100:
            raise ValueError("it must map token ids to numbers between -100 and 100")
        pairs.append((int(token), float(bias)))
    return tuple(pairs)


_STRING, _ID = {"type": "string"}, {"type": "integer", "minimum": 0}
_IDS = {"type": "array", "items": _ID, "minItems": 1}
Prompt = Annotated[
    Any,
    PlainValidator(_prompt),
    WithJsonSchema({"anyOf": [
        _STRING, {"type": "array", "items": _STRING, "minItems": 1}, _IDS,
        {"type": "array", "items": _IDS, "minItems": 1},
    ]}),
]  # fmt: skip
_SHORT = {"type": "string", "minLength": 1, "maxLength": STOP_LENGTH}
Stop = Annotated[
    Any,
    PlainValidator(_stop),
    WithJsonSchema({"anyOf": [_SHORT, {"type": "array", "items": _SHORT, "maxItems": STOP_TEXTS}]}),
]
Bias = Annotated[
    Any,
    PlainValidator(_bias),
    WithJsonSchema({
        "type": "object", "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
        "propertyNames": {"pattern": "^(0|[1-9][0-9]{0,8})$"}, "maxProperties": MOST_BIASES,
    }),
]  # fmt: skip
