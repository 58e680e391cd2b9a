"""Gradients and losses of the transformers classes: every forward's, for every schedule, however rows are laid out."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import config, outcome, randomised
from torch import Tensor

from lrt.config.model import ModelConfig
from lrt.config.run import to_dict
from lrt.model.loss import IGNORE, ScheduledLoss
from lrt.schedule import Schedule

transformers = pytest.importorskip("transformers")
from lrt.integrations.hf import LRTConfig, LRTForCausalLM, LRTModel, objective  # noqa: E402
from lrt.integrations.hf import model as hf_model  # noqa: E402

FULL = config()
NO_BOS = config(projection="shared", source=3, bos=None, window_pattern="L", value_embeddings="none")
SHIFT = config(source=3, shift=True)
models = pytest.mark.parametrize("cfg", [FULL, NO_BOS, SHIFT], ids=["layerwise", "shared", "shift"])
SCHEDULES = [
    "parallel", "settled-2", "interleaved-2", "interleaved-4:weights=1/2/3", "chunked-8", "chunked-8:weights=0/1",
    "refinement-2:weights=0/1/2", "sequential", "hop-1",
]  # fmt: skip
schedules = pytest.mark.parametrize("schedule", SCHEDULES)
PREFILLS = ("exact", "sweeps", "zero_memory")


def wrapped(cfg: ModelConfig, kind=LRTForCausalLM, **options):
    """A float64 model with every parameter drawn; exact prefill unless `options` say otherwise."""
    model = kind(LRTConfig(lrt=to_dict(cfg), **{"prefill": "exact", "pad_token_id": 1} | options)).double().eval()
    model.inner.load_state_dict(randomised(cfg).state_dict())
    return model


def ids_of(rows: int, length: int, seed: int = 0) -> Tensor:
    ids = torch.randint(0, 19, (rows, length), generator=torch.Generator().manual_seed(seed))
    ids[:, 0] = ids[:, 0].clamp(min=1)
    return ids


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


# Every forward carries a gradient.


@models
@pytest.mark.parametrize("kind", [LRTModel, LRTForCausalLM])
@pytest.mark.parametrize("training", [True, False])
def test_no_forward_hands_out_a_tensor_without_gradient(cfg: ModelConfig, kind: type, training: bool):
    for prefill in PREFILLS:
        model = wrapped(cfg, kind, prefill=prefill, schedule="interleaved-2").train(training)
        for labels in (False, True) if kind is LRTForCausalLM else (False,):
            model.zero_grad()
            ids = ids_of(2, 9)
            out = model(ids, labels=ids if labels else None)
            result = out.loss if labels else out[0]
            assert all(x.requires_grad for x in out.values() if isinstance(x, Tensor))
            (result * torch.randn(result.shape, dtype=result.dtype)).sum().backward()
            memory = set(model.inner.memory_parameters())
            unread = memory if not training and prefill == "zero_memory" else set()
            head = set() if kind is LRTForCausalLM else {model.inner.head.weight}
            for name, p in model.named_parameters():
                if p not in head and not (p in unread and "shift" not in name):
                    assert p.grad is not None and p.grad.abs().max() > 0, (name, prefill, labels)


@models
@schedules
def test_in_train_mode_logits_are_those_of_the_last_writers(cfg: ModelConfig, schedule: str):
    model, ids = wrapped(cfg, schedule=schedule).train(), ids_of(3, 17)
    passes = Schedule.parse(schedule).passes(17)
    expected = model.inner.logits(outcome(model.inner, ids, passes).hidden)
    out = model(ids)
    close(out.logits.detach(), expected.detach())
    with torch.no_grad():  # what a gradient is compared with, such as old log-probabilities, is computed alike
        assert torch.equal(model(ids).logits, out.logits)
        assert model.steps == 1


@models
@pytest.mark.parametrize("prefill", PREFILLS)
def test_in_eval_mode_gradients_change_no_value(cfg: ModelConfig, prefill: str):
    model, ids = wrapped(cfg, prefill=prefill, prefill_tolerance=1e-13), ids_of(3, 9)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    for given in (None, mask):
        with torch.no_grad():
            expected = model(ids, given).logits
        got = model(ids, given)
        seen = mask.bool() if given is not None else torch.ones_like(mask).bool()
        torch.testing.assert_close(got.logits[seen], expected[seen], rtol=1e-7, atol=1e-8)


def test_a_cache_carries_the_gradient_of_the_recurrence():
    model, ids = wrapped(FULL), ids_of(2, 9)
    weights = torch.randn(2, 9, 19, dtype=torch.float64)
    grads = []
    for cuts in ([9], [4, 1, 1, 3], [1] * 9):
        model.zero_grad()
        cache, logits = transformers.DynamicCache(config=model.config), []
        for part in ids.split(cuts, dim=1):
            logits.append(model(part, past_key_values=cache).logits)
        (torch.cat(logits, dim=1) * weights).sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for other in grads[1:]:
        for a, b in zip(grads[0], other, strict=True):
            close(b, a)


def test_a_static_cache_holds_values_without_gradient():
    model, ids = wrapped(FULL), ids_of(2, 6)
    with torch.no_grad():
        expected = model(ids).logits
    cache = transformers.StaticCache(config=model.config, max_cache_len=8)
    logits = torch.cat([model(part, past_key_values=cache).logits for part in ids.split([4, 1, 1], dim=1)], dim=1)
    close(logits.detach(), expected)
    assert not any(layer.keys.requires_grad for layer in cache.layers)
    logits.sum().backward()
    assert all(p.grad.abs().max() > 0 for p in model.parameters())


# One definition of the loss.


def laid_out(ids: Tensor, lengths: list[int], side: str) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of these lengths, padded on a side: tokens, mask and labels."""
    longest = max(lengths)
    padded, mask = torch.full((len(lengths), longest), 1), torch.zeros(len(lengths), longest, dtype=torch.int64)
    for i, n in enumerate(lengths):
        at = slice(longest - n, None) if side == "left" else slice(n)
        padded[i, at], mask[i, at] = ids[i, :n], 1
    return padded, mask, padded.masked_fill(mask == 0, IGNORE)


