"""More of TRL: its other trainers, the ways in which SFT lays rows out, and which tokens it learns."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
from test_trl import COMMON, PAIRS, TEXTS, arguments, model, rows, run, trained, words  # noqa: F401 - fixtures

from lrt.integrations.hf.export import save_export
from lrt.training.checkpoint import load_model

transformers = pytest.importorskip("transformers")
trl = pytest.importorskip("trl")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
GENERATION = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "[bot] {% generation %}{{ m['content'] }}\n{% endgeneration %}"
    "{% else %}[{{ m['role'] }}] {{ m['content'] }}\n{% endif %}{% endfor %}"
)
TURNS = [("user", "the"), ("assistant", "quick fox"), ("user", "brown"), ("assistant", "fox")]
TALK = [{"messages": [{"role": role, "content": content} for role, content in TURNS]}] * 4
PAIRED = [{"prompt": "the", "completion": " quick fox"}, {"prompt": "the quick", "completion": " brown fox the"}] * 2


@pytest.fixture
def exported(run: Path, tmp_path: Path) -> Path:  # noqa: F811
    save_export(load_model(run), tmp_path / "start")
    return tmp_path / "start"


def trainer_class(name: str, *places: str):
    """A trainer and its settings, from where this version of TRL has them."""
    for place in ("trl", *places):
        module = importlib.import_module(place)
        if f"{name}Trainer" in dir(module):
            return getattr(module, f"{name}Trainer"), getattr(module, f"{name}Config")
    raise AssertionError(f"TRL has no {name}Trainer")


def test_kto_and_rloo_move_every_tensor(exported: Path, words, tmp_path: Path):  # noqa: F811
    auto = transformers.AutoModelForCausalLM
    kto, settings = trainer_class("KTO")
    labelled = [{"prompt": "the", "completion": " quick fox", "label": i % 2 == 0} for i in range(4)]
    options = {"train_dataset": rows(labelled), "processing_class": words}
    assert trained(kto(auto.from_pretrained(exported), args=settings(str(tmp_path), **COMMON), **options)) == []
    rloo, settings = trainer_class("RLOO")
    trainer = rloo(
        auto.from_pretrained(exported),
        reward_funcs=lambda completions, **_: [float(i % 2) for i in range(len(completions))],
        args=settings(str(tmp_path), num_generations=2, max_completion_length=6, **COMMON),
        train_dataset=rows([{"prompt": "the quick"}] * 4), processing_class=words,
    )  # fmt: skip
    assert trained(trainer) == []


def test_a_reward_model_moves_all_that_it_uses(exported: Path, words, tmp_path: Path):  # noqa: F811
    scores = transformers.AutoModelForSequenceClassification.from_pretrained(exported, num_labels=1)
    data = rows([{"chosen": "the quick fox", "rejected": "the brown"}] * 4)
    trainer = trl.RewardTrainer(
        scores, args=trl.RewardConfig(str(tmp_path), **COMMON), train_dataset=data, processing_class=words
    )
    assert trained(trainer) == ["model.core.head.weight"]  # a language model's, which scores do not use


@pytest.mark.parametrize("name", ["ORPO", "CPO"])
def test_orpo_and_cpo_move_every_tensor(model, words, tmp_path: Path, name: str, monkeypatch):  # noqa: F811
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    kind, settings = trainer_class(name, f"trl.experimental.{name.lower()}")
    options = settings(str(tmp_path), max_length=32, **COMMON)
    assert trained(kind(model, args=options, train_dataset=rows(PAIRS), processing_class=words)) == []


LAYOUTS = [
    {"completion_only_loss": True}, {"padding_free": True, "max_length": None}, {"neftune_noise_alpha": 5.0},
    {"train_sampling_strategy": "group_by_length"}, {"loss_type": "dft"}, {"loss_type": "chunked_nll"}, {"bf16": True},
    {"gradient_checkpointing": False}, {"gradient_checkpointing_kwargs": {"use_reentrant": True}},
    *({"packing": True, "max_length": 16, "packing_strategy": name} for name in ("bfd", "bfd_split", "wrapped")),
]  # fmt: skip


@pytest.mark.parametrize("options", LAYOUTS, ids=str)
def test_sft_moves_every_tensor_however_it_is_set(model, words, tmp_path: Path, options: dict):  # noqa: F811
    source = rows(PAIRED if "completion_only_loss" in options else TEXTS)
    settings = trl.SFTConfig(str(tmp_path), **COMMON | options)
    assert trained(trl.SFTTrainer(model, settings, train_dataset=source, processing_class=words)) == []


@pytest.mark.parametrize("options", [{"padding_free": True, "max_length": None}, {"packing": True, "max_length": 48}])
def test_rows_without_padding_have_the_loss_of_their_texts_alone(model, words, tmp_path: Path, options: dict):  # noqa: F811
    """Micro-batches of any layout have one loss: the mean over the targets of every text by itself."""
    settings = trl.SFTConfig(str(tmp_path), **COMMON | options | {"per_device_train_batch_size": 4})
    trainer = trl.SFTTrainer(model, settings, train_dataset=rows(TEXTS), processing_class=words)
    batch = next(iter(trainer.get_train_dataloader()))
    encoded = [torch.tensor([[*words(row["text"]).input_ids, words.eos_token_id]]) for row in TEXTS]
    count = sum(ids.shape[1] - 1 for ids in encoded)
    model.eval()
    alone = sum(model(ids, labels=ids, num_items_in_batch=count).loss for ids in encoded)
    torch.testing.assert_close(model(**batch).loss, alone, rtol=1e-4, atol=1e-5)


def test_assistant_only_loss_learns_what_the_template_marks(model, words, tmp_path: Path):  # noqa: F811
    words.chat_template = GENERATION
    settings = trl.SFTConfig(str(tmp_path), assistant_only_loss=True, **COMMON)
    trainer = trl.SFTTrainer(model, settings, train_dataset=rows(TALK), processing_class=words)
    (labels, *_) = next(iter(trainer.get_train_dataloader()))["labels"]
    assert words.decode(labels[labels != -100]) == " quick fox\n fox\n"
    assert trained(trainer) == []


def test_accumulated_batches_with_an_odd_last_one_step_as_one_batch(run: Path, words, tmp_path: Path):  # noqa: F811
    """Five rows as 2 + 2 + 1 and as 5, padded differently: the same step."""
    from lrt.integrations.hf.export import wrapped

    words.padding_side = "right"  # with padding on the left the Trainer counts a padded row's first token as a target
    data, weights = [{"input_ids": words(row["text"]).input_ids} for row in [*TEXTS, TEXTS[1]]], []
    collate = transformers.DataCollatorForLanguageModeling(words, mlm=False)
    for size, times in ((2, 3), (5, 1)):
        one = wrapped(load_model(run)).double()
        chosen = torch.optim.SGD(one.parameters(), lr=0.1)
        constant = torch.optim.lr_scheduler.LambdaLR(chosen, lambda step: 1.0)
        settings = arguments(
            tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=times, num_train_epochs=1,
            save_strategy="no", max_grad_norm=0.0,
        )  # fmt: skip
        one.config.schedule = "settled-2"  # a draw is of a forward, and here are three and one
        transformers.Trainer(
            model=one, args=settings, train_dataset=data, data_collator=collate, optimizers=(chosen, constant)
        ).train()
        weights.append([p.detach().clone() for p in one.parameters()])
    for a, b in zip(*weights, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
