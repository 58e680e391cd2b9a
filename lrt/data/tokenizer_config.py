"""What a tokenizer's folder says beside how text is cut: the tokens that end and pad texts, and the chat templates.

The files are those of transformers, so that a folder of either kind is read, and each is kept through every save.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lrt.utils.files import MOST_SETTINGS, is_there, read_json, read_text, write_json, write_text

CONFIG, TEMPLATE, OTHER_TEMPLATES = "tokenizer_config.json", "chat_template.jinja", "additional_chat_templates"
MODEL_FILES = ("generation_config.json", "config.json")
"""Where a model's folder names the ids that end a text: the first of them that does."""
TURN_ENDS = (
    "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|eot|>", "<|end_of_turn|>", "<end_of_turn>", "<|end|>", "<|endofturn|>",
)  # fmt: skip
"""Special tokens by which chat models end a turn; many name them nowhere but in the template."""
OTHERS = ("cls_token", "sep_token", "mask_token")
FILE_NAME = re.compile(r"\w[\w.-]{0,99}")
DEFAULT = "default"
"""Name of the template that is meant where none is named."""


@dataclass(frozen=True)
class TokenizerConfig:
    """The roles of a tokenizer's special tokens, each by its text, and its chat templates."""

    eos: str | None = None
    """Ends a document."""
    pad: str | None = None
    """Fills rows of a batch, and stands nowhere else."""
    unknown: str | None = None
    """Stands for what has no token."""
    others: Mapping[str, str] = field(default_factory=dict)
    """Further tokens that a template may name: `cls_token`, `sep_token`, `mask_token`."""
    stops: tuple[str, ...] = ()
    """End an answer, beside `eos`: ends of turns."""
    chat_templates: Mapping[str, str] = field(default_factory=dict)
    """Jinja templates by name; `default` is the usual one."""

    @property
    def chat_template(self) -> str | None:
        """The usual template; the only one, where none is called default."""
        named = self.chat_templates
        return named.get(DEFAULT) or (next(iter(named.values())) if len(named) == 1 else None)

    def write(self, folder: Path, bos: str | None) -> None:
        """Write the files; nothing where there is nothing to say."""
        named = {
            "bos_token": bos, "eos_token": self.eos, "pad_token": self.pad, "unk_token": self.unknown,
            "stop_tokens": list(self.stops) or None,
            **self.others,
        }  # fmt: skip
        facts = {name: value for name, value in named.items() if value is not None}
        if facts:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / CONFIG, {"tokenizer_class": "PreTrainedTokenizerFast"} | facts)
        for name, text in self.chat_templates.items():
            _write(folder / (TEMPLATE if name == DEFAULT else f"{OTHER_TEMPLATES}/{name}.jinja"), text)


def read_tokenizer_config(folder: Path, vocabulary: Mapping[str, int], specials: Collection[str]) -> TokenizerConfig:
    """What the files of `folder` say, as far as the tokenizer has it; an empty one where there are none.

    `vocabulary` maps a token's text to its id; `specials` are the special ones.
    ValueError: a file that is not a JSON object, or a template whose name is no file name; it is named.
    """
    facts = read_json(folder / CONFIG, "tokenizer's settings") if is_there(folder / CONFIG) else {}
    name_of = {i: text for text, i in vocabulary.items()}
    ends = [name_of[i] for i in _ending_ids(folder) if i in name_of]
    named = (token_text(facts, "eos_token"), next(iter(ends), None))
    eos = next((text for text in named if text in vocabulary), None)
    pad, unknown = (text if text in vocabulary else None for text in _texts(facts, "pad_token", "unk_token"))
    written = facts.get("stop_tokens")
    written = [text for text in written if text in vocabulary] if isinstance(written, list) else []
    stops = dict.fromkeys([*written, *ends, *(text for text in TURN_ENDS if text in specials)])
    others = {key: text for key in OTHERS if (text := token_text(facts, key)) is not None and text in vocabulary}
    stops = tuple(s for s in stops if s != eos)
    return TokenizerConfig(eos, pad, unknown, others, stops, _chat_templates(folder, facts))


def _texts(facts: Mapping[str, Any], *keys: str) -> list[str | None]:
    return [token_text(facts, key) for key in keys]


def token_text(config: Mapping[str, Any], key: str) -> str | None:
    """The text of a token in tokenizer_config.json, where it is a string or an object with `content`."""
    token = config.get(key)
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _ending_ids(folder: Path) -> list[int]:
    """The ids by which a model beside its tokenizer ends a text."""
    for name in MODEL_FILES:
        if is_there(folder / name):
            ids = read_json(folder / name, "model's settings").get("eos_token_id")
            ids = ids if isinstance(ids, list) else [ids]
            token_ids = [i for i in ids if isinstance(i, int) and not isinstance(i, bool)]
            if token_ids:
                return token_ids
    return []


def _chat_templates(folder: Path, facts: Mapping[str, Any]) -> dict[str, str]:
    """By name, from files of their own or from tokenizer_config.json, where one is a text and several are a list."""
    files = {
        path.stem: read_text(path, "chat template", MOST_SETTINGS)
        for path in sorted((folder / OTHER_TEMPLATES).glob("*.jinja"))
    }
    if is_there(folder / TEMPLATE):
        return {DEFAULT: read_text(folder / TEMPLATE, "chat template", MOST_SETTINGS)} | files
    listed = facts.get("chat_template")
    if isinstance(listed, str):
        return {DEFAULT: listed} | files
    entries = [entry for entry in listed if isinstance(entry, dict)] if isinstance(listed, list) else []
    pairs = [(entry.get("name"), entry.get("template")) for entry in entries]
    templates = {name: text for name, text in pairs if isinstance(name, str) and isinstance(text, str)}
    for name in templates:
        if not FILE_NAME.fullmatch(name):  # it will name a file
            raise ValueError(f"{folder / CONFIG}: chat template {name[:40]!r}: name it by letters and digits")
    return templates | files


def _write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, text)
