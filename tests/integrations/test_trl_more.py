"""More of TRL: its other trainers, the ways in which SFT lays rows out, and which tokens it learns."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import config
from test_hf_training import ids_of
from test_hf_training import wrapped as float_model
from test_trl import COMMON, PAIRS, TEXTS, arguments, model, rows, run, trained, words  # noqa: F401 - fixtures

from lrt.integrations.hf import model as hf_model
from lrt.integrations.hf.export import save_export
from lrt.training.checkpoint import load_model

transformers = pytest.importorskip("transformers")
trl = pytest.importorskip("trl")
from trl.trainer.utils import add_fused_lm_head  # noqa: E402

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
    labelled = [{"prompt": "the", "completion": (" quick fox", " brown")[i % 2], "label": i % 2 == 0} for i in range(4)]
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


@pytest.mark.parametrize("schedule", ["settled-2", "interleaved-2:weights=0/1", "chunked-4", "interleaved-2"])
def test_log_probabilities_are_those_of_the_models_logits(schedule: str, monkeypatch):
    """TRL computes them itself, from the head's input; where several passes are scored, one line says so."""
    warnings: list[str] = []
    monkeypatch.setattr(hf_model.logger, "warning_once", warnings.append)
    one = float_model(config(source=3, softcap=1.5), schedule=schedule).train()
    ids = ids_of(2, 12)
    labels = ids.masked_fill(torch.arange(12) < 3, -100)
    add_fused_lm_head(one, outputs=("log_probs", "entropy"))
    fused = one(input_ids=ids, labels=labels, fused_lm_head=True)
    log_p = one(input_ids=ids).logits[:, :-1].log_softmax(-1)
    chosen = log_p.gather(2, ids[:, 1:, None])[..., 0].masked_fill(labels[:, 1:] == -100, 0.0)
    assert one.get_output_embeddings()(one.model(ids).last_hidden_state).abs().max() > 1.5
    torch.testing.assert_close(fused.log_probs.double(), chosen, rtol=1e-5, atol=1e-5)
    whole = one(input_ids=ids, labels=labels).loss
    assert torch.allclose(fused.loss.double(), whole, rtol=1e-5) == (schedule != "interleaved-2")
    assert [("lacks the schedule's other passes" in line) for line in warnings] == [True] * len(warnings)
    assert bool(warnings) == (schedule == "interleaved-2")


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


WORKER = """
import os, sys, torch, transformers
from lrt.integrations.hf.export import wrapped
from lrt.training.checkpoint import load_model
run, out, schedule, accumulated = sys.argv[1:]
world = 1 if "RANK" not in os.environ else 2
model = wrapped(load_model(run)).double()
model.config.schedule = schedule
steps = torch.optim.SGD(model.parameters(), lr=0.1)
constant = torch.optim.lr_scheduler.LambdaLR(steps, lambda step: 1.0)
rows = [{"input_ids": [0, *range(2, 2 + n)], "labels": [0, *range(2, 2 + n)]} for n in (6, 12, 18, 6, 9, 3, 16, 5)]
settings = transformers.TrainingArguments(
    out, per_device_train_batch_size=4 // world // int(accumulated), gradient_accumulation_steps=int(accumulated),
    use_cpu=True, num_train_epochs=1, save_strategy="no", max_grad_norm=0.0, report_to=[], disable_tqdm=True, seed=3,
)
collate = lambda batch: {
    k: torch.nn.utils.rnn.pad_sequence([torch.tensor(r[k]) for r in batch], True, v)
    for k, v in (("input_ids", 1), ("labels", -100))
}
trainer = transformers.Trainer(
    model=model, args=settings, train_dataset=rows, data_collator=collate, optimizers=(steps, constant)
)
trainer.train()
if trainer.is_world_process_zero():
    torch.save({k: v for k, v in model.state_dict().items()}, f"{out}-{world}.pt")
"""


@pytest.mark.parametrize("accumulated", ["1", "2"])
@pytest.mark.parametrize("schedule", ["interleaved-2", "settled-1..3", "parallel"])
def test_two_processes_train_as_one(run: Path, tmp_path: Path, schedule: str, accumulated: str):  # noqa: F811
    """Torch's own launcher, gloo; `parallel` leaves the memory without gradient. A draw is of a forward."""
    (tmp_path / "worker.py").write_text(WORKER)
    options = [str(tmp_path / "worker.py"), str(run), str(tmp_path / "w"), schedule, accumulated]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for command in ([sys.executable], launch):
        done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
    one, two = (torch.load(tmp_path / f"w-{n}.pt", weights_only=True) for n in (1, 2))
    before = load_model(run).model.state_dict()
    assert (one["model.core.head.weight"] - before["head.weight"]).abs().max() > 1e-4
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-9, atol=1e-10)
