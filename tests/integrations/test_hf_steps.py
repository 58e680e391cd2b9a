"""The count of training steps, by which schedules are drawn, in what the transformers classes save and load."""

from __future__ import annotations

import pytest
import safetensors.torch
import torch
from test_hf_training import FULL, ids_of, wrapped

pytest.importorskip("transformers")
from lrt.integrations.hf import LRTForCausalLM, LRTModel


def test_steps_are_kept_with_the_weights(tmp_path):
    model, ids = wrapped(FULL, schedule="settled-1..3").train(), ids_of(2, 6)
    for _ in range(3):
        model(ids, labels=ids)
    model.save_pretrained(tmp_path)
    again = LRTForCausalLM.from_pretrained(tmp_path).train()
    assert again.steps == model.steps == 3
    with torch.no_grad():
        assert torch.equal(again(ids, labels=ids).loss, model(ids, labels=ids).loss)


def test_steps_are_read_where_they_once_were(tmp_path):
    """A folder from before the count moved, loaded, saved again and read by the Trainer's way."""
    model = wrapped(FULL, schedule="settled-1..3")
    model.steps = 5
    model.save_pretrained(tmp_path)
    names = safetensors.torch.load_file(tmp_path / "model.safetensors")
    old = {("model.steps_done" if "steps_done" in name else name): x for name, x in names.items()}
    safetensors.torch.save_file(old, tmp_path / "model.safetensors", {"format": "pt"})
    for kind in (LRTForCausalLM, LRTModel):
        loaded = kind.from_pretrained(tmp_path)
        assert loaded.steps == 5
        loaded.save_pretrained(tmp_path / "again")
        again = safetensors.torch.load_file(tmp_path / "again" / "model.safetensors")
        assert {name for name in again if "steps" in name} <= {"model.counter.steps_done", "counter.steps_done"}
        assert LRTForCausalLM.from_pretrained(tmp_path / "again").steps == 5
    fresh = wrapped(FULL)
    fresh.load_state_dict(old)
    assert fresh.steps == 5
