"""A configuration built in Python has fields of their types, or is refused by name; so has one read from a file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lrt.config.decoding import SamplingParams
from lrt.config.model import BackboneConfig, Execution, MemoryConfig, ModelConfig, RopeScaling
from lrt.config.run import DataConfig, OptimConfig, RunConfig, TrainConfig, from_dict
from lrt.config.typed_fields import hints_of

CLASSES = [
    MemoryConfig, RopeScaling, BackboneConfig, ModelConfig, Execution, DataConfig, OptimConfig, TrainConfig, RunConfig,
    SamplingParams,
]  # fmt: skip


@pytest.mark.parametrize("cls", CLASSES, ids=lambda c: c.__name__)
def test_no_field_takes_what_is_of_no_type_of_its(cls):
    """An object fits no field; a truth value fits no number."""
    for name, (hint, _) in hints_of(cls).items():
        with pytest.raises(ValueError, match=rf"\b{name} is .*; it must be "):
            cls(**{name: object()})
        if hint in (int, float):
            with pytest.raises(ValueError, match=rf"\b{name} is True; it must be "):
                cls(**{name: True})


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: ModelConfig(depth="2"), "model.depth is '2'; it must be int"),  # pyright: ignore[reportArgumentType]
        (lambda: ModelConfig(context=64.5), "model.context is 64.5; it must be int"),  # pyright: ignore[reportArgumentType]
        (lambda: ModelConfig(memory={"source": 1}), "it must be MemoryConfig"),  # pyright: ignore[reportArgumentType]
        (lambda: MemoryConfig(shift="no"), "model.memory.shift is 'no'; it must be bool"),  # pyright: ignore[reportArgumentType]
        (lambda: MemoryConfig(blocks=(1, 2, 3)), "model.memory.blocks"),  # pyright: ignore[reportArgumentType]
        (lambda: SamplingParams(max_new_tokens=5.0), "sampling.max_new_tokens is 5.0; it must be int"),  # pyright: ignore[reportArgumentType]
        (lambda: SamplingParams(temperature="0.8"), "sampling.temperature is '0.8'; it must be float"),  # pyright: ignore[reportArgumentType]
        (lambda: SamplingParams(stop=(1,)), "sampling.stop"),  # pyright: ignore[reportArgumentType]
        (lambda: SamplingParams(stop_tokens=5), "sampling.stop_tokens is 5"),  # pyright: ignore[reportArgumentType]
        (lambda: SamplingParams(logit_bias={3: 1.0}), "sampling.logit_bias"),  # pyright: ignore[reportArgumentType]
    ],
)
def test_the_refusal_names_field_value_and_type(build, said: str):
    with pytest.raises(ValueError) as refusal:
        build()
    assert said in str(refusal.value)


def test_lists_paths_and_the_numbers_of_numpy_are_taken_as_pythons_own():
    assert MemoryConfig(blocks=[1, 2]).blocks == (1, 2)  # pyright: ignore[reportArgumentType]
    assert DataConfig(source=Path("a") / "b.txt").source == str(Path("a") / "b.txt")  # pyright: ignore[reportArgumentType]
    made = SamplingParams(max_new_tokens=np.int64(3), temperature=np.float32(0.5), logit_bias=[[1, 2.0]])  # pyright: ignore[reportArgumentType]
    assert made == SamplingParams(max_new_tokens=3, temperature=0.5, logit_bias=((1, 2.0),))
    assert [type(made.max_new_tokens), type(made.temperature)] == [int, float]
    assert hash(made) == hash(SamplingParams(max_new_tokens=3, temperature=0.5, logit_bias=((1, 2.0),)))


def test_one_stop_text_is_one_text_and_not_its_letters():
    assert SamplingParams(stop="the").stop == ("the",)  # pyright: ignore[reportArgumentType]
    assert SamplingParams(stop=["the", "end"]).stop == ("the", "end")  # pyright: ignore[reportArgumentType]


def test_a_file_is_held_to_the_same_types():
    with pytest.raises(ValueError, match=r"config\.train\.batch is 4\.0; it must be int"):
        from_dict(RunConfig, {"train": {"batch": 4.0}})
