"""Markdown read as prose and as a map of headings: what the tests of the documentation measure."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

FENCE = re.compile(r"^ *```.*?^ *```", re.S | re.M)
COMMENT = re.compile(r"<!--.*?-->", re.S)
GENERATED = re.compile(r"<!-- [\w ]+: begin -->.*?<!-- [\w ]+: end -->", re.S)
ITEM = re.compile(r"^ *(?:[-*]|\d+\.) +")
SENTENCE_END = re.compile(r"(?<=[.!?])(?:[\"')\]*]+)? +(?=[\"'(\[*`]*[A-Z0-9`])")
ABBREVIATION = re.compile(r"\b(?:et al|e\.g|i\.e|vs|cf|No)\. ")


def headings(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and mkdocs make them."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    return {anchor(title) for title in re.findall(r"^#+ +(.+)$", text, re.M)}


def anchor(title: str) -> str:
    """`## 4. What a pass is` has the anchor 4-what-a-pass-is."""
    return re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower())


def paragraphs(markdown: str) -> Iterator[str]:
    """Running text, one paragraph or list item at a time; code, tables, headings and generated parts left out."""
    for pattern in (GENERATED, COMMENT, FENCE):
        markdown = pattern.sub("\n", markdown)
    lines: list[str] = []
    before_is_list = False
    for line in [*markdown.splitlines(), ""]:
        indented_code = line.startswith("    ") and not lines and not before_is_list
        other = not line.strip() or line.lstrip().startswith(("#", "|", ">", "![", "---")) or indented_code
        if lines and (other or ITEM.match(line)):
            yield " ".join(lines)
            lines = []
        if not other:
            before_is_list = bool(ITEM.match(line)) or (before_is_list and (bool(lines) or line.startswith(" ")))
            lines.append(ITEM.sub("", line).strip())
        elif line.strip():
            before_is_list = False


def sentences(paragraph: str) -> list[str]:
    """The sentences of a paragraph; a colon or semicolon ends none."""
    plain = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", paragraph)
    plain = ABBREVIATION.sub(lambda found: found[0].replace(". ", ".\u00a0"), re.sub(r"`[^`]*`", "`x`", plain))
    return [part for part in SENTENCE_END.split(plain) if words(part)]


def words(text: str) -> int:
    """Words, inline code counted as one; figures and signs are none."""
    plain = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    return len(re.findall(r"\S*[^\W\d_]\S*", re.sub(r"`[^`]*`", "code", plain)))