@models
@schedules
def test_the_loss_knows_neither_padding_nor_micro_batches(cfg: ModelConfig, schedule: str):
    lengths = [5, 12, 2] if schedule == "sequential" else [5, 40, 13, 2, 60]
    model, ids = wrapped(cfg, schedule=schedule).train(), ids_of(5, 60)
    items = sum(lengths) - len(lengths)
    right, mask, labels = laid_out(ids, lengths, "right")
    whole = model(right, mask, labels=labels).loss
    close(model(right, mask, labels=labels, num_items_in_batch=torch.tensor(items)).loss, whole)
    left, left_mask, left_labels = laid_out(ids, lengths, "left")
    close(model(left, left_mask, labels=left_labels).loss, whole)
    wide = torch.nn.functional.pad(right, (3, 7), value=2), torch.nn.functional.pad(mask, (3, 7))
    close(model(*wide, labels=torch.nn.functional.pad(labels, (3, 7), value=IGNORE)).loss, whole)
    alone = [ids[i : i + 1, :n] for i, n in enumerate(lengths)]
    close(sum(model(row, labels=row, num_items_in_batch=items).loss for row in alone), whole)
    packed = torch.cat(alone, dim=1)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    close(model(packed, position_ids=positions, labels=packed).loss, whole)
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE)
    close(model(right, mask, shift_labels=shifted).loss, whole)


