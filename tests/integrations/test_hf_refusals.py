"""What the transformers classes refuse, each in one sentence, where a result would be wrong."""

from __future__ import annotations

import pytest
import torch
from test_hf import FULL, ids_of, made, wrapped

transformers = pytest.importorskip("transformers")


def test_what_cannot_work_says_so():
    model, ids = wrapped(FULL), ids_of(1, 5)
    cases = {
        "layer": lambda: made(model, ids, cache_implementation="quantized"),
        "from the model's own config": lambda: made(model, ids, past_key_values=transformers.DynamicCache()),
        "one of them": lambda: model(ids, inputs_embeds=torch.zeros(1, 3, 24)),
        "take transformers<5.24": lambda: model(ids, cache=transformers.DynamicCache()),
        "2 axes, not 4": lambda: model(ids, torch.ones(1, 1, 5, 5)),
        "begin the next document at 0": lambda: model(ids, position_ids=torch.tensor([[0, 1, 2, 4, 5]])),
        "target -1 is no token": lambda: model(ids, labels=ids.new_full(ids.shape, -1)),
        "leave past_key_values": lambda: model.train()(ids, use_cache=True),
    }
    for words, call in cases.items():
        with pytest.raises(ValueError, match=words):
            call()
    model.eval()
    cache = model(ids).past_key_values
    with pytest.raises(ValueError, match="goes back only over tokens that it has recorded"):
        cache.crop(-2)


def test_inputs_of_another_form_are_refused_or_computed_right():
    """Types and shapes of ids, labels, masks and positions; a hole in a mask is a token that is not there."""
    model, ids = wrapped(FULL).eval(), ids_of(2, 6)
    wide = torch.ones(2, 9)
    steps = torch.arange(6)
    cases = {
        "input_ids are a list": lambda: model(ids.tolist()),
        "labels are torch.bool": lambda: model(ids, labels=ids > 3),
        "has 9 columns, of which only 6 may be 1": lambda: model(ids, wide),
        r"position_ids of shape \(2, 3\) for tokens of \(2, 6\)": lambda: model(ids, position_ids=ids[:, :3]),
        "position_ids are torch.float64; give whole numbers": lambda: model(ids, position_ids=steps.double()[None]),
        "position_ids must go on from the cache's": lambda: model(
            ids[:, :1], position_ids=ids.new_zeros(2, 1), past_key_values=model(ids).past_key_values
        ),
    }
    for words, call in cases.items():
        with pytest.raises(ValueError, match=words):
            call()
    with torch.no_grad():
        whole = model(ids).logits
        hole = torch.ones_like(ids)
        hole[0, 2] = 0
        apart = torch.tensor([0, 1, 3, 4, 5])
        cut = model(ids[:1, apart]).logits
        padded = torch.nn.functional.pad(torch.ones_like(ids), (0, 3))
        assert torch.allclose(model(ids.int()).logits, whole, rtol=0, atol=1e-12)
        assert torch.allclose(model(ids, hole).logits[:1, apart], cut, rtol=0, atol=1e-12)
        assert torch.allclose(model(ids, padded).logits, whole, rtol=0, atol=1e-12)
        assert torch.allclose(model(ids, position_ids=steps).logits, whole, rtol=0, atol=1e-12)
        following = model(ids[:, :1], position_ids=ids.new_full((2, 1), 6), past_key_values=model(ids).past_key_values)
        more = model(torch.cat((ids, ids[:, :1]), 1)).logits
        assert torch.allclose(following.logits[:, -1], more[:, -1], rtol=0, atol=1e-10)


