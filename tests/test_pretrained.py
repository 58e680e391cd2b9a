"""The weights in the box: they open, are small, write, and their cards say what was measured."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import lrt
from lrt.serve.prompts import card_prompts

PRETRAINED = Path(__file__).parent.parent / "pretrained"
MODELS = ["books", "books_plain"]


@pytest.mark.parametrize("name", MODELS)
def test_it_opens_and_writes(name: str):
    model = lrt.load(PRETRAINED / name)
    assert model.config.model.memory.on == (name == "books")
    greedy = model.generate("It was", max_new_tokens=16, temperature=0)
    assert len(greedy) > 16
    assert greedy == model.generate("It was", mode="exact", max_new_tokens=16, temperature=0)


@pytest.mark.parametrize("name", MODELS)
def test_it_has_learnt_english(name: str):
    """Below 2 bits a byte on sentences that no book of its text holds; one random byte has 8."""
    text = "He looked at the house for some time, and then he went to the door and opened it without a word."
    assert lrt.load(PRETRAINED / name).score(text).bits_per_byte < 2


@pytest.mark.parametrize("name", MODELS)
def test_it_is_small_and_its_card_has_its_figure(name: str):
    folder = PRETRAINED / name
    assert sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) < 8e6
    described = next((folder / "checkpoints").glob("step_*/meta.json")).read_text(encoding="utf-8")
    decoded = float(re.findall(r'"decoded": ([0-9.]+)', described)[0])
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert f"**{decoded:.3f}**" in card
    assert card_prompts(folder / "README.md")
