"""The page's sources, and the prompts that it begins with: of the model card, or such as fit the text."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lrt.serve.api import PAGE
from lrt.serve.prompts import ENGLISH, LONGEST, MOST, PYTHON, prompts_of

CARD = "---\nlicense: x\nwidget:\n- text: It was\n- example_title: no text\n- text: |\n    a\n    b\n---\n# books\n"


@pytest.fixture
def card(tmp_path: Path) -> Path:
    return tmp_path / "README.md"


def test_they_are_the_cards(card: Path):
    card.write_text(CARD, encoding="utf-8")
    assert prompts_of(card.parent, "python") == ("It was", "a\nb\n")


def test_without_a_card_they_fit_the_text(card: Path):
    assert prompts_of(card.parent, "python") == PYTHON
    assert prompts_of(card.parent, "books/*.txt") == ENGLISH


@pytest.mark.parametrize(
    "text", ["", "# no front matter\n", "---\nlicense: x\n---\n", "---\nwidget: []\n---\n", "---\nwidget:\n- 3\n---\n"]
)
def test_a_card_without_prompts_is_no_card(card: Path, text: str, caplog):
    card.write_text(text, encoding="utf-8")
    assert prompts_of(card.parent, "python") == PYTHON
    assert caplog.text == ""


@pytest.mark.parametrize(
    "text",
    ["---\nwidget: [\n---\n", "---\nwidget: 7\n---\n", "---\na: &x 1\nb: *x\n---\n", "---\n- a list\n---\n",
     "---\n" + "a: 1 #" + "x" * 300_000 + "\n---\n"],
)  # fmt: skip
def test_a_damaged_card_is_told_and_left(card: Path, text: str, caplog):
    card.write_text(text, encoding="utf-8")
    assert prompts_of(card.parent, "python") == PYTHON
    (line,) = caplog.messages
    assert "README.md" in line and len(line) <= 300


def test_bytes_that_are_no_text_are_told_too(card: Path, caplog):
    card.write_bytes(b"---\n\xff\n---\n")
    assert prompts_of(card.parent, "x") == ENGLISH and "README.md" in caplog.text


def test_prompts_are_bounded(card: Path):
    widgets = "".join(f"- text: '{'x' * (LONGEST + 9)}'\n" for _ in range(MOST + 3))
    card.write_text(f"---\nwidget:\n{widgets}---\n", encoding="utf-8")
    assert [len(prompt) for prompt in prompts_of(card.parent, "x")] == [LONGEST] * MOST


def test_no_text_becomes_markup():
    """Whatever models and people write is put into the page as text."""
    for script in PAGE.glob("*.js"):
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", script.read_text("utf-8")
        )
