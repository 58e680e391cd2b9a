"""A run's tokenizer for transformers: the same tokens, the same roles, and a token of its own to pad with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from lrt.data.tokenizer import Tokenizer
from lrt.inference.loaded import Loaded
from lrt.utils.files import read_json, write_json

PAD = "<|pad|>"
PAD_NAMES = (PAD, "<pad>", "[PAD]", "<|padding|>", "<|finetune_right_pad_id|>", "<｜▁pad▁｜>")
"""What tokenizers call a token that is there to pad with."""
UNUSED_BYTE = ("ÿ", "<0xFF>")
"""How byte-level and byte-fallback vocabularies spell byte 255, which no UTF-8 text holds: a token that is free."""


def fast_tokenizer(loaded: Loaded) -> Any:
    """The run's tokenizer for transformers; it opens texts with BOS, as `lrt sample` does, and pads on the left."""
    from transformers import PreTrainedTokenizerFast

    words = loaded.tokenizer
    core, pad = with_pad(words)
    templates = dict(words.config.chat_templates)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=core.id_to_token(words.bos), eos_token=core.id_to_token(words.eos),
        pad_token=pad, unk_token=words.config.unknown, padding_side="left", **words.config.others,
        chat_template=words.config.chat_template if len(templates) < 2 else templates,
        model_max_length=loaded.model.config.context,
    )  # fmt: skip


def with_pad(words: Tokenizer) -> tuple[tokenizers.Tokenizer, str | None]:
    """The tokenizer in the library's format, and its pad token: one that neither text nor the end of a text holds.

    It is the tokenizer's own; else the token of a byte that no text holds, renamed; else there is none (None).
    """
    core, taken = words.fast(), {words.bos, *words.ends}
    for name in (words.config.pad, *PAD_NAMES):
        token = core.token_to_id(name) if name else None
        if token is not None and token not in taken:
            core.add_special_tokens([AddedToken(name, special=True, normalized=False)])
            return core, name
    content = json.loads(core.to_str())
    vocabulary, merges = content["model"].get("vocab"), content["model"].get("merges", [])
    for name in UNUSED_BYTE if isinstance(vocabulary, dict) else ():
        if name in vocabulary and not any(name in "".join(pair) for pair in merges):
            vocabulary[PAD] = vocabulary.pop(name)
            renamed = tokenizers.Tokenizer.from_str(json.dumps(content))
            renamed.add_special_tokens([AddedToken(PAD, special=True, normalized=False)])
            return renamed, PAD
    return core, None


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write `fast_tokenizer`'s in the usual files; the class is called by the name that older readers know too."""
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    write_json(file, read_json(file, "tokenizer's settings") | {"tokenizer_class": "PreTrainedTokenizerFast"})
