"""Bits per byte: hand-computed cases, the modes of one model on the same rows, the live gap, the sweeps' residuals."""

from __future__ import annotations

import functools
import json
import math

import numpy as np
import pytest
import torch
from helpers import CORNERS, SCHEDULES, byte_bpe, config, fixed, label, outcome, packed, passes
from torch import Tensor

from lrt.data.shards import open_split, write_shards
from lrt.data.tokenizer import BPETokenizer, ByteTokenizer
from lrt.evaluation.bits_per_byte import (
    BPB,
    SWEEPS,
    HeldOut,
    Rows,
    ScoredText,
    bits_per_byte,
    by_position,
    evaluate,
    sweep_residuals,
    validation_rows,
)
from lrt.model.loss import token_nats
from lrt.model.lrt import LRT
from lrt.schedule import Schedule

FULL, PLAIN = config(), CORNERS[-1]
LENGTH = 7


def rows_of(cfg, rows: int = 3, length: int = LENGTH) -> Rows:
    """Random rows; token v stands for v mod 4 bytes, and BOS for none."""
    tokens, targets = packed(cfg, rows, length), packed(cfg, rows, length, seed=1)
    return Rows(tokens, targets, tokens == 0, targets % 4)


def of(rows: Rows) -> HeldOut:
    return HeldOut(rows, ScoredText("a text", 0.25))


@functools.cache
def bpb(cfg, text: str, **options) -> BPB:
    return evaluate(fixed(cfg), Schedule.parse(text), of(rows_of(cfg)), **options)


def by_hand(model: LRT, text: str, rows: Rows) -> Tensor:
    """Per-token nats of a schedule's last writers."""
    hidden = outcome(model, rows.tokens, passes(text, LENGTH)).hidden
    return token_nats(model, hidden, rows.targets).detach()


# The figure itself.


def test_one_bit_per_byte():
    assert bits_per_byte(torch.full((3, 4), math.log(2)), torch.ones(3, 4, dtype=torch.int64)) == pytest.approx(1)


@pytest.mark.parametrize(
    ("nats", "sizes", "expected"),
    [
        ([math.log(2), math.log(4)], [1, 2], 1.0),  # 3 bits over 3 bytes
        ([math.log(256)], [4], 2.0),
        ([100.0, math.log(2)], [0, 1], 1.0),  # a special token counts neither way
        ([0.0, 0.0], [1, 5], 0.0),
        ([math.log(8), 7.0, math.log(2)], [1, 0, 3], 1.0),
    ],
)
def test_hand_computed(nats: list[float], sizes: list[int], expected: float):
    assert bits_per_byte(torch.tensor([nats]), torch.tensor([sizes])) == pytest.approx(expected)


def test_no_bytes_at_all_is_not_a_number():
    assert math.isnan(bits_per_byte(torch.ones(1, 2), torch.zeros(1, 2, dtype=torch.int64)))