@schedules
def test_of_full_rows_it_is_the_cores(schedule: str):
    model, ids = wrapped(FULL, schedule=schedule).train(), ids_of(3, 17)
    by_hand = ScheduledLoss(model.inner, Schedule.parse(schedule))(ids[:, :-1], ids[:, 1:])
    if schedule != "chunked-8:weights=0/1":  # there a weight is relative to the last, so that rows may differ in length
        close(model(ids, labels=ids).loss, by_hand.loss)
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_in_eval_mode_too():
    model, lengths = wrapped(FULL), [5, 9, 2]
    ids = ids_of(3, 9)
    right, mask, labels = laid_out(ids, lengths, "right")
    whole = model(right, mask, labels=labels).loss
    left, left_mask, left_labels = laid_out(ids, lengths, "left")
    close(model(left, left_mask, labels=left_labels).loss, whole)
    rows = [ids[i : i + 1, :n] for i, n in enumerate(lengths)]
    close(sum(model(row, labels=row, num_items_in_batch=13).loss for row in rows), whole)


@pytest.mark.parametrize("kind", [LRTForCausalLM, LRTModel])
@pytest.mark.parametrize(("schedule", "several"), [("interleaved-2", True), ("settled-2", False), ("parallel", False)])
def test_a_result_that_lacks_passes_with_loss_says_so(kind: type, schedule: str, several: bool, monkeypatch):
    """DPO and losses of one's own are of logits, which are of the last pass alone; a loss by labels is of all."""
    said: list[str] = []
    monkeypatch.setattr(hf_model.logger, "warning_once", said.append)
    model, ids = wrapped(FULL, kind, schedule=schedule).train(), ids_of(2, 9)
    if kind is LRTForCausalLM:
        model(ids, labels=ids)
    with torch.no_grad():
        model(ids)
    assert not said
    model(ids)
    assert len(said) == several and all("lacks the schedule's other passes" in line for line in said)


def test_the_trainers_count_of_rows_padded_on_the_left_is_read_as_their_targets(monkeypatch):
    """It counts their first tokens, which nothing predicts; of one batch that is seen, of several it is said."""
    warnings: list[str] = []
    monkeypatch.setattr(objective.logger, "warning_once", warnings.append)
    model, lengths = wrapped(FULL, schedule="interleaved-2").train(), [5, 9, 2, 7]
    left, mask, labels = laid_out(ids_of(4, 9), lengths, "left")
    labels[1, :2] = IGNORE  # as where a prompt is not learned
    counted = labels[:, 1:].ne(IGNORE).sum()
    alone = model(left, mask, labels=labels).loss
    close(model(left, mask, labels=labels, num_items_in_batch=counted).loss, alone)
    assert not warnings
    targets = sum(lengths) - len(lengths) - 1
    assert int(counted) == targets + 3
    close(model(left, mask, labels=labels, num_items_in_batch=2 * counted).loss, alone * targets / (2 * counted))
    assert len(warnings) == 1 and "padding_side = 'right'" in warnings[0]


def test_smoothed_labels_are_those_of_the_next_tokens(tmp_path):
    """The Trainer shifts labels itself then, for classes that it knows as language models."""
    model, ids = wrapped(FULL, schedule="settled-2").train(), ids_of(3, 9)
    settings = transformers.TrainingArguments(str(tmp_path), label_smoothing_factor=0.1, use_cpu=True, report_to=[])
    loss = transformers.Trainer(model, settings).compute_loss(model, {"input_ids": ids, "labels": ids})
    log_p = model(ids).logits[:, :-1].log_softmax(-1)
    expected = -0.9 * log_p.gather(2, ids[:, 1:, None]).mean() - 0.1 * log_p.mean()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-7)  # the library adds in float32
    loss.backward()
    assert all(p.grad.abs().max() > 0 for p in model.parameters())


# Packed rows.


@models
@pytest.mark.parametrize("training", [True, False])
def test_a_packed_row_is_its_documents_alone(cfg: ModelConfig, training: bool):
    model, lengths = wrapped(cfg, schedule="interleaved-2").train(training), [4, 1, 7, 3]
    ids = ids_of(1, 15)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    alone = torch.cat([model(part).logits for part in ids.split(lengths, dim=1)], dim=1)
    close(model(ids, position_ids=positions).logits, alone)
    two = torch.cat((ids, ids.flip(1)))
    backward = torch.cat([torch.arange(n) for n in reversed(lengths)])[None]
    both = model(two, position_ids=torch.cat((positions, backward))).logits
    close(both[:1], alone)
    if not training:
        cache = transformers.DynamicCache(config=model.config)
        with pytest.raises(ValueError, match=r"several documents have no cache"):
            model(ids, position_ids=positions, past_key_values=cache)
        with torch.no_grad():
            assert model(ids, position_ids=positions).past_key_values is None


