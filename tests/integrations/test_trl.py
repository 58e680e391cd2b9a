"""TRL's trainers at their defaults, and the library's own: what is to be trained moves, evaluated and resumed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import config, randomised

from lrt.config.run import RunConfig, TrainConfig
from lrt.data.tokenizer import train_bpe
from lrt.training import checkpoint
from lrt.training.checkpoint import load_model

transformers = pytest.importorskip("transformers")
from lrt.integrations.hf.export import save_export, wrapped  # noqa: E402
from lrt.integrations.hf.fast_tokenizer import fast_tokenizer  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
CHAT = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "small"
    words = train_bpe(["the quick brown fox\n"] * 50, 290)
    words.config = type(words.config)(chat_templates={"default": CHAT})
    model = config(vocab_size=words.vocab_size, bos=words.bos, context=96, source=3)
    settings = RunConfig(name="small", model=model, train=TrainConfig(length=64, schedule="settled-1..3"))
    words.save(folder / "tokenizer")
    checkpoint.save(folder, 7, settings, randomised(model, scale=0.2).float(), {}, extra={}, keep=1)
    return folder


@pytest.fixture
def model(run: Path):
    return wrapped(load_model(run))


@pytest.fixture
def words(run: Path):
    return fast_tokenizer(load_model(run))


def rows(data: list[dict]):
    datasets = pytest.importorskip("datasets")
    return datasets.Dataset.from_list(data)


TEXTS = [{"text": "the quick brown fox " * n} for n in (1, 2, 3, 1)]
TALK = [{"messages": [{"role": "user", "content": "the"}, {"role": "assistant", "content": "quick fox"}]}] * 4
PAIRS = [{"prompt": "the", "chosen": " quick fox", "rejected": " brown"}] * 4
COMMON = {"max_steps": 2, "per_device_train_batch_size": 2, "report_to": [], "use_cpu": True, "bf16": False,
          "learning_rate": 1e-2, "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1}  # fmt: skip


def trained(trainer) -> list[str]:
    """What did not move, of what is to be trained; what moves does so by a gradient, not by rounding alone."""
    wanted = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    after = dict(trainer.model.named_parameters())
    still = [name for name, p in wanted.items() if torch.equal(p, after[name].detach())]
    norms = [one["grad_norm"] for one in trainer.state.log_history if "grad_norm" in one]
    assert len(still) == len(wanted) or max(norms) > 1e-3, norms
    return still


@pytest.mark.parametrize("data", ["text", "messages"])
@pytest.mark.parametrize("packing", [False, True])
def test_sft_moves_every_tensor(model, words, tmp_path: Path, data: str, packing: bool):
    trl = pytest.importorskip("trl")
    options = trl.SFTConfig(str(tmp_path), packing=packing, max_length=32, **COMMON)
    source = rows(TEXTS if data == "text" else TALK)
    assert trained(trl.SFTTrainer(model, options, train_dataset=source, processing_class=words)) == []


def test_sft_with_lora_moves_the_adapters_alone(model, words, tmp_path: Path):
    trl, peft = pytest.importorskip("trl"), pytest.importorskip("peft")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = trl.SFTTrainer(
        model, trl.SFTConfig(str(tmp_path), **COMMON), train_dataset=rows(TEXTS), processing_class=words,
        peft_config=peft.LoraConfig(r=4, task_type="CAUSAL_LM"),
    )  # fmt: skip
    still = trained(trainer)
    assert all("lora_A" in name for name in still)  # lora_B starts at zero: A has no gradient in the first step
    base = {n.removeprefix("base_model.model.").replace(".base_layer", ""): p
            for n, p in trainer.model.named_parameters() if "lora" not in n}  # fmt: skip
    assert base.keys() == before.keys() and all(torch.equal(p, before[n]) for n, p in base.items())


def test_dpo_moves_every_tensor(run: Path, words, tmp_path: Path):
    trl = pytest.importorskip("trl")
    save_export(load_model(run), tmp_path / "start")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "start")  # the reference is loaded from there
    options = trl.DPOConfig(str(tmp_path / "out"), **COMMON)
    assert trained(trl.DPOTrainer(model, args=options, train_dataset=rows(PAIRS), processing_class=words)) == []


def test_grpo_moves_every_tensor(model, words, tmp_path: Path):
    trl = pytest.importorskip("trl")
    options = trl.GRPOConfig(str(tmp_path), num_generations=2, max_completion_length=6, **COMMON)
    trainer = trl.GRPOTrainer(
        model, reward_funcs=lambda completions, **_: [float(i % 2) + len(c) for i, c in enumerate(completions)],
        args=options, train_dataset=rows([{"prompt": "the quick"}] * 4), processing_class=words,
    )  # fmt: skip
    assert trained(trainer) == []


def arguments(folder: Path, **options):
    settings = {"per_device_train_batch_size": 2, "report_to": [], "use_cpu": True, "disable_tqdm": True,
                "learning_rate": 1e-2, "seed": 3, "logging_steps": 1}  # fmt: skip
    return transformers.TrainingArguments(str(folder), **settings | options)


def tokens(words):
    return [{"input_ids": words(row["text"]).input_ids} for row in TEXTS * 3]


def trainer_of(model, words, options):
    collate = transformers.DataCollatorForLanguageModeling(words, mlm=False)
    data = tokens(words)
    return transformers.Trainer(
        model=model, args=options, train_dataset=data, eval_dataset=data[:3], data_collator=collate
    )


def test_evaluation_and_the_best_model(model, words, tmp_path: Path):
    options = arguments(
        tmp_path, max_steps=4, eval_strategy="steps", eval_steps=2, save_steps=2, load_best_model_at_end=True
    )
    trainer = trainer_of(model, words, options)
    trainer.train()
    assert trainer.state.best_model_checkpoint is not None
    scored = trainer.evaluate()["eval_loss"]
    assert abs(scored - trainer.state.best_metric) < 1e-4


def test_a_resumed_training_draws_on(run: Path, words, tmp_path: Path):
    whole = trainer_of(wrapped(load_model(run)), words, arguments(tmp_path / "a", max_steps=4, save_steps=2))
    whole.train()
    again = trainer_of(wrapped(load_model(run)), words, arguments(tmp_path / "b", max_steps=4, save_steps=2))
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert again.model.steps == whole.model.steps == 4
    for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
