"""Adapters: PEFT's defaults know the model, an adapter on the head acts, prompts are tuned through vectors."""

from __future__ import annotations

import copy

import pytest
import torch
from test_hf_training import FULL, NO_BOS, close, ids_of, wrapped

pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing.*",
    "ignore:Position ids are not supported.*",
    "ignore:Sparse invariant checks.*",
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


KEPT = {
    "all-linear": lambda: peft.LoraConfig(r=4, target_modules="all-linear", **LABELS),
    "dora": lambda: peft.LoraConfig(r=4, use_dora=True, target_modules="all-linear", **LABELS),
    "ia3": lambda: peft.IA3Config(**LABELS),
    "embeddings": lambda: peft.LoraConfig(r=4, target_modules=["embedding", "value_embedding"], **LABELS),
    "tokens": lambda: peft.LoraConfig(r=4, trainable_token_indices=[3, 4], **LABELS),
    "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=3, **LABELS),
    "p-tuning": lambda: peft.PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=8, **LABELS),
}

SOME = {"target_modules": ["query", "value"]} | LABELS
MORE = {
    "one block": lambda: peft.LoraConfig(r=4, layers_to_transform=[1], **SOME),
    "loha": lambda: peft.LoHaConfig(r=4, **SOME),
    "lokr": lambda: peft.LoKrConfig(r=4, **SOME),
    "vera": lambda: peft.VeraConfig(r=4, **SOME),
    "randlora": lambda: peft.RandLoraConfig(r=4, **SOME),
    "oft": lambda: peft.OFTConfig(oft_block_size=4, **SOME),
    "hra": lambda: peft.HRAConfig(r=4, **SOME),
    "fourierft": lambda: peft.FourierFTConfig(n_frequency=20, **SOME),
    "miss": lambda: peft.MissConfig(r=4, **SOME),
    "shira": lambda: peft.ShiraConfig(r=4, **SOME),
    "c3a": lambda: peft.C3AConfig(block_size=4, **SOME),
    "road": lambda: peft.RoadConfig(group_size=4, **SOME),
}
"""Methods that are asked for less often."""
KINDS = KEPT | MORE


@pytest.mark.parametrize("name", [*KEPT, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)])
def test_adapters_are_saved_loaded_and_merged(name: str, tmp_path):
    base, ids = wrapped(FULL), ids_of(2, 9)
    model = peft.get_peft_model(copy.deepcopy(base), KINDS[name]()).double()
    for i, (_, p) in enumerate(model.named_parameters()):
        if p.requires_grad:
            torch.nn.init.normal_(p.data, std=0.3, generator=torch.Generator().manual_seed(i))
    model.eval()
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).double().eval()
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        assert (expected[:, -9:] - base(ids).logits).abs().max() > 1e-2
        torch.testing.assert_close(again(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)  # prompts go to float32
        options = {"max_new_tokens": 4, "do_sample": False}
        answer = model.generate(input_ids=ids, **options)
        assert torch.equal(again.generate(input_ids=ids, **options), answer)
        if not again.active_peft_config.is_prompt_learning:
            merged = again.merge_and_unload()
            torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-5, atol=1e-6)
            assert torch.equal(merged.generate(ids, **options), answer)


def test_prefix_tuning_is_refused():
    model = peft.get_peft_model(wrapped(FULL), peft.PrefixTuningConfig(num_virtual_tokens=3, **LABELS)).double()
    with pytest.raises(ValueError, match=r"PEFT's prefix tuning, whose cache has none, take prompt tuning"):
        model(input_ids=ids_of(2, 9), labels=ids_of(2, 9))


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings", [peft.LoraConfig(r=4, **LABELS), peft.PromptTuningConfig(num_virtual_tokens=3, **LABELS)]
)
def test_resumed_adapters_draw_on(settings, tmp_path):
    """PEFT saves adapters alone: a callback keeps the count that ranges are drawn from."""
    import transformers

    from lrt.integrations.hf.trainer_callback import DrawsGoOn

    rows = [{"input_ids": row.tolist(), "labels": row.tolist()} for row in ids_of(16, 9)]
    told = {"per_device_train_batch_size": 2, "report_to": [], "use_cpu": True, "disable_tqdm": True, "seed": 3,
            "learning_rate": 1e-2, "max_steps": 6, "save_steps": 3, "logging_strategy": "no"}  # fmt: skip
    weights = []
    for name, resumed, callbacks in (("a", None, True), ("b", "a/checkpoint-3", True), ("c", "a/checkpoint-3", False)):
        torch.manual_seed(0)
        model = peft.get_peft_model(wrapped(FULL, schedule="settled-1..3", seed=2), copy.deepcopy(settings)).double()
        trainer = transformers.Trainer(
            model=model, args=transformers.TrainingArguments(str(tmp_path / name), **told), train_dataset=rows,
            data_collator=transformers.default_data_collator, callbacks=[DrawsGoOn()] if callbacks else [],
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=str(tmp_path / resumed) if resumed else None)
        assert model.get_base_model().steps == (6 if callbacks else 3)
        weights.append([p.detach().clone() for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(weights[0], weights[1], strict=True))
    assert not all(torch.equal(a, c) for a, c in zip(weights[0], weights[2], strict=True))