def test_a_flattening_collator_is_understood():
    model = wrapped(NO_BOS, schedule="settled-1").train()
    rows = [{"input_ids": ids_of(1, n, n)[0].tolist()} for n in (6, 3, 9)]
    batch = transformers.DataCollatorWithFlattening(return_tensors="pt")(rows)
    alone = [torch.tensor([row["input_ids"]]) for row in rows]
    parts = [model(row, labels=row, num_items_in_batch=15).loss for row in alone]
    close(model(**batch).loss, sum(parts))
    told = transformers.DataCollatorWithFlattening(
        return_tensors="pt", return_position_ids=False, return_flash_attn_kwargs=True
    )
    with pytest.raises(ValueError, match=r"cu_seq_lens_q.*reads from position_ids"):
        model(**told(rows))


@pytest.mark.parametrize("training", [True, False])
def test_what_a_loss_cannot_be_of_is_refused(training: bool):
    model, ids = wrapped(FULL, schedule="interleaved-2").train(training), ids_of(3, 9)
    masks = {"7 columns for 9": ids.new_ones(3, 7), "1 rows for 3": ids.new_ones(1, 9), r"holds \[2\]": ids * 0 + 2}
    masks[r"holds \[-inf\]"] = torch.zeros(3, 9).masked_fill(ids == 3, -torch.inf)
    for words, mask in masks.items():
        with pytest.raises(ValueError, match=words):
            model(ids, mask)
    for labels in (ids[:, 1:], torch.cat((ids, ids), dim=1), ids[:1], ids[0], ids[..., None]):
        for name in ("labels", "shift_labels"):
            with pytest.raises(ValueError, match=r"labels of shape .* for tokens of \[3, 9\]"):
                model(ids, **{name: labels})
    with pytest.raises(ValueError, match="labels are torch.float64"):
        model(ids, labels=ids.double())
    for items in (0, -3, math.nan, torch.tensor(0), torch.tensor([24, 24])):
        with pytest.raises(ValueError, match="num_items_in_batch"):
            model(ids, labels=ids, num_items_in_batch=items)
    model.model.steps = 0
    expected = model(ids, labels=ids).loss
    for same in ({}, {"num_items_in_batch": torch.tensor([24])}, {"num_items_in_batch": 24.0}):
        model.model.steps = 0
        close(model(ids, ids.new_ones(3, 9).bool(), labels=ids.short(), **same).loss, expected)
    assert model(ids, labels=ids * 0 - 100, num_items_in_batch=0).loss == 0


# Vectors in place of tokens.


@models
@pytest.mark.parametrize("training", [True, False])
def test_embedded_tokens_are_the_tokens(cfg: ModelConfig, training: bool):
    model, ids = wrapped(cfg, schedule="interleaved-2").train(training), ids_of(2, 9)
    vectors = model.get_input_embeddings()(ids).detach()
    expected = model(ids, labels=ids)
    got = model(inputs_embeds=vectors, labels=ids)
    assert torch.equal(got.logits, expected.logits) and torch.equal(got.loss, expected.loss)
    assert not model.inner.embedding._forward_hooks and not model.inner.embedding._forward_pre_hooks


