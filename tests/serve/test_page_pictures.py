"""The command that makes the page's pictures makes those that the documents show."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

pytest.importorskip("playwright.sync_api")
from page_pictures import PICTURES, main

DOCS = Path(__file__).parents[2] / "docs"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def test_the_documents_show_the_pictures_that_it_makes():
    committed = {p.stem for p in (DOCS / "img").glob("serve-*.png")}
    shown = set(re.findall(r"img/(serve-[\w-]+)\.png", (DOCS / "serving.md").read_text(encoding="utf-8")))
    assert committed == shown == set(PICTURES)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine: install Debian's package")
def test_it_makes_them_again(run: Path, tmp_path: Path):
    main(str(run), str(tmp_path))
    assert {p.stem for p in tmp_path.glob("*.png")} == set(PICTURES)
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in tmp_path.glob("*.png"))
