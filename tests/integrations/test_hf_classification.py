"""Scores of whole rows: what reward models and classifiers are made of."""

from __future__ import annotations

import pytest
import torch
from helpers import config
from test_hf_training import FULL, SHIFT, close, ids_of, wrapped

transformers = pytest.importorskip("transformers")
from lrt.integrations.hf import LRTForSequenceClassification, LRTModel  # noqa: E402


@pytest.mark.parametrize("cfg", [FULL, SHIFT], ids=["layerwise", "shift"])
@pytest.mark.parametrize("training", [True, False])
def test_a_row_is_scored_by_its_last_token_on_either_side_of_padding(cfg, training: bool):
    options = {"prefill": "exact", "schedule": "interleaved-2", "num_labels": 3}
    model = wrapped(cfg, LRTForSequenceClassification, **options).train(training)
    ids, columns = ids_of(2, 7).clamp(min=2), torch.arange(7)
    rows = [ids[:1], ids[1:, :4]]
    alone = torch.cat([model(row).logits for row in rows])
    states = [wrapped(cfg, LRTModel, **options).train(training)(row).last_hidden_state[:, -1] for row in rows]
    close(alone, model.score(torch.cat(states)))
    right = torch.where((columns < 4) | (torch.arange(2) == 0)[:, None], ids, 1)  # 1 is the token of padding
    left = torch.stack((ids[0], torch.cat((torch.ones(3, dtype=torch.int64), ids[1, :4]))))
    for padded in (right, left):
        close(model(padded, (padded != 1).long()).logits, alone)
    loss = model(right, (right != 1).long(), labels=torch.tensor([2, 0])).loss
    close(loss, torch.nn.functional.cross_entropy(alone, torch.tensor([2, 0])))
    loss.backward()
    unread = {model.inner.head.weight} if model.inner.head is not None else set()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in set(model.parameters()) - unread)


def test_a_language_model_becomes_one_and_is_kept(tmp_path):
    language, ids = wrapped(FULL), ids_of(2, 7)
    language.save_pretrained(tmp_path / "language")
    auto = transformers.AutoModelForSequenceClassification
    fresh = auto.from_pretrained(tmp_path / "language", num_labels=2)
    assert isinstance(fresh, LRTForSequenceClassification)
    assert 0 < fresh.score.weight.std() < 1 and fresh.score.weight.isfinite().all()
    before, after = language.inner.state_dict(), fresh.inner.state_dict()
    assert all(torch.equal(x.float(), after[name].float()) for name, x in before.items())
    fresh.save_pretrained(tmp_path / "scores")
    again = auto.from_pretrained(tmp_path / "scores")
    assert torch.equal(again(ids).logits, fresh(ids).logits)


def test_an_end_that_opens_another_document_is_no_score_of_this_one():
    """Where documents are apart it sees nothing of its row: all rows had one score, and nothing was learned."""
    model = wrapped(config(document_attention=True, window_pattern="L"), LRTForSequenceClassification, num_labels=1)
    ids, columns = ids_of(2, 7).clamp(min=2), torch.arange(7)
    alone = torch.cat([model(row).logits for row in (ids[:1], ids[1:, :4])])
    length = torch.tensor([[7], [4]])
    closed = torch.nn.functional.pad(torch.where(columns < length, ids, 1), (0, 1), value=1)
    closed[torch.arange(2), length[:, 0]] = 0
    close(model(closed, (closed != 1).long()).logits, alone)
    close(model(input_ids=closed).logits, alone)
    assert (alone[0] - alone[1]).abs() > 1e-3