def test_a_cache_that_a_call_does_not_go_on_from_is_refused():
    """Padding that is told otherwise than it was, rows, room, and keys and values without their memory."""
    model, ids = wrapped(FULL), ids_of(2, 5)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    new, kinds = ids[:, :1], ("DynamicCache", "StaticCache")

    def filled(kind: str, masked: bool = True):
        sized = {"max_cache_len": 6} if kind == "StaticCache" else {}
        cache = getattr(transformers, kind)(config=model.config, **sized)
        model(ids, mask if masked else None, past_key_values=cache)
        return cache

    longer = torch.nn.functional.pad(mask, (0, 1), value=1)
    for kind in kinds:
        padded = "tells 5 tokens before these in row 0, past_key_values has taken in 3"
        cases = {
            padded: lambda kind=kind: model(new, past_key_values=filled(kind)),
            "tells 3 tokens": lambda kind=kind: model(new, longer, past_key_values=filled(kind, masked=False)),
            "holds 2 rows for 1": lambda kind=kind: model(new[:1], past_key_values=filled(kind, masked=False)),
        }
        for words, call in cases.items():
            with pytest.raises(ValueError, match=words):
                call()
    with pytest.raises(ValueError, match=r"tells 3 tokens before these in row 0, past_key_values has taken in 5"):
        made(model, torch.cat((ids, new), dim=1), attention_mask=longer, past_key_values=filled("DynamicCache", False))
    cache = filled("StaticCache")
    model(new, longer, past_key_values=cache)
    for more in (new, ids):
        told = torch.nn.functional.pad(longer, (0, more.shape[1]), value=1)
        with pytest.raises(ValueError, match=r"room for 6 tokens, not for (7|11)"):
            model(more, told, past_key_values=cache)
    layers = [(layer.keys, layer.values) for layer in filled("DynamicCache").layers]
    bare = transformers.DynamicCache(layers, config=model.config)
    both = transformers.EncoderDecoderCache(filled("DynamicCache"), transformers.DynamicCache(config=model.config))
    for cache in (bare, transformers.DynamicCache(layers), tuple(layers), both):
        with pytest.raises(ValueError, match=r"without .*memory: build it from the model's own config"):
            model(new, past_key_values=cache)


def test_prompts_that_end_in_padding_are_refused():
    model, ids = wrapped(FULL), ids_of(2, 5)
    mask = torch.ones_like(ids)
    mask[1, 3:] = 0
    with pytest.raises(ValueError, match=r"row 1 ends in padding: pad prompts on the left"):
        made(model, ids, attention_mask=mask)
    left = mask.flip(1)
    assert made(model, ids.flip(1), attention_mask=left, prefill_chunk_size=2).equal(
        made(model, ids.flip(1), attention_mask=left, use_cache=False)
    )


def test_tokens_that_are_none_are_named():
    model, ids = wrapped(FULL), ids_of(2, 5)
    for training in (True, False):
        model.train(training)
        for wrong in (ids + 50, ids - 30, ids * 0 - 100):
            with pytest.raises(ValueError, match=r"token -?\d+ is outside the vocabulary of 19"):
                model(wrong)
        with pytest.raises(ValueError, match="at least 1 token"):
            model(ids[:, :0])


def test_continuous_batching_is_refused():
    model = wrapped(FULL)
    with pytest.raises((AttributeError, ValueError), match=r"continuous batching|Invalid layer type"):
        model.generate_batch([[1, 2, 3]], generation_config=transformers.GenerationConfig(max_new_tokens=2))


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ({"prefill": "fast"}, "prefill is 'fast'; choose one of sweeps, exact, zero_memory"),
        ({"prefill_mode": "quick"}, "prefill mode 'quick' is unknown"),
        ({"prefill_tolerance": -1.0}, "tolerance -1.0"),
        ({"prefill_tolerance": float("nan")}, "tolerance nan"),
        ({"schedule": "settledd-2"}, "unknown schedule 'settledd-2'"),
    ],
)
def test_an_option_that_is_none_is_refused_whichever_way_it_comes(option, words, tmp_path):
    """`from_pretrained` sets options after a configuration was made: a wrong mode was taken for sweeps."""
    model = wrapped(FULL)
    model.save_pretrained(tmp_path)
    ways = [
        lambda: type(model.config)(**option),
        lambda: type(model).from_pretrained(tmp_path, **option),
        lambda: [setattr(model.config, name, value) for name, value in option.items()],
        lambda: model.config.update(option),
    ]
    for way in ways:
        with pytest.raises(ValueError, match=words):
            way()


@pytest.mark.filterwarnings("ignore")  # the tracers' own
def test_whole_sequences_are_no_exported_program():
    """A trace would hold the sweeps that one text took."""
    model, ids = wrapped(FULL), ids_of(1, 5)
    with torch.no_grad(), pytest.raises(ValueError, match="export one step on a cache"):
        torch.export.export(model, (ids,), strict=False)
    with torch.no_grad(), pytest.raises(ValueError, match="export one step on a cache"):
        torch.jit.trace(model, ids)
