"""What mkdocs is told beyond mkdocs.yml: pages link to files beside docs/, which the site does not hold."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from posixpath import normpath
from typing import Any

LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)#\s]+)(#[^)\s]*)?\)")


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
