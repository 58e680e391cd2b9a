"""Adapters: PEFT's defaults know the model, an adapter on the head acts, prompts are tuned through vectors."""

from __future__ import annotations

import copy

import pytest
import torch
from test_hf_training import FULL, NO_BOS, close, ids_of, wrapped

pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing.*", "ignore:Position ids are not supported.*"
)
LABELS = {"task_type": "CAUSAL_LM"}


def test_the_default_targets_of_every_method_exist():
    for settings in (peft.LoraConfig, peft.IA3Config, peft.LoHaConfig, peft.OFTConfig, peft.AdaLoraConfig):
        options = {"total_step": 9} if settings is peft.AdaLoraConfig else {}
        options |= {"oft_block_size": 0, "r": 1} if settings is peft.OFTConfig else {}
        model = peft.get_peft_model(wrapped(NO_BOS), settings(**LABELS, **options)).double().train()
        model(input_ids=ids_of(2, 9), labels=ids_of(2, 9)).loss.backward()
        grads = [p.grad for p in model.parameters() if p.requires_grad and p.grad is not None]
        assert sum(int(g.abs().max() > 0) for g in grads) >= 3, settings


@pytest.mark.parametrize("training", [True, False])
def test_an_adapter_on_the_head_acts(training: bool):
    torch.manual_seed(0)
    base = wrapped(FULL, schedule="interleaved-2")
    adapted = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=4, target_modules=["head"], **LABELS))
    adapted = adapted.double().train(training)
    ids = ids_of(2, 9)
    close(adapted(input_ids=ids, labels=ids).loss, base.train(training)(ids, labels=ids).loss)
    for name, p in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p)
    base.model.steps = adapted.base_model.model.model.steps = 0
    out = adapted(input_ids=ids, labels=ids)
    out.loss.backward()
    grads = [p.grad for p in adapted.parameters() if p.requires_grad]
    assert grads and all(g.abs().max() > 0 for g in grads)
    base.get_output_embeddings().weight.data += adapted.base_model.model.model.core.head.get_delta_weight("default")
    expected = base(ids, labels=ids)
    close(out.loss, expected.loss)
    close(out.logits, expected.logits)


@pytest.mark.parametrize("saved", [["head"], ["head", "embedding"]])
def test_modules_that_are_trained_whole_are_used(saved: list[str]):
    settings = peft.LoraConfig(r=4, target_modules=["query"], modules_to_save=saved, **LABELS)
    model, ids = peft.get_peft_model(wrapped(NO_BOS), settings).double().train(), ids_of(2, 9)
    model(input_ids=ids, labels=ids).loss.backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad and "modules_to_save" in name}
    assert len(trained) == len(saved) and all(p.grad.abs().max() > 0 for p in trained.values())


def test_a_prompt_is_tuned():
    model = peft.get_peft_model(wrapped(FULL), peft.PromptTuningConfig(num_virtual_tokens=3, **LABELS)).double().train()
    ids = ids_of(2, 9)
    losses, optimizer = [], torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(15):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    assert model.eval().generate(input_ids=ids, max_new_tokens=3, do_sample=False).shape == (2, 12)