@pytest.mark.parametrize("length", [1, 2, 3, 4, 7, 8, 9, 100])
def test_buckets_cover_every_position_once(length: int):
    """Buckets double; together, weighted by their bytes, they are the whole."""
    nats = torch.rand(3, length, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sizes = torch.randint(1, 5, (3, length), generator=torch.Generator().manual_seed(1))
    found, covered, total = by_position(nats, sizes), [], 0.0
    for name, value in found.items():
        low, high = (int(name.split("-")[i]) for i in (0, -1))
        covered += range(low, high + 1)
        total += value * int(sizes[:, low - 1 : high].sum())
        assert value == pytest.approx(bits_per_byte(nats[:, low - 1 : high], sizes[:, low - 1 : high]))
    assert covered == list(range(1, length + 1))
    assert total / int(sizes.sum()) == pytest.approx(bits_per_byte(nats, sizes))


def test_bucket_names():
    assert list(by_position(torch.ones(1, 9), torch.ones(1, 9).long())) == ["1", "2-3", "4-7", "8-9"]
    assert list(by_position(torch.ones(1, 8), torch.ones(1, 8).long())) == ["1", "2-3", "4-8"]


# One model in every mode.


@pytest.mark.parametrize("text", [*SCHEDULES, "settled-1..3"])
def test_merged_is_the_last_writer_and_zero_memory_the_first_pass(text: str):
    model, rows = fixed(FULL), rows_of(FULL)
    got = bpb(FULL, text)
    largest = str(Schedule.parse(text).at_largest())
    assert got.merged == pytest.approx(bits_per_byte(by_hand(model, largest, rows), rows.bytes), rel=1e-9)
    assert got.zero_memory == pytest.approx(bits_per_byte(by_hand(model, "parallel", rows), rows.bytes), rel=1e-9)
    assert got.decoded == pytest.approx(bits_per_byte(by_hand(model, "sequential", rows), rows.bytes), rel=1e-9)
    assert got.live_gap == got.decoded - got.merged
    assert (got.rows, got.schedule) == (3, largest)


def test_passes_are_scored_over_their_own_positions():
    model, rows = fixed(FULL), rows_of(FULL)
    first, even, odd = bpb(FULL, "interleaved-2").passes
    merged = by_hand(model, "interleaved-2", rows)
    assert first == pytest.approx(bpb(FULL, "interleaved-2").zero_memory)
    assert even == pytest.approx(bits_per_byte(merged[:, ::2], rows.bytes[:, ::2]))
    assert odd == pytest.approx(bits_per_byte(merged[:, 1::2], rows.bytes[:, 1::2]))
    assert len(bpb(FULL, "settled-3").passes) == 1  # sweeps that stop below the head have no score
    assert len(bpb(FULL, "refinement-2").passes) == 3


def test_batches_of_any_size_give_the_same():
    whole = bpb(FULL, "interleaved-2")
    for size in (1, 2):
        parts = bpb(FULL, "interleaved-2", batch=size)
        assert parts.merged == pytest.approx(whole.merged, rel=1e-12)
        assert parts.passes == pytest.approx(whole.passes, rel=1e-12)
        assert parts.residuals == pytest.approx(whole.residuals, rel=1e-9)
        assert parts.kl == pytest.approx(whole.kl, rel=1e-9)
        assert parts.by_position == pytest.approx(whole.by_position, rel=1e-12)


@pytest.mark.parametrize("text", SCHEDULES)
def test_a_plain_model_has_no_live_gap_and_no_residual(text: str):
    got = bpb(PLAIN, text)
    assert abs(got.live_gap) < 1e-12
    assert got.decoded == pytest.approx(got.zero_memory, rel=1e-12)
    assert got.residuals == got.kv_errors == got.argmax_agreement == got.kl == ()
    assert got.contraction == 0


@pytest.mark.parametrize("text", ["sequential", f"refinement-{LENGTH}", f"interleaved-{LENGTH}", f"settled-{LENGTH}"])
def test_exact_schedules_have_no_live_gap(text: str):
    assert abs(bpb(FULL, text).live_gap) < 1e-12
    assert abs(bpb(FULL, "parallel").live_gap) > 1e-4  # and others have


def test_the_live_gap_does_not_depend_on_the_bytes_of_bos():
    """A BOS among the targets has no bytes, so its score does not matter."""
    rows = rows_of(FULL)
    assert (rows.bytes[rows.targets == 0] == 0).all()
    assert (rows.targets == 0).any()
    other = rows._replace(targets=torch.where(rows.bytes == 0, 4, rows.targets))
    mine, yours = (evaluate(fixed(FULL), Schedule.parse("interleaved-2"), of(r)) for r in (rows, other))
    assert mine.merged == pytest.approx(yours.merged, rel=1e-12)
    assert mine.by_position == pytest.approx(yours.by_position, rel=1e-12)


@pytest.mark.parametrize("cfg", [FULL, config(source=3, projection="shared")], ids=label)
def test_residuals_fall_to_0_after_as_many_sweeps_as_positions(cfg):
    """Without a document start a sweep makes one more position exact; with one, chains are shorter."""
    model = fixed(cfg)
    ids = torch.randint(1, 19, (2, 6), generator=torch.Generator().manual_seed(0))
    found = sweep_residuals(model, ids, None)
    assert len(found) == SWEEPS
    assert all(x > 1e-6 for x in found[:5])
    assert all(x < 1e-12 for x in found[5:])
    reset = sweep_residuals(model, ids, torch.ones_like(ids, dtype=torch.bool))
    assert all(x < 1e-12 for x in reset)


def test_residual_is_the_largest_relative_change_of_any_position():
    model, ids = fixed(FULL), packed(FULL, 2, 6)
    once, twice = (outcome(model, ids, passes(text, 6)).source for text in ("refinement-1", "refinement-2"))
    expected = ((twice - once).norm(dim=-1) / twice.norm(dim=-1)).max().item()
    assert sweep_residuals(model, ids, model.starts(ids))[1] == pytest.approx(expected)


def test_evaluation_leaves_the_model_as_it_was():
    model = fixed(FULL)
    model.train()
    evaluate(model, Schedule.parse("parallel"), of(rows_of(FULL)))
    assert model.training
    assert all(p.grad is None for p in model.parameters())


def test_as_plain_data():
    got = bpb(FULL, "interleaved-2:weights=0/1")
    data = json.loads(json.dumps(got.as_dict()))
    assert data["live_gap"] == got.live_gap
    assert data["schedule"] == "interleaved-2:weights=0/1"
    assert set(data) == {
        "zero_memory", "passes", "merged", "decoded", "by_position", "residuals", "rows", "schedule", "live_gap",
        "contraction", "kv_errors", "argmax_agreement", "kl",
        "text", "share", "normalised",
    }  # fmt: skip
    assert (data["text"], data["share"], data["normalised"]) == ("a text", 0.25, False)


# Rows.


def test_validation_rows_are_fixed_and_know_their_bytes(tmp_path, monkeypatch):
    tokenizer = ByteTokenizer()
    folder = tmp_path / "shards"
    write_shards([f"document {i} é" for i in range(60)], tokenizer, folder, validation=0.5)
    stream = open_split(folder, "val")
    sizes = tokenizer.token_bytes()
    rows = validation_rows(stream, tokenizer, rows=4, length=16)
    again = validation_rows(stream, tokenizer, rows=4, length=16)
    assert all(torch.equal(a, b) for a, b in zip(rows, again, strict=True))
    assert rows.tokens.shape == (4, 16)
    assert torch.equal(rows.bytes, (rows.targets != tokenizer.bos).long())  # a byte each, BOS none
    assert torch.equal(rows.starts, rows.tokens == tokenizer.bos)
    assert torch.equal(rows.tokens[:, 1:], rows.targets[:, :-1])
    every = (len(stream) - 1) // 16
    assert len(validation_rows(stream, tokenizer, rows=10**6, length=16).tokens) == every
    monkeypatch.setattr(tokenizer, "token_bytes", lambda: np.where(sizes > 0, 3, 0))
    tripled = validation_rows(stream, tokenizer, rows=4, length=16)
    assert torch.equal(tripled.bytes, 3 * rows.bytes)


def test_a_space_that_a_tokenizer_puts_in_front_is_no_byte_of_a_document(tmp_path):
    tokenizer = BPETokenizer(byte_bpe(["one two"] * 9, "<s>", prefix=True), "<s>")
    assert tokenizer.space_in_front and tokenizer.decode_bytes(tokenizer.encode("one")) == b" one"
    write_shards(
        [" ".join(["one"] * (1 + i) + ["two"]) for i in range(60)], tokenizer, tmp_path / "shards", validation=0.5
    )
    stream = open_split(tmp_path / "shards", "val")
    rows = validation_rows(stream, tokenizer, rows=10**6, length=6)
    scored = stream.read(0, rows.tokens.numel() + 1)
    documents = np.split(scored, np.flatnonzero(scored == tokenizer.bos))
    assert len(documents) > 20 and int(rows.bytes.sum()) == sum(len(tokenizer.decode(doc)) for doc in documents)
