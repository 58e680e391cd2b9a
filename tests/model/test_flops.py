"""What a model costs: the published sizes, sums that agree with the built model, FLOPs against torch's own counter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import BELOW, CORNERS, VARIANTS, config, fixed, label, packed, passes
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lrt.config.model import MEMORY_OFF, MemoryConfig, ModelConfig
from lrt.config.recipes import recipe
from lrt.model.flops import (
    cache_bytes_per_token,
    decode_flops_per_token,
    describe,
    forward_flops,
    memory_bytes,
    memory_overhead,
    parameters_by_group,
    passes_flops,
    scaling_parameters,
    train_flops_per_token,
)
from lrt.model.run_passes import run_passes
from lrt.schedule import Schedule

models = pytest.mark.parametrize("cfg", VARIANTS + CORNERS, ids=label)


@pytest.mark.parametrize(
    ("name", "projection", "billions", "percent"),
    [
        ("d20_paper", "shared", 1.316, "0.307"), ("d20_paper", "layerwise", 1.316, "5.04"),
        ("d24_paper", "shared", 1.988, "0.304"), ("d24_paper", "layerwise", 1.988, "5.76"),
    ],
)  # fmt: skip
def test_published_sizes(name: str, projection, billions: float, percent: str):
    cfg = replace(recipe(name).model, memory=MemoryConfig(projection=projection))
    groups = parameters_by_group(cfg)
    assert round((sum(groups.values()) - groups["memory"]) / 1e9, 3) == billions
    assert f"{100 * memory_overhead(cfg):.{len(percent) - 2}f}" == percent
    plain = parameters_by_group(replace(cfg, memory=MEMORY_OFF))
    assert plain == groups | {"memory": 0}


def test_the_layerwise_model_of_depth_24_has_2_103_billion_parameters():
    cfg = replace(recipe("d24_paper").model, memory=MemoryConfig(projection="layerwise"))
    assert round(sum(parameters_by_group(cfg).values()) / 1e9, 3) == 2.103


def test_groups_of_a_small_model_by_hand():
    groups = parameters_by_group(config())  # d 24, kv 12, V 19, value embeddings in layers 0 and 2, gates read 7
    assert groups == {
        "embedding": 19 * 24,
        "value embeddings": 2 * 19 * 12,
        "head": 19 * 24,
        "matrices": 3 * (2 * 24 * 24 + 2 * 24 * 12 + 8 * 24 * 24),
        "scalars": 6,
        "memory": 3 * 2 * 24 * 12 + 7 * 2 * (3 + 2 + 3) + 3,
    }


@models
def test_groups_sum_to_the_built_model(cfg: ModelConfig):
    groups = parameters_by_group(cfg)
    assert sum(groups.values()) == sum(p.numel() for p in fixed(cfg).parameters())
    assert scaling_parameters(cfg) == groups["matrices"] + groups["embedding" if cfg.backbone.tied else "head"]
    assert scaling_parameters(cfg) == scaling_parameters(replace(cfg, memory=MEMORY_OFF))


# FLOPs.


def counted(cfg: ModelConfig, text: str, length: int, rows: int = 2) -> list[int]:
    """Matrix FLOPs of every pass as torch counts them, a row: all products, attention over every key it was handed.

    Its counter knows attention on the CPU only as the plain products of the math backend.
    """
    model, ids, found = fixed(cfg), packed(cfg, rows, length), []
    with torch.no_grad():
        folded, run = run_passes(model, ids, passes(text, length), model.starts(ids)), passes(text, length)
        for p in run:
            with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
                _, written, _ = next(folded)
                if p.weight > 0:
                    model.logits(written.hidden)
            found.append(counter.get_total_flops() // rows)
    return found


def masked_away(cfg: ModelConfig, blocks: range, length: int) -> int:
    """FLOPs of attention over keys that a full pass may not see: torch counts them, ours does not."""
    seen = [sum(min(t + 1, w or length) for t in range(length)) for w in [cfg.windows()[i] for i in blocks]]
    return sum(4 * cfg.h * cfg.e * (length * length - s) for s in seen)


@models
def test_full_passes_cost_what_torch_counts(cfg: ModelConfig):
    """Exactly, but for the masked half of attention."""
    check_against_torch("refinement-1", cfg)


@pytest.mark.parametrize("cfg", [VARIANTS[1], CORNERS[1], *CORNERS[-3:]], ids=label)
def test_passes_that_stop_early_cost_what_torch_counts(cfg: ModelConfig):
    check_against_torch("settled-1", cfg)


@pytest.mark.parametrize("cfg", BELOW, ids=label)
def test_sweeps_cost_what_torch_counts(cfg: ModelConfig):
    check_against_torch("settled-3", cfg)


def check_against_torch(text: str, cfg: ModelConfig) -> None:
    run, length = passes(text, 8), 8
    for i, torchs in enumerate(counted(cfg, text, length)):
        top, again = not text.startswith("settled") or i + 1 == len(run), 0 < i < len(run) - 1
        reads = cfg.memory.on and i > 0
        ours = forward_flops(
            cfg, range(length), memory=reads, blocks=cfg.blocks_run(top=top, again=again), head=run[i].weight > 0
        )
        assert ours == torchs - masked_away(cfg, cfg.blocks_run(top=top, again=again), length)


def test_strided_passes_count_their_own_positions_and_visible_keys():
    cfg = config()
    full, even = (forward_flops(cfg, at, memory=True) for at in (range(8), range(0, 8, 2)))
    odd = forward_flops(cfg, range(1, 8, 2), memory=True)
    assert even + odd == full
    assert odd - even == 4 * 24 * (
        2 * 4 + 2
    )  # a key more for each query in 2 long layers; window 4: 2+4+4+4 to 1+3+4+4


def test_attention_counts_visible_keys():
    wide = config(window_pattern="L")
    assert (
        forward_flops(wide, range(3, 4), memory=False) - forward_flops(wide, range(1), memory=False) == 4 * 24 * 3 * 3
    )
    narrow = config(window_pattern="SSL", window=2)
    assert forward_flops(narrow, range(7, 8), memory=False) - forward_flops(narrow, range(1), memory=False) == (
        4 * 24 * (1 + 1 + 7)
    )


def test_memory_costs_its_products_only_where_it_is_read():
    for projection, layers in (("layerwise", 3), ("shared", 1), ("none", 0)):
        cfg = config(projection=projection)
        extra = forward_flops(cfg, range(8), memory=True) - forward_flops(cfg, range(8), memory=False)
        assert extra == 2 * 8 * layers * 2 * 24 * 12


def test_a_token_shift_costs_its_products_in_every_pass_and_nothing_else():
    plain = replace(config(projection="shared"), memory=replace(config().memory, projection="gates", residual=False))
    shift = config(projection="shared", source=0)
    parallel = passes_flops(shift, passes("parallel", 8))
    assert parallel - passes_flops(plain, passes("parallel", 8)) == 3 * 2 * 8 * 2 * 24 * 12
    assert parallel == 3 * decode_total(shift)
    both = config(projection="shared", shift=True)
    more = [forward_flops(both, range(8), memory=m) - forward_flops(plain, range(8), memory=False) for m in (0, 1)]
    assert more == [2 * 8 * 2 * 24 * 12, 2 * 2 * 8 * 2 * 24 * 12]
    assert parameters_by_group(both)["memory"] - parameters_by_group(shift)["memory"] == 2 * 24 * 12 + 3


def decode_total(cfg: ModelConfig) -> int:
    return sum(decode_flops_per_token(cfg, t) for t in range(8))


def test_blocks_outside_the_window_have_no_memory():
    inside = config(blocks=(2, 3), value_embeddings="none")
    assert parameters_by_group(inside)["memory"] == 2 * (2 * 24 * 12 + 2 * 2 * 7 + 1)
    extra = forward_flops(inside, range(8), memory=True) - forward_flops(inside, range(8), memory=False)
    assert extra == 2 * 8 * 2 * 2 * 24 * 12


def test_every_pass_is_counted_and_backward_is_twice_forward():
    cfg = config()
    first = forward_flops(cfg, range(8), memory=False)
    settle = forward_flops(cfg, range(8), memory=False, blocks=cfg.blocks_run(top=False), head=False)
    again = forward_flops(cfg, range(8), memory=True)
    again_low = forward_flops(cfg, range(8), memory=True, blocks=cfg.blocks_run(top=False), head=False)
    assert passes_flops(cfg, passes("parallel", 8)) == 3 * first
    assert passes_flops(cfg, passes("refinement-2", 8)) == 3 * (first + 2 * again)
    assert passes_flops(cfg, passes("settled-2", 8)) == settle + again_low + 3 * again
    assert passes_flops(cfg, passes("interleaved-2", 8)) == 3 * (first + again)
    no_head = forward_flops(cfg, range(8), memory=False, head=False)
    assert passes_flops(cfg, passes("interleaved-2:weights=0/1", 8)) == 3 * (no_head + again)


def test_training_flops_are_the_mean_over_draws():
    cfg = config()
    drawn = [passes_flops(cfg, passes(f"settled-{r}", 8)) / 8 for r in (1, 2, 3)]
    assert train_flops_per_token(cfg, Schedule.parse("settled-1..3"), 8) == pytest.approx(sum(drawn) / 3)


def test_training_flops_of_a_large_model_are_near_6_per_parameter():
    cfg = replace(recipe("d20_paper").model, memory=MEMORY_OFF)
    flops = train_flops_per_token(cfg, Schedule.parse("parallel"), 2048)
    attention = 3 * 4 * cfg.d * cfg.depth * 2049 / 2
    assert flops == pytest.approx(6 * scaling_parameters(cfg) + attention)


def test_decoding_costs_a_forward_of_one_position_with_memory():
    cfg = config()
    assert decode_flops_per_token(cfg, 5) == forward_flops(cfg, range(5, 6), memory=True)
    assert sum(decode_flops_per_token(cfg, t) for t in range(8)) == forward_flops(cfg, range(8), memory=True)


def test_cache_bytes():
    assert cache_bytes_per_token(config()) == 2 * 3 * 12 * 2
    assert cache_bytes_per_token(recipe("d20_paper").model) == 2 * 20 * 1280 * 2
    assert memory_bytes(config()) == 48
    assert memory_bytes(CORNERS[-1]) == 0
    assert memory_bytes(config(source=0)) == 8
    assert memory_bytes(config(shift=True)) == 56


def test_description_holds_every_schedule_and_adds_up():
    about = describe(config(), 16, ["parallel", "settled-1..3"])
    assert about["parameters"]["total"] == sum(v for k, v in about["parameters"].items() if k != "total")
    assert set(about["train_flops_per_token"]) == {"parallel", "settled-1..3"}
    assert about["memory_bytes_per_sequence"] == 48
    assert set(about["decode_flops_per_token"]) == {"0", "15"}


def test_a_shift_beside_source_0_or_without_any_injection_says_nothing_new():
    """So that a recipe with a shift becomes the shift alone, or the plain model, by one flag or two."""
    alone = config(projection="shared", source=0)
    both = replace(alone, memory=replace(alone.memory, shift=True))
    off = replace(MEMORY_OFF, shift=True)
    assert parameters_by_group(both) == parameters_by_group(alone)
    assert passes_flops(both, passes("parallel", 8)) == passes_flops(alone, passes("parallel", 8))
    assert parameters_by_group(replace(alone, memory=off)) == parameters_by_group(replace(alone, memory=MEMORY_OFF))
