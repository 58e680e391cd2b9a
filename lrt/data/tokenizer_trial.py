"""A trial of tokenizers that others wrote: what may hang, abort or fill the memory does so in a process of its own.

Normalisers and patterns of a tokenizer file run in the tokenizers library, where some end the whole process. A file
whose parts are known to be harmless is not tried.
"""

import functools
import itertools
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

HARMLESS = {
    "NFC", "NFD", "NFKC", "NFKD", "Nmt", "Lowercase", "Strip", "StripAccents", "BertNormalizer", "Prepend", "ByteLevel",
    "Metaspace", "Whitespace", "WhitespaceSplit", "BertPreTokenizer", "Punctuation", "Digits", "UnicodeScripts",
    "CharDelimiterSplit", "Sequence",
}  # fmt: skip
MOST_GROWTH = 64
"""Times longer that a normaliser may make a text: chains of replacements grow without bound."""
SECONDS, MEMORY = 30, 4 * 2**30
"""What a trial may take."""
TRIAL = f"""
import json, sys
try:
    import resource
    resource.setrlimit(resource.RLIMIT_AS, ({MEMORY}, {MEMORY}))
except (ImportError, ValueError, OSError):
    pass
import tokenizers
content, texts = json.load(sys.stdin)
core = tokenizers.Tokenizer.from_str(content)
for text in texts:
    core.encode(text, add_special_tokens=False)
"""


def try_tokenizer(content: dict[str, Any]) -> None:
    """ValueError if the tokenizer of this file cannot be trusted with a text: it dies, hangs or grows too far."""
    parts = [*_parts(content.get("normalizer")), *_parts(content.get("pre_tokenizer"))]
    growth = math.prod(_growth(part) for part in parts)
    if growth > MOST_GROWTH:
        raise ValueError(
            f"its normaliser may make a text {growth:.3g} times longer; at most {MOST_GROWTH} is taken: choose another"
        )
    if not all(str(part.get("type")) in HARMLESS or "String" in _pattern(part) for part in parts):
        _try(json.dumps(content))


def _parts(of: Any) -> Iterator[dict[str, Any]]:
    """A normaliser or pre-tokenizer, or those of a sequence."""
    if not isinstance(of, dict):
        return
    inner = of.get("normalizers") or of.get("pretokenizers")
    if isinstance(inner, list):
        for part in inner:
            yield from _parts(part)
    else:
        yield of


def _pattern(part: dict[str, Any]) -> dict[str, Any]:
    pattern = part.get("pattern")
    return pattern if isinstance(pattern, dict) else {}


def _growth(part: dict[str, Any]) -> float:
    """How many times longer a part may make a text of some words."""
    if part.get("type") == "Replace" and isinstance(part.get("content"), str):
        shortest = len(str(_pattern(part).get("String", "?"))) or 1
        return max(1.0, len(part["content"]) / shortest)
    if part.get("type") == "Prepend" and isinstance(part.get("prepend"), str):
        return 1 + len(part["prepend"]) / 16
    return 1.0


def _texts() -> list[str]:
    """Runs of one character, and every character of many scripts in a row."""
    blocks = ((0x20, 0x300), (0x370, 0x600), (0x900, 0x980), (0x2000, 0x2070), (0x4E00, 0x4E80), (0x1F600, 0x1F650))
    every = "".join(map(chr, itertools.chain(*(range(*block) for block in blocks))))
    runs = [character * 2000 for character in 'a A1!"_é字\n\t']
    return ["", "Hello world\n", every, *runs, "ab " * 700, "aB1 " * 500 + "!"]


@functools.lru_cache(maxsize=16)
def _try(content: str) -> None:
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-c", TRIAL],
            input=json.dumps([content, _texts()]),
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=SECONDS,
            check=False,
            env=os.environ | {"TOKENIZERS_PARALLELISM": "false", "RUST_BACKTRACE": "0"},
        )
    except subprocess.TimeoutExpired:
        raise ValueError(f"a trial of it took more than {SECONDS} seconds: its patterns hang; choose another") from None
    if done.returncode:
        why = "the trial's process died" if done.returncode < 0 else done.stderr.strip().rpartition("\n")[2]
        raise ValueError(f"a trial of it failed ({why[:160]}): its normaliser or patterns are broken; choose another")
