"""What other libraries read of a model: its head, which may be the embedding, its sizes, and whose code it is."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from helpers import config
from test_hf_training import FULL, close, ids_of, wrapped

from lrt.config.model import BackboneConfig

transformers = pytest.importorskip("transformers")
from lrt.integrations.hf import LRTConfig, LRTForCausalLM  # noqa: E402

TIED = config(backbone=BackboneConfig(tied=True))


@pytest.mark.parametrize("cfg", [FULL, TIED], ids=["apart", "tied"])
def test_the_head_can_be_read_from_outside(cfg, tmp_path):
    """TRL multiplies by its weight; a tied one was told as none, and no trainer of TRL ran."""
    model, ids = wrapped(cfg), ids_of(2, 5)
    hidden, head = model.model(ids).last_hidden_state, model.get_output_embeddings()
    capped = cfg.softcap * torch.tanh(torch.nn.functional.linear(hidden, head.weight, head.bias) / cfg.softcap)
    close(capped, model(ids).logits)
    capped.sum().backward()
    weight = head.weight if cfg is FULL else model.get_input_embeddings().weight
    assert weight.grad.abs().max() > 0
    names = set(model.state_dict())
    model.resize_token_embeddings(24)
    assert model(ids).logits.shape == (2, 5, 24) and set(model.state_dict()) == names
    model.save_pretrained(tmp_path)
    again = LRTForCausalLM.from_pretrained(tmp_path, dtype="float64").eval()
    close(again(ids).logits, model(ids).logits)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*")
def test_adapters_on_all_linear_modules_find_a_tied_head():
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    model, ids = peft.get_peft_model(wrapped(TIED), settings).double(), ids_of(2, 9)
    model(input_ids=ids, labels=ids).loss.backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert len(grads) > 30 and all(g is not None and g.abs().max() > 0 for g in grads)
    close(copy.deepcopy(model).merge_and_unload()(ids).logits, model(input_ids=ids).logits)


@pytest.mark.slow
def test_trl_reads_a_tied_head():
    utils = pytest.importorskip("trl.trainer.utils")
    model, ids = wrapped(TIED), ids_of(2, 9)
    log_p = model(ids).logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    utils.add_fused_lm_head(model)
    out = model(input_ids=ids, labels=ids, fused_lm_head=True)
    torch.testing.assert_close(out.log_probs, log_p, rtol=1e-5, atol=1e-5, check_dtype=False)


@pytest.mark.parametrize(
    "sizes",
    [
        {"hidden_size": 8}, {"num_hidden_layers": 1}, {"num_key_value_heads": 1}, {"head_dim": 99},
        {"final_logit_softcapping": 3.0},
    ],
    ids=str,
)  # fmt: skip
def test_sizes_that_are_not_the_models_are_refused(sizes: dict, tmp_path):
    """They were taken and changed nothing, or failed far from their cause."""
    wrapped(FULL).save_pretrained(tmp_path)
    (name,) = sizes
    with pytest.raises(ValueError, match=f"{name} is"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path, **sizes)
    with pytest.raises(ValueError, match=f"{name} is"):
        LRTConfig(lrt=wrapped(FULL).config.lrt, **sizes)
    assert transformers.AutoConfig.from_pretrained(tmp_path, max_position_embeddings=8).max_position_embeddings == 8


def test_a_vocabulary_and_a_tied_head_are_followed(tmp_path):
    """As other models do it: a new model has them, and weights of another size are refused by the library."""
    settings = LRTConfig(lrt=wrapped(FULL).config.lrt, vocab_size=30, tie_word_embeddings=True)
    fresh = LRTForCausalLM(settings)
    assert fresh.get_input_embeddings().weight.shape[0] == 30 and fresh.model.core.head is None
    settings.vocab_size = 40
    assert LRTForCausalLM(settings)(ids_of(1, 4)).logits.shape == (1, 4, 40)
    wrapped(FULL).save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="mismatch"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path, vocab_size=10)


def test_a_model_that_was_never_exported_names_no_code(tmp_path):
    """TRL's DPO asks for it where it loads its reference, and failed."""
    wrapped(FULL).save_pretrained(tmp_path)
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())
    assert transformers.AutoConfig.from_pretrained(tmp_path).auto_map == {}