@models
def test_vectors_that_are_no_tokens_are_read_and_learn(cfg: ModelConfig):
    model, ids = wrapped(cfg), ids_of(2, 6)
    prompt = torch.randn(3, 24, dtype=torch.float64, requires_grad=True)
    vectors = torch.cat((prompt.expand(2, 3, 24), model.get_input_embeddings()(ids)), dim=1)
    logits = model(inputs_embeds=vectors).logits
    logits[:, -1].sum().backward()
    assert (prompt.grad.abs().amax(1) > 0).all()
    model.zero_grad()
    out = model.generate(inputs_embeds=vectors.detach(), max_new_tokens=4, do_sample=False)
    with torch.no_grad():
        follow = vectors
        for token in out.T:
            assert torch.equal(model(inputs_embeds=follow).logits[:, -1].argmax(1), token)
            follow = torch.cat((follow, model.get_input_embeddings()(token)[:, None]), dim=1)


# States.


@models
@pytest.mark.parametrize("training", [True, False])
def test_hidden_states_and_attentions_are_those_of_the_result(cfg: ModelConfig, training: bool):
    for schedule, prefill in (("settled-1", "exact"), ("interleaved-2", "sweeps"), ("chunked-4", "zero_memory")):
        model = wrapped(cfg, schedule=schedule, prefill=prefill, prefill_tolerance=1e-13).train(training)
        ids, mask = ids_of(2, 9), torch.ones(2, 9, dtype=torch.int64)
        mask[0, :3] = 0
        with torch.no_grad():
            plain = model(ids, mask).logits
            model.steps = 0
            out = model(ids, mask, output_hidden_states=True, output_attentions=True)
            alone = model(ids[:1, 3:], output_hidden_states=True, output_attentions=True)
        torch.testing.assert_close(out.logits[mask.bool()], plain[mask.bool()], rtol=1e-7, atol=1e-8)
        assert (len(out.hidden_states), len(out.attentions)) == (4, 3)
        for mine, single in zip(out.hidden_states, alone.hidden_states, strict=True):
            torch.testing.assert_close(mine[0, 3:], single[0], rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(model.inner.logits(out.hidden_states[-1]), out.logits)
        for mine, single in zip(out.attentions, alone.attentions, strict=True):
            assert mine.shape == (2, 4, 9, 9)
            torch.testing.assert_close(mine[0, :, 3:, 3:], single[0], rtol=1e-6, atol=1e-7)
            torch.testing.assert_close(mine[1].sum(-1), torch.ones(4, 9, dtype=torch.float64))
            assert mine[1].triu(1).abs().max() == 0


def test_attentions_after_a_cache_stand_in_its_columns():
    model, ids = wrapped(FULL), ids_of(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with torch.no_grad():
        whole = model(ids, mask, output_attentions=True).attentions
        cache, parts = transformers.DynamicCache(config=model.config), []
        for start, stop in ((0, 5), (5, 8), (8, 9)):
            out = model(ids[:, start:stop], mask[:, :stop], past_key_values=cache, output_attentions=True)
            parts.append(out.attentions)
    for layer, pieces in zip(whole, zip(*parts, strict=True), strict=True):
        wide = [torch.nn.functional.pad(piece, (0, 9 - piece.shape[-1])) for piece in pieces]
        got = torch.cat(wide, dim=2)
        close(got[0, :, 3:], layer[0, :, 3:])
        close(got[1], layer[1])


def test_the_configuration_asks_for_states_too():
    model = wrapped(FULL)
    model.config.output_hidden_states = True
    assert len(model(ids_of(1, 4)).hidden_states) == 4


# Embeddings that change.


def test_a_vocabulary_grows_with_its_value_embeddings():
    model, ids = wrapped(FULL), ids_of(2, 6)
    before = model(ids).logits.detach()
    model.resize_token_embeddings(24)
    close(model(ids).logits[..., :19].detach(), before)
    assert model.config.vocab_size == model.config.model_config().vocab_size == model.inner.config.vocab_size == 24
    model(torch.full((1, 3), 23)).logits.sum().backward()
    assert LRTConfig.from_dict(model.config.to_dict()).vocab_size == 24
    table = torch.nn.Embedding(24, 24).double()
    model.set_input_embeddings(table)
    assert model.get_input_embeddings() is table
