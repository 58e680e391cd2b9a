"""Caches that go back: drafts of a model or of the text, tokens taken off again, prompts in chunks with holes."""

from __future__ import annotations

import pytest
import torch
from test_hf import FULL, SHARED, ids_of, made, wrapped

transformers = pytest.importorskip("transformers")


def llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=19, **sizes, **ends)).double().eval()


@pytest.mark.parametrize("prefill", ["exact", "sweeps", "zero_memory"])
def test_drafts_leave_a_text_as_it_is(prefill: str):
    """The main model decodes what it decodes alone, whoever drafts; an LRT may be either."""
    unpadded = {"prefill": prefill, "prefill_tolerance": 0.0, "pad_token_id": None}
    model, ids, other = wrapped(FULL, **unpadded), ids_of(1, 7), llama()
    alone, others_alone = made(model, ids), made(other, ids)
    assert made(other, ids, assistant_model=model).equal(others_alone)
    for drafts in (
        {"assistant_model": other},
        {"assistant_model": wrapped(SHARED, pad_token_id=None)},
        {"assistant_model": wrapped(FULL, pad_token_id=None)},  # drafts that are right
        {"prompt_lookup_num_tokens": 3},
    ):
        assert made(model, ids, **drafts).equal(alone), drafts
    torch.manual_seed(0)
    assert made(model, ids, do_sample=True, prompt_lookup_num_tokens=3).shape == (1, 10)


def test_early_blocks_draft_nothing():
    with pytest.raises(ValueError, match="assistant_early_exit: early blocks of an LRT write no memory"):
        made(wrapped(FULL), ids_of(1, 5), assistant_early_exit=1)


@pytest.mark.parametrize("prefill", ["exact", "sweeps", "zero_memory"])
@torch.no_grad()
def test_a_cache_that_records_goes_back_to_any_token(prefill: str):
    """Filled by several tokens and by one, padded on the left and inside."""
    model, ids = wrapped(FULL, prefill=prefill, prefill_tolerance=0.0), ids_of(3, 9)
    mask = torch.ones_like(ids)
    mask[0, :5], mask[1, :2], mask[1, 5], mask[2, 6] = 0, 0, 0, 0
    whole = model(ids, mask).logits
    cache = transformers.DynamicCache(config=model.config)
    cache.activate_past_recording()
    for start, stop in ((0, 4), (4, 6), (6, 7), (7, 9)):
        model(ids[:, start:stop], mask[:, :stop], past_key_values=cache)
    for removed in (1, 3, 7, 9):
        cache.crop(-removed)
        kept = cache.get_seq_length()
        again = model(ids[:, kept:], mask, past_key_values=cache).logits
        real = mask[:, kept:].bool()
        torch.testing.assert_close(again[real], whole[:, kept:][real], rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_only_what_was_recorded_can_be_taken_off():
    model, ids = wrapped(FULL), ids_of(1, 6)
    cache = model(ids[:, :4]).past_key_values
    cache.activate_past_recording()
    model(ids[:, 4:], past_key_values=cache)
    cache.crop(-2)
    again = model(ids[:, 4:], past_key_values=cache).logits
    torch.testing.assert_close(again, model(ids).logits[:, 4:], rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match=r"call its activate_past_recording\(\) before"):
        cache.crop(-3)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("size", [1, 2, 4, 6])
def test_chunks_may_end_in_padding(size: int, cache: str):
    """Of a prompt whose rows begin late, or have a hole: a chunk of it is no prompt of its own."""
    model, ids = wrapped(FULL), ids_of(3, 9)
    mask = torch.ones_like(ids)
    mask[0, :5], mask[1, :2], mask[1, 5], mask[2, 3] = 0, 0, 0, 0
    expected = made(model, ids, attention_mask=mask, use_cache=False)
    chunks = {"prefill_chunk_size": size, "cache_implementation": cache}
    assert made(model, ids, attention_mask=mask, **chunks).equal(expected)
