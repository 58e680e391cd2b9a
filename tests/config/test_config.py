"""Configuration: every bad value gets one line with its number and a remedy; JSON round trips; no JSON breaks it."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lrt.config.model import MEMORY_OFF, BackboneConfig, MemoryConfig, ModelConfig, RopeScaling
from lrt.config.recipes import RECIPES, recipe
from lrt.config.run import DataConfig, OptimConfig, RunConfig, TrainConfig, from_dict, to_dict

NAN = float("nan")
INF = float("inf")
BAD: list[tuple[type, dict, list[str]]] = [
    (ModelConfig, {"depth": 0}, ["model.depth is 0", "at least 1"]),
    (ModelConfig, {"depth": 2, "width": 0}, ["model.width is 0", "at least 2"]),
    (ModelConfig, {"depth": 2, "width": -64}, ["model.width is -64"]),
    (ModelConfig, {"depth": 2, "width": 100, "heads": 3}, ["model.width 100", "multiple", "heads 3"]),
    (ModelConfig, {"depth": 2, "heads": 0}, ["model.width 128", "heads 0"]),
    (ModelConfig, {"depth": 2, "width": 30, "heads": 2}, ["head width 15 is odd", "even"]),
    (ModelConfig, {"depth": 2, "heads": 4, "kv_heads": 3}, ["heads 4", "kv_heads 3"]),
    (ModelConfig, {"depth": 2, "kv_heads": 0}, ["kv_heads 0"]),
    (ModelConfig, {"vocab_size": 1}, ["model.vocab_size is 1", "at least 2"]),
    (ModelConfig, {"context": 0}, ["model.context is 0", "at least 1"]),
    (ModelConfig, {"bos": 5, "vocab_size": 5}, ["model.bos 5", "vocabulary of 5"]),
    (ModelConfig, {"bos": -1}, ["model.bos -1", "vocabulary"]),
    (ModelConfig, {"window_pattern": "SLX"}, ["'SLX'", "only L and S"]),
    (ModelConfig, {"window_pattern": ""}, ["''", "only L and S"]),
    (ModelConfig, {"window": 0}, ["model.window is 0", "at least 1"]),
    (ModelConfig, {"softcap": 0.0}, ["model.softcap is 0.0", "positive or none"]),
    (ModelConfig, {"softcap": NAN}, ["model.softcap is nan", "positive or none"]),
    (ModelConfig, {"softcap": INF}, ["model.softcap is inf", "positive or none"]),
    (ModelConfig, {"rope_theta": 0.0}, ["model.rope_theta is 0.0", "positive"]),
    (ModelConfig, {"value_embeddings": "some"}, ["model.value_embeddings is 'some'", "alternating"]),
    (BackboneConfig, {"mlp": "gelu"}, ["model.backbone.mlp is 'gelu'", "swiglu"]),
    (BackboneConfig, {"biases": "some"}, ["model.backbone.biases is 'some'", "qkv"]),
    (BackboneConfig, {"qk_norm": "both"}, ["model.backbone.qk_norm is 'both'", "before"]),
    (BackboneConfig, {"mlp_width": 0}, ["model.backbone.mlp_width is 0", "at least 1"]),
    (BackboneConfig, {"norm_eps": 0.0}, ["model.backbone.norm_eps is 0.0", "positive"]),
    (RopeScaling, {"kind": "linear", "factor": INF}, ["factor inf", "factor >= 1"]),
    (RopeScaling, {"kind": "llama3", "high": INF}, ["high inf", "low < high"]),
    (RopeScaling, {"kind": "yarn"}, ["model.backbone.rope.kind is 'yarn'", "llama3"]),
    (RopeScaling, {"low": 4.0, "high": 4.0}, ["low 4.0, high 4.0", "low < high"]),
    (ModelConfig, {"width": 24, "backbone": BackboneConfig(head_width=3)}, ["head width 3 is odd"]),
    (ModelConfig, {"depth": 3, "memory": MemoryConfig(source=4)}, ["model.memory.source is block 4", "blocks 1..3"]),
    (ModelConfig, {"depth": 3, "memory": MemoryConfig(source=-1)}, ["model.memory.source is block -1", "blocks 1..3"]),
    (ModelConfig, {"depth": 3, "memory": MemoryConfig(blocks=(2, 4))}, ["model.memory.blocks is (2, 4)", "1..3"]),
    (ModelConfig, {"depth": 3, "memory": MemoryConfig(blocks=(3, 2))}, ["model.memory.blocks is (3, 2)", "1..3"]),
    (MemoryConfig, {"source": 1.5}, ["model.memory.source is 1.5", "a fraction between 0 and 1"]),
    (MemoryConfig, {"start": "small"}, ["model.memory.start is 'small'", "uniform, zero"]),
    (ModelConfig, {"depth": 1, "memory": MemoryConfig(gate_width=65)}, ["gate_width is 65", "width, 64"]),
    (ModelConfig, {"depth": 1, "memory": MemoryConfig(gate_width=0)}, ["gate_width is 0", "between 1 and"]),
    (MemoryConfig, {"projection": "both"}, ["model.memory.projection is 'both'", "none, gates, shared, layerwise"]),
    (DataConfig, {"validation": 0.0}, ["data.validation is 0.0", "between 0 and 1"]),
    (DataConfig, {"validation": 1.0}, ["data.validation is 1.0", "between 0 and 1"]),
    (DataConfig, {"vocab_size": 257}, ["data.vocab_size is 257", "258"]),
    (DataConfig, {"max_bytes": 0}, ["data.max_bytes is 0", "at least 1 or none"]),
    (OptimConfig, {"matrix_lr": -0.1}, ["optim.matrix_lr is -0.1", "at least 0"]),
    (OptimConfig, {"embedding_lr": NAN}, ["optim.embedding_lr is nan"]),
    (OptimConfig, {"head_lr": INF}, ["optim.head_lr is inf"]),
    (OptimConfig, {"scalar_lr": -1}, ["optim.scalar_lr is -1"]),
    (OptimConfig, {"weight_decay": -0.5}, ["optim.weight_decay is -0.5"]),
    (OptimConfig, {"momentum": 1.0}, ["optim.momentum is 1.0", "below 1"]),
    (OptimConfig, {"betas": (0.9, 1.5)}, ["optim.betas are (0.9, 1.5)", "two numbers"]),
    (OptimConfig, {"betas": (0.9,)}, ["optim.betas is (0.9,)", "tuple[float, float]"]),
    (OptimConfig, {"warmup": 1.5}, ["optim.warmup is 1.5", "between 0 and 1"]),
    (OptimConfig, {"decay": -0.1}, ["optim.decay is -0.1", "between 0 and 1"]),
    (OptimConfig, {"final": NAN}, ["optim.final is nan", "between 0 and 1"]),
    (OptimConfig, {"warmup": 0.6, "decay": 0.6}, ["warmup 0.6", "decay 0.6", "exceed 1"]),
    (OptimConfig, {"clip": 0.0}, ["optim.clip is 0.0", "positive or none"]),
    (TrainConfig, {"schedule": "zigzag"}, ["'zigzag'", "interleaved"]),
    (TrainConfig, {"schedule": "settled-2:weights=0/1"}, ["settled-2", "2 weights for 1 passes", "no more"]),
    (TrainConfig, {"schedule": "refinement-1..3:weights=1/2/3"}, ["refinement-1", "3 weights for 2 passes"]),
    (TrainConfig, {"horizon": "steps=0"}, ["train.horizon is 'steps=0'", "steps=1000"]),
    (TrainConfig, {"horizon": "epochs=3"}, ["'epochs=3'", "compute=20"]),
    (TrainConfig, {"horizon": "tokens=many"}, ["'tokens=many'", "tokens=1e6"]),
    (TrainConfig, {"horizon": "ratio=nan"}, ["'ratio=nan'", "ratio=20"]),
    (TrainConfig, {"horizon": "compute=inf"}, ["'compute=inf'"]),
    (TrainConfig, {"horizon": ""}, ["train.horizon is ''"]),
    (TrainConfig, {"length": 1}, ["train.length is 1", "at least 2"]),
    (TrainConfig, {"batch": 0}, ["train.batch is 0", "at least 1"]),
    (TrainConfig, {"batch": 8, "micro_batch": 3}, ["micro_batch 3", "divide batch 8"]),
    (TrainConfig, {"micro_batch": 0}, ["micro_batch 0", "divide batch 32"]),
    (TrainConfig, {"eval_rows": 0}, ["train.eval_rows is 0", "at least 1"]),
    (TrainConfig, {"keep": 0}, ["train.keep is 0", "at least 1"]),
    (TrainConfig, {"log_every": 0}, ["train.log_every is 0", "at least 1"]),
    (TrainConfig, {"eval_every": -1}, ["train.eval_every is -1", "at least 0"]),
    (TrainConfig, {"save_every": -5}, ["train.save_every is -5", "at least 0"]),
    (TrainConfig, {"seed": -1}, ["train.seed is -1", "at least 0"]),
    (TrainConfig, {"dtype": "float16"}, ["train.dtype is 'float16'", "auto, bfloat16, float32"]),
    (RunConfig, {"model": ModelConfig(context=64), "train": TrainConfig(length=65)}, ["length 65", "context 64"]),
]


@pytest.mark.parametrize(("kind", "values", "names"), BAD, ids=lambda x: str(x)[:40] if isinstance(x, dict) else "")
def test_a_bad_value_gets_one_line_with_its_number_and_a_remedy(kind: type, values: dict, names: list[str]):
    with pytest.raises(ValueError) as error:
        kind(**values)
    message = str(error.value)
    assert all(name in message for name in names), message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("data", "names"),
    [
        ([], ["config is a list", "object of named fields"]),
        ({"model": None}, ["config.model is a NoneType", "object of named fields"]),
        ({"depth": 3}, ["config has no field 'depth'", "model"]),
        ({"model": {"dept\nh": 3}}, ["config.model has no field 'dept\\nh'", "depth"]),
        ({"model": {"depth": "3"}}, ["config.model.depth is '3'", "int"]),
        ({"model": {"depth": 3.0}}, ["config.model.depth is 3.0", "int"]),
        ({"model": {"depth": True}}, ["config.model.depth is True", "int"]),
        ({"model": {"depth": None}}, ["config.model.depth is None", "int"]),
        ({"model": {"width": "wide"}}, ["config.model.width is 'wide'", "int | None"]),
        ({"model": {"residual_scalars": 1}}, ["config.model.residual_scalars is 1", "bool"]),
        ({"model": {"value_embeddings": "both"}}, ["model.value_embeddings is 'both'", "alternating"]),
        ({"model": {"value_embeddings": ["all"]}}, ["config.model.value_embeddings is ('all',)"]),
        ({"model": {"memory": {"projection": "x"}}}, ["model.memory.projection is 'x'", "layerwise"]),
        ({"model": {"memory": {"source": 99}}}, ["block 99", "blocks 1..12"]),
        ({"optim": {"betas": [0.9]}}, ["config.optim.betas is (0.9,)"]),
        ({"optim": {"betas": ["a", "b"]}}, ["config.optim.betas is ('a', 'b')"]),
        ({"optim": {"clip": "no"}}, ["config.optim.clip is 'no'", "float | None"]),
        ({"train": {"dtype": "int8"}}, ["train.dtype is 'int8'", "bfloat16"]),
        ({"train": {"schedule": 2}}, ["config.train.schedule is 2", "str"]),
        ({"data": {"max_bytes": {}}}, ["config.data.max_bytes is {}", "int | None"]),
    ],
)
def test_bad_json_gets_one_line_with_the_field(data, names: list[str]):
    with pytest.raises(ValueError) as error:
        from_dict(RunConfig, data)
    message = str(error.value)
    assert all(name in message for name in names), message
    assert "\n" not in message


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_round_trip_through_json(name: str):
    config = recipe(name)
    text = json.dumps(to_dict(config))
    assert from_dict(RunConfig, json.loads(text)) == config
    assert json.dumps(to_dict(from_dict(RunConfig, json.loads(text)))) == text


def test_an_unknown_recipe_lists_those_there_are():
    with pytest.raises(ValueError, match=r"'d99'.*cpu_demo.*d20_paper"):
        recipe("d99")


def test_missing_fields_take_their_defaults():
    assert from_dict(RunConfig, {}) == RunConfig()
    assert from_dict(RunConfig, {"model": {"depth": 3}}).model == ModelConfig(depth=3)
    assert from_dict(OptimConfig, {"betas": [1 / 2, 0]}).betas == (0.5, 0)
    assert from_dict(OptimConfig, {"clip": None, "weight_decay": 1}) == OptimConfig(clip=None, weight_decay=1)


LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(-(10**6), 10**6), st.floats(), st.text(max_size=8),
    st.sampled_from(["shared", "all", "L", "SL", "steps=5", "parallel", "auto", "bfloat16", "none"]),
)  # fmt: skip
ANY = st.recursive(LEAVES, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=5), x, max_size=3))


def objects(kind: type, depth: int = 3) -> st.SearchStrategy[dict]:
    """JSON objects with the fields of a configuration, and now and then something else in them."""
    nested = {"MemoryConfig": MemoryConfig, "ModelConfig": ModelConfig, "DataConfig": DataConfig}
    nested |= {"OptimConfig": OptimConfig, "TrainConfig": TrainConfig}
    fields = {
        f.name: (objects(nested[str(f.type)], depth - 1) if str(f.type) in nested else LEAVES) | ANY
        for f in dataclasses.fields(kind)
    }
    return st.fixed_dictionaries({}, optional=fields | {"unknown": ANY} if depth < 2 else fields)


def round_trip(kind: type, data) -> None:
    try:
        config, problem = from_dict(kind, data), ""
    except ValueError as error:
        config, problem = None, str(error)
    assert "\n" not in problem
    if config is not None:  # compared as text: a NaN differs from itself
        assert str(from_dict(kind, json.loads(json.dumps(to_dict(config))))) == str(config)


@settings(max_examples=200)
@given(objects(RunConfig) | ANY)
def test_any_json_is_a_configuration_or_a_value_error(data):
    """Nothing but ValueError comes out, in one line; what is accepted round trips."""
    round_trip(RunConfig, data)


KINDS = [ModelConfig, OptimConfig, TrainConfig, DataConfig, MemoryConfig]
FIELDS = [(kind, f.name) for kind in KINDS for f in dataclasses.fields(kind)]


@settings(max_examples=200)
@given(st.sampled_from(FIELDS), ANY)
def test_any_value_of_any_field_alone(field: tuple[type, str], value):
    kind, name = field
    round_trip(kind, {name: value})


# What follows from the fields.


def test_one_dial_derives_the_rest_and_moves_it():
    cfg = ModelConfig(depth=20)
    assert (cfg.d, cfg.h, cfg.k, cfg.e, cfg.source, cfg.gate_width) == (1280, 10, 10, 128, 20, 1280)
    moved = dataclasses.replace(cfg, depth=24)
    assert (moved.d, moved.h, moved.k, moved.source) == (1536, 12, 12, 24)
    small = ModelConfig(depth=1, heads=2, kv_heads=1, memory=MemoryConfig(gate_width=12))
    assert (small.d, small.h, small.k, small.e, small.gate_width) == (64, 2, 1, 32, 12)


def test_memory_is_on_with_either_injection():
    assert MemoryConfig().on
    assert MemoryConfig(projection="none").on
    assert MemoryConfig(residual=False).on
    assert not MEMORY_OFF.on


@pytest.mark.parametrize(
    ("text", "kind", "number"),
    [
        ("steps=1000", "steps", 1000),
        ("tokens=1e6", "tokens", 1e6),
        ("ratio=20", "ratio", 20),
        ("compute=.5", "compute", 0.5),
    ],
)
def test_horizons(text: str, kind: str, number: float):
    assert TrainConfig(horizon=text).horizon_parts() == (kind, number)


def test_configurations_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ModelConfig().depth = 3


@pytest.mark.parametrize(
    ("kind", "data", "said"),
    [
        (OptimConfig, {"clip": True}, "config.clip is True; it must be float | None"),
        (OptimConfig, {"betas": [0.9, True]}, "config.betas is (0.9, True); it must be tuple[float, float]"),
        (OptimConfig, {"betas": [0.9]}, "config.betas is (0.9,)"),
        (TrainConfig, {"dtype": "float16"}, "config.dtype is 'float16'; it must be one of auto, bfloat16, float32"),
        (TrainConfig, {"batch": 8.0}, "config.batch is 8.0; it must be int"),
        (RunConfig, {"model": {"memory": {"residual": 1}}}, "config.model.memory.residual is 1; it must be bool"),
        (RunConfig, {"model": [1]}, "config.model is a list; it must be an object"),
    ],
)
def test_a_field_of_another_type_is_named(kind: type, data: dict, said: str):
    with pytest.raises(ValueError, match="it must be") as caught:
        from_dict(kind, data)
    assert str(caught.value).startswith(said)


@pytest.mark.parametrize("seed", [-1, 2**32, 2**32 + 1, 2**63 - 1])
def test_seeds_that_would_repeat_the_weights_of_others_are_refused(seed: int):
    """Torch's generator looks at 32 bits of a seed alone."""
    with pytest.raises(ValueError, match=r"train\.seed is .*; it must be at least 0, and at most 4,294,967,295"):
        TrainConfig(seed=seed)
    assert TrainConfig(seed=2**32 - 1).seed == 2**32 - 1
