"""The state of decoding: rows wait, fork, join; what is stored comes back bit for bit, and what lies is refused."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from helpers import BOTH, SHIFT, close, config, randomised, tokens, truth
from safetensors.torch import save_file

from lrt.config.decoding import PrefillOptions
from lrt.inference.prefill import decode_step, prefill
from lrt.model.kv_cache import DIGEST, KVCache, positions_held, visible_slots
from lrt.model.lrt import LRT
from lrt.utils.tensor_files import read_tensors, tensors_hash

CFG = config()


@pytest.fixture(scope="module")
def model() -> LRT:
    return randomised(CFG)


def test_waiting_rows_keep_their_state_even_when_full(model):
    rows = tokens(CFG, 2, 12)
    cache = prefill(model, rows[:, :6], lengths=torch.tensor([6, 3]), capacity=6, mode="exact").cache
    active = torch.tensor([False, True])
    for t in (3, 4, 5):
        logits, cache = decode_step(model, rows[:, t], cache, active)
    expected = truth(model, rows)
    close(logits[1], expected[1, 5])
    assert cache.length.tolist() == [6, 6]
    wider = KVCache.empty(model, 2, 6).put(torch.tensor([1, 0]), cache)
    assert wider.length.tolist() == [6, 6]
    with pytest.raises(ValueError, match="capacity is 6 tokens"):
        decode_step(model, rows[:, 6], cache)


@pytest.mark.parametrize("cfg", [CFG, SHIFT, BOTH], ids=["memory", "shift", "both"])
def test_fork_join_save_and_restore(cfg, tmp_path):
    model, rows = randomised(cfg), tokens(cfg, 2, 20)
    expected = truth(model, rows)
    cache = prefill(model, rows[:, :9], capacity=20, mode="exact").cache
    forked = cache.take(torch.tensor([1, 0, 1]))
    cache.save(tmp_path / "state.safetensors")
    for t in range(9, 12):
        _, cache = decode_step(model, rows[:, t], cache)
    joined = cache.put(torch.tensor([0]), forked.take(torch.tensor([1])))  # row 0 goes back to position 9
    logits, _ = decode_step(model, torch.stack((rows[0, 9], rows[1, 12])), joined)
    close(logits, torch.stack((expected[0, 9], expected[1, 12])))
    restored = KVCache.load(tmp_path / "state.safetensors")
    assert restored.capacity == 20
    for kept in (restored, forked.take(torch.tensor([1, 0]))):
        close(prefill(model, rows[:, 9:], cache=kept, mode="exact").logits, expected[:, -1])


def test_a_row_that_joins_is_seen_to_its_end(model):
    """Beyond the slots that an empty state looks at."""
    state = KVCache.empty(model, 1, 200)
    for x in (*state.keys, *state.values, state.memory):
        x.normal_()
    state = state._replace(length=state.length + 150, longest=150)
    joined = KVCache.empty(model, 2, 200).put(torch.tensor([1]), state)
    newest = tokens(CFG, 1, 1)[:, 0]
    alone, _ = decode_step(model, newest, state)
    beside, _ = decode_step(model, newest.expand(2), joined)
    close(beside[1], alone[0])


@pytest.mark.parametrize("cfg", [CFG, SHIFT, BOTH], ids=["memory", "shift", "both"])
def test_a_cleared_row_is_an_empty_one(cfg):
    model, rows = randomised(replace(cfg, bos=None)), tokens(cfg, 2, 12)
    cache = prefill(model, rows[:, :9], capacity=20, mode="exact").cache.clear(1)
    for cleared, empty in zip(cache.per_row(), KVCache.empty(model, 2, 20).per_row(), strict=True):
        assert torch.equal(cleared[1], empty[1])
    first, _ = decode_step(model, rows[:, 9], cache)
    close(first[1], truth(model, rows[1:, 9:])[0, 0])


@pytest.mark.parametrize(
    ("about", "spoilt"),
    [
        ({"slots": "[" * 10_000}, {}), ({"slots": "[1e9]"}, {}), ({"slots": "[99999999999]"}, {}),
        ({"slots": "{}"}, {}), ({"slots": "[]"}, {}), ({}, {"length": torch.tensor([9, 99])}),
        ({"longest": "-1"}, {}), ({"longest": "2"}, {}), ({"longest": "NaN"}, {}), ({}, {"length": torch.tensor(1.0)}),
        ({}, {"memory": torch.zeros(3)}), ({}, {"memory": torch.zeros(2, 24, dtype=torch.int64)}),
        ({}, {"document_start": torch.tensor([0, 99])}), ({}, {"memory": torch.zeros(2, 24, dtype=torch.float16)}),
        ({}, {"keys.0": torch.zeros(2, 2, 9)}), ({"capacity": "3"}, {}), ({"capacity": "1e9"}, {}),
        ({}, {"values.0": torch.zeros(2, 2, 9, 6, dtype=torch.int64)}), ({"slots": ""}, {}), ({"format": "x"}, {}),
    ],
)  # fmt: skip
def test_states_that_lie_are_refused_in_one_line(about: dict, spoilt: dict, model, tmp_path):
    prefill(model, tokens(CFG, 2, 9)).cache.save(tmp_path / "state")
    stored = read_tensors(tmp_path / "state", "state")
    tensors, texts = stored.tensors | spoilt, {k: v for k, v in stored.about.items() if k != DIGEST} | about
    texts[DIGEST] = tensors_hash(tensors, texts)  # so that it is not the checksum that refuses
    save_file(tensors, tmp_path / "lies", texts)
    with pytest.raises(ValueError, match="lies") as error:
        KVCache.load(tmp_path / "lies")
    assert "\n" not in str(error.value) and len(str(error.value)) < 300
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="no regular file"):
        KVCache.load(tmp_path / "pipe")


def test_a_state_whose_numbers_were_changed_is_refused(model, tmp_path):
    prefill(model, tokens(CFG, 2, 9)).cache.save(tmp_path / "state")
    stored = read_tensors(tmp_path / "state", "state")
    save_file(stored.tensors | {"memory": stored.tensors["memory"] + 1e-9}, tmp_path / "changed", stored.about)
    with pytest.raises(ValueError, match="has changed since it was saved"):
        KVCache.load(tmp_path / "changed")


def test_a_restored_state_continues_bit_for_bit(model, tmp_path):
    rows = tokens(CFG, 2, 20)
    cache = prefill(model, rows[:, :9]).cache
    cache.save(tmp_path / "state")
    restored = KVCache.load(tmp_path / "state")
    assert torch.equal(decode_step(model, rows[:, 9], cache)[0], decode_step(model, rows[:, 9], restored)[0])


def test_windows_everywhere_bound_the_state_and_not_the_text(tmp_path):
    cfg = config(window_pattern="S", last_layer="S", window=4, source=3)
    model, row = randomised(cfg), tokens(cfg, 1, 60)
    whole = prefill(model, row, mode="exact", cache=KVCache.empty(model, 1, 60))
    assert all(x.shape[2] == 4 for x in (*whole.cache.keys, *whole.cache.values))
    begun = prefill(
        model, row[:, :37], mode=PrefillOptions.parse("jacobi", 0.0), cache=KVCache.empty(model, 1, 60)
    ).cache
    begun.save(tmp_path / "state")
    cache = KVCache.load(tmp_path / "state")
    for t in range(37, 60):
        logits, cache = decode_step(model, row[:, t], cache)
    assert (logits - whole.logits).abs().max() < 1e-10 and torch.equal(cache.length, whole.cache.length)
    with pytest.raises(ValueError, match="its capacity is 60 tokens"):
        decode_step(model, row[:, 0], cache)
    with pytest.raises(ValueError, match="capacity 60 cannot join one of 50"):
        KVCache.empty(model, 1, 50).put(torch.tensor([0]), cache)


def test_sliding_windows_keep_only_their_window(model):
    cache = KVCache.empty(model, 1, 50)
    assert [k.shape[2] for k in cache.keys] == [CFG.windows()[0], 51, 51]
    assert positions_held(torch.tensor([6]), 4).tolist() == [[4, 5, 2, 3]]
    assert [visible_slots(n) for n in (1, 128, 129, 192, 193, 400)] == [128, 128, 192, 192, 256, 512]
