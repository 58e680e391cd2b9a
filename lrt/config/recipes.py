"""Named recipes: functions that return a whole configuration. `lrt train --recipe NAME` starts from one of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from lrt.config.model import MEMORY_OFF, MemoryConfig, ModelConfig
from lrt.config.run import DataConfig, OptimConfig, RunConfig, TrainConfig

PAPER_MEMORY = MemoryConfig(projection="shared")
"""The paper's default: shared projections, both injections, memory from the last block."""
SHIFT_MEMORY = MemoryConfig(projection="shared", source=0, start="zero")
"""The token shift: the previous token's embedding by the same injection, without recurrence."""
LRT_MEMORY = MemoryConfig(projection="shared", source=1 / 3, shift=True, start="zero")
"""Ours: recurrence from a third of the depth, beside a token shift; the best recurrent recipe of docs/results.md."""
LRT_SCHEDULE = "parallel@0.85,settled-1..3:p=0.8/0.1/0.1"
"""Ours: the recurrence comes late. Plain passes with the shift first; then one sweep in most steps, more rarely."""


def cpu_demo() -> RunConfig:
    """A model for two CPU cores and a minute or two; the Python standard library in 512 BPE tokens."""
    return RunConfig(
        name="cpu_demo",
        model=ModelConfig(depth=3, width=64, heads=2, context=256, vocab_size=512, memory=LRT_MEMORY),
        data=DataConfig(source="python", tokenizer="bpe", vocab_size=512, max_bytes=16_000_000),
        optim=OptimConfig(embedding_lr=0.1),
        train=TrainConfig(schedule=LRT_SCHEDULE, batch=8, length=128, horizon="flops_of_plain=9", eval_every=400),
    )


def cpu_demo_layerwise() -> RunConfig:
    """The demo model of the first round, at equal effective compute: a projection per layer, no shift, 1..3 sweeps."""
    memory = MemoryConfig(projection="layerwise")
    return _demo("cpu_demo_layerwise", memory, schedule="settled-1..3", horizon="compute=9")


def cpu_demo_paper() -> RunConfig:
    """The demo model by the paper's recipe: shared projections, interleaved S = 2."""
    return _demo("cpu_demo_paper", PAPER_MEMORY, schedule="interleaved-2")


def cpu_demo_shift() -> RunConfig:
    """The demo model with a token shift in place of the recurrence: one pass, ordinary cost."""
    return _demo("cpu_demo_shift", SHIFT_MEMORY, schedule="parallel")


def cpu_demo_plain() -> RunConfig:
    """The demo model without memory."""
    return _demo("cpu_demo_plain", MEMORY_OFF, schedule="parallel")


def _demo(name: str, memory: MemoryConfig, **train: str) -> RunConfig:
    base = cpu_demo()
    return replace(base, name=name, model=replace(base.model, memory=memory), train=replace(base.train, **train))


def _depth(depth: int, name: str, rows: int) -> RunConfig:
    model = ModelConfig(
        depth=depth, vocab_size=8192, value_embeddings="alternating", window_pattern="SSSL", memory=LRT_MEMORY
    )
    return RunConfig(
        name=name,
        model=model,
        data=DataConfig(source="python+site-packages", tokenizer="bpe", vocab_size=8192),
        train=TrainConfig(schedule=LRT_SCHEDULE, batch=rows, length=2048, horizon="ratio=20"),
    )


def d4() -> RunConfig:
    """Depth 4, width 256: a large CPU run or a minute on a GPU."""
    return _depth(4, "d4", rows=32)


def d8() -> RunConfig:
    """Depth 8, width 512: minutes on one GPU."""
    return _depth(8, "d8", rows=64)


def d12() -> RunConfig:
    """Depth 12, width 768: an hour or so on one GPU."""
    return _depth(12, "d12", rows=256)


def _paper(depth: int, name: str) -> RunConfig:
    model = ModelConfig(depth=depth, vocab_size=32768, value_embeddings="all", memory=PAPER_MEMORY)
    data = DataConfig(source="hf:HuggingFaceFW/fineweb-edu", subset="sample-100BT", tokenizer="bpe", vocab_size=32768)
    train = TrainConfig(
        schedule="interleaved-2", batch=256, micro_batch=16, length=2048, horizon="ratio=10", save_every=500
    )
    return RunConfig(name=name, model=model, data=data, train=train)


def d20_paper() -> RunConfig:
    """The paper's 1.3 B model: depth 20, shared projections, interleaved S = 2, FineWeb-Edu, R = 10."""
    return _paper(20, "d20_paper")


def d24_paper() -> RunConfig:
    """The paper's 2.0 B model: depth 24, otherwise as d20_paper."""
    return _paper(24, "d24_paper")


RECIPES: dict[str, Callable[[], RunConfig]] = {
    f.__name__: f
    for f in (
        cpu_demo,
        cpu_demo_paper,
        cpu_demo_plain,
        cpu_demo_shift,
        cpu_demo_layerwise,
        d4,
        d8,
        d12,
        d20_paper,
        d24_paper,
    )
}

if TYPE_CHECKING:
    RecipeName = str
else:
    RecipeName = Literal[tuple(RECIPES)]
"""The names as a type, so that help and completion list them."""


def recipe(name: str) -> RunConfig:
    """The recipe called `name`; an unknown one raises ValueError listing those there are."""
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}; choose one of {', '.join(RECIPES)}")
    return RECIPES[name]()
