"""What mkdocs is told beyond mkdocs.yml: links that leave docs/, and what stays on one line."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from posixpath import normpath
from typing import Any

LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)#\s]+)(#[^)\s]*)?\)")
BLOCK = re.compile(r"(<pre.*?</pre>|<(?:script|style|svg).*?</(?:script|style|svg)>)", re.S)
CODE = re.compile(r"(<code>[^<]*</code>)")
TEXT = re.compile(r"(?:^|(?<=>))[^<>]+")
HYPHENED = re.compile(r"(?<![^\s>])[^\s<>]*-[^\s<>]*")
LONGEST = 32
"""Characters of code that a phone's line holds whole; longer words may break."""
TOGETHER = re.compile(r"(?<=\d) (?=[%±])|(?<=±) (?=\d)|(?<=\b[A-Z]) (?==)|(?<=\b[A-Z] =) (?=\d)")


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """Links that leave docs/ become the name of the file, as text."""

    def shown(found: re.Match[str]) -> str:
        text, target = found[1], found[2]
        inside = normpath(PurePosixPath(page.file.src_uri).parent / target)
        if "://" in target or not inside.startswith("..") or (Path(config.docs_dir) / inside).is_dir():
            return found[0]
        name = inside.removeprefix("../")
        return f"{text} (`{name}` in the repository)" if text.strip("`") != name else f"`{name}`"

    return LINK.sub(shown, markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Browsers break lines after hyphens, after a flag's `--` too: words of code and figures with signs stay whole."""
    parts = BLOCK.split(html)
    parts[::2] = [_unbroken(part) for part in parts[::2]]
    return "".join(parts)


def _unbroken(html: str) -> str:
    parts = CODE.split(html)
    parts[::2] = [TEXT.sub(lambda text: TOGETHER.sub("\u00a0", text[0]), part) for part in parts[::2]]
    parts[1::2] = [HYPHENED.sub(_whole, part) for part in parts[1::2]]
    return "".join(parts)


def _whole(word: re.Match[str]) -> str:
    return f'<span class="whole">{word[0]}</span>' if len(word[0]) <= LONGEST else word[0]
