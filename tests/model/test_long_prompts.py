"""Long prompts: what Python does grows with the number of chunks or steps, and no faster."""

from __future__ import annotations

import gc
import sys
from collections import Counter
from types import FrameType
from typing import Any

import pytest
import torch
from helpers import config, randomised, tokens

from lrt.config.decoding import PrefillOptions
from lrt.inference.prefill import prefill

CHUNK = 8


def calls(length: int, mode: str, window_pattern: str) -> Counter[str]:
    """How often each function is called, Python's and C's, while a prompt of that length is taken in."""
    cfg = config(context=512, window_pattern=window_pattern)
    model, prompt, counted = randomised(cfg, scale=0.2), tokens(cfg, 1, length), Counter[str]()

    def count(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call":
            counted[f"{frame.f_code.co_filename}:{frame.f_code.co_name}"] += 1
        elif event == "c_call":
            counted[f"C {argument.__qualname__}"] += 1

    plan = PrefillOptions.parse(mode, tolerance=1e9, chunk=CHUNK)  # as many sweeps in every chunk
    gc.disable()  # the collector comes when it likes, and libraries have it call them
    sys.setprofile(count)
    try:
        prefill(model, prompt, mode=plan, capacity=512)
    finally:
        sys.setprofile(None)
        gc.enable()
    return counted


@pytest.mark.parametrize("window_pattern", ["L", "SL"])
@pytest.mark.parametrize("mode", ["exact", "jacobi", "interleaved-4"])
def test_calls_grow_with_chunks_and_steps_alone(mode: str, window_pattern: str):
    torch.manual_seed(0)
    calls(16 * CHUNK, mode, window_pattern)  # what is imported or kept at the first call
    few, more, most = (calls(n * CHUNK, mode, window_pattern) for n in (4, 8, 16))
    assert more.total() > few.total()
    for name, count in most.items():
        assert count - more[name] <= 2 * (more[name] - few[name]), name
