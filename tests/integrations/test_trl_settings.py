"""Settings of TRL's trainers and of the library's own, beside a plain Llama: what moves, first losses, rows."""

# ruff: noqa: F811 - fixtures of other files are named again as arguments

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from test_trl import COMMON, PAIRS, TEXTS, arguments, model, rows, run, trained, trainer_of, words  # noqa: F401 - fixtures
from test_trl_more import exported  # noqa: F401 - a fixture

from lrt.integrations.hf.export import wrapped
from lrt.training.checkpoint import load_model

transformers = pytest.importorskip("transformers")
trl = pytest.importorskip("trl")
peft = pytest.importorskip("peft")

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
LORA = {"r": 4, "task_type": "CAUSAL_LM"}
EXACT = {"schedule": "sequential", "prefill": "exact"}
"""Train mode and eval mode compute the same, so that a policy equals its reference as a plain model's does."""


@pytest.fixture(params=["lrt", "llama"])
def starting(request, exported: Path, words, tmp_path: Path) -> Path:
    """A model in a folder, as references are loaded from one: ours, and a plain Llama of the same vocabulary."""
    if request.param == "lrt":
        return exported
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    ends = {"eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id}
    settings = transformers.LlamaConfig(vocab_size=len(words), max_position_embeddings=96, **sizes, **ends)
    transformers.LlamaForCausalLM(settings).save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def loaded(folder: Path, **changes):
    one = transformers.AutoModelForCausalLM.from_pretrained(folder)
    for name, value in changes.items() if one.config.model_type == "lrt" else ():
        setattr(one.config, name, value)
    return one


def adapter(options: dict) -> dict:
    return {"peft_config": peft.LoraConfig(**LORA, init_lora_weights=False)} if options.pop("lora", False) else {}


DPO: list[tuple[dict[str, Any], float | None]] = [
    ({}, math.log(2)), ({"padding_free": True, "max_length": None}, math.log(2)), ({"loss_type": "ipo"}, 25.0),
    ({"loss_type": "hinge"}, 1.0), ({"loss_type": "exo_pair", "label_smoothing": 0.1}, None),
    ({"loss_type": "nca_pair"}, None), ({"loss_type": "robust", "label_smoothing": 0.1}, math.log(2)),
    ({"loss_type": "bco_pair"}, None), ({"loss_type": "sppo_hard"}, 50.0), ({"loss_type": "aot"}, math.log(2)),
    ({"loss_type": "apo_zero"}, 1.0), ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 1.0]}, None),
    ({"f_divergence_type": "js_divergence"}, math.log(2)), ({"use_weighting": True}, None),
    ({"precompute_ref_log_probs": True}, math.log(2)), ({"ld_alpha": 0.5}, math.log(2)),
    ({"sync_ref_model": True, "ref_model_sync_steps": 1}, math.log(2)), ({"lora": True}, None),
]  # fmt: skip
"""Settings, and the first loss of a policy that is its reference: the loss at a log ratio of 0 (beta 0.1)."""


@pytest.mark.parametrize(("options", "first"), DPO, ids=[str(options) for options, _ in DPO])
def test_dpo_moves_every_tensor_from_the_loss_of_equal_models(starting: Path, words, tmp_path: Path, options, first):
    settings = dict(options)
    extra = adapter(settings)
    args = trl.DPOConfig(str(tmp_path / "out"), **COMMON | settings)
    policy = loaded(starting, **EXACT)
    trainer = trl.DPOTrainer(policy, args=args, train_dataset=rows(PAIRS), processing_class=words, **extra)
    if trainer.ref_model is not None and policy.config.model_type == "lrt":
        trainer.ref_model.config.prefill = "exact"
    assert trained(trainer) == []
    if first is not None:
        assert trainer.state.log_history[0]["loss"] == pytest.approx(first, rel=1e-4)


GRPO: list[dict[str, Any]] = [
    {"num_iterations": 2}, {"importance_sampling_level": "sequence"}, {"gradient_accumulation_steps": 2},
    {"lora": True}, {"messages": True}, {"beta": 0.1}, {"scale_rewards": "none"}, {"temperature": 0.7},
    {"top_k": 5}, {"top_p": 0.5}, {"min_p": 0.1}, {"repetition_penalty": 1.3}, {"top_entropy_quantile": 0.5},
    {"cache_implementation": "static"}, {"steps_per_generation": 2}, {"entropy_coef": 0.1},
    *({"loss_type": name} for name in ("grpo", "dr_grpo", "bnpo", "cispo", "sapo", "luspo", "vespo")),
    {"mask_truncated_completions": True, "ends": True},
]  # fmt: skip


def grpo(folder: Path, words, out: Path, options: dict[str, Any]):
    """A trainer whose every group has two different rewards; `ends` ends each completion by the token of ends."""
    settings = dict(options)
    extra, messages = adapter(settings), settings.pop("messages", False)
    if settings.pop("ends", False):
        settings["generation_kwargs"] = {"forced_eos_token_id": words.eos_token_id}
    args = trl.GRPOConfig(
        str(out), **COMMON | {"num_generations": 2, "max_completion_length": 6, "max_steps": 4} | settings
    )
    prompt = [{"role": "user", "content": "the quick"}] if messages else "the quick"
    return trl.GRPOTrainer(
        loaded(folder), args=args, train_dataset=rows([{"prompt": prompt}] * 4), processing_class=words, **extra,
        reward_funcs=lambda completions, **_: [float(i % 2) for i in range(len(completions))],
    )  # fmt: skip


@pytest.mark.parametrize("options", GRPO, ids=str)
def test_grpo_moves_every_tensor_however_it_is_set(starting: Path, words, tmp_path: Path, options: dict):
    assert trained(grpo(starting, words, tmp_path / "out", options)) == []


def test_grpo_learns_nothing_of_completions_that_are_all_cut_off(starting: Path, words, tmp_path: Path):
    """TRL masks each, whatever the model: then there is nothing to learn."""
    trainer = grpo(starting, words, tmp_path / "out", {"mask_truncated_completions": True})
    trainer.model.generation_config.suppress_tokens = [words.eos_token_id]
    trainer.generation_config.suppress_tokens = [words.eos_token_id]
    assert len(trained(trainer)) == len(list(trainer.model.parameters()))


def test_grpo_without_the_librarys_own_batching_alone(exported: Path, words, tmp_path: Path):
    trainer = grpo(exported, words, tmp_path / "out", {"use_transformers_paged": True})
    with pytest.raises(ValueError, match="no continuous batching"):
        trainer.train()


TRAINER: list[dict[str, Any]] = [
    *({"optim": name} for name in ("adafactor", "sgd", "rmsprop", "adagrad", "adamw_torch_fused", "adamw_torch")),
    {"auto_find_batch_size": True}, {"full_determinism": True}, {"bf16": True}, {"gradient_checkpointing": True},
    {"neftune_noise_alpha": 5.0}, {"gradient_accumulation_steps": 3}, {"lr_scheduler_type": "cosine"},
    {"train_sampling_strategy": "group_by_length"}, {"max_grad_norm": 0.01}, {"weight_decay": 0.1},
    {"warmup_steps": 1}, {"torch_compile": True}, {"fp16": True},
]  # fmt: skip


@pytest.mark.parametrize("options", TRAINER, ids=str)
def test_the_trainer_moves_every_tensor_however_it_is_set(model, words, tmp_path: Path, options: dict):
    deterministic = torch.are_deterministic_algorithms_enabled()
    try:
        assert trained(trainer_of(model, words, arguments(tmp_path, max_steps=2, save_strategy="no", **options))) == []
    finally:
        torch.use_deterministic_algorithms(deterministic)


# Which tokens SFT learns, however the columns are called.

SAID = [{"role": "user", "content": "the"}, {"role": "assistant", "content": "quick fox"}]
ROWS: list[tuple[dict, dict[str, Any], str, str]] = [
    ({"story": "the quick"}, {"dataset_text_field": "story"}, "<>the quick<>", "<>the quick<>"),
    ({"input_ids": [0, 5, 6, 7]}, {}, "<>%&'", "<>%&'"),
    ({"input_ids": [0, 5, 6, 7], "labels": [-100, -100, 6, 7]}, {}, "<>%&'", "&'"),
    ({"prompt": "the", "completion": " fox"}, {}, "<>the fox<>", " fox<>"),
    ({"prompt": "the", "completion": " fox"}, {"completion_only_loss": False}, "<>the fox<>", "<>the fox<>"),
    (
        {"prompt": SAID[:1], "completion": SAID[1:]},
        {},
        "[user] the\n[assistant] quick fox\n",
        "[assistant] quick fox\n",
    ),
    ({"messages": SAID}, {}, "[user] the\n[assistant] quick fox\n", "[user] the\n[assistant] quick fox\n"),
    ({"messages": SAID}, {"chat_template_path": "."}, "user: the;bot: quick fox;", "user: the;bot: quick fox;"),
]
OTHER = "{% for m in messages %}{{ {'user': 'user', 'assistant': 'bot'}[m['role']] }}: {{ m['content'] }};{% endfor %}"


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(("row", "options", "text", "learned"), ROWS, ids=[str(row[:2]) for row in ROWS])
def test_sft_reads_these_columns_and_learns_these_tokens(
    model,
    words,
    tmp_path: Path,
    row: dict,
    options: dict,
    text: str,
    learned: str,
    streamed: bool,
):
    (tmp_path / "other.jinja").write_text(OTHER)
    settings = {name: str(tmp_path / "other.jinja") if value == "." else value for name, value in options.items()}
    data = rows([row] * 2)
    args = trl.SFTConfig(str(tmp_path / "out"), **COMMON | settings)
    source = data.to_iterable_dataset() if streamed else data
    trainer = trl.SFTTrainer(model, args, train_dataset=source, processing_class=words)
    batch = next(iter(trainer.get_train_dataloader()))
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        seen = ids[batch["attention_mask"][0] == 1], labels[labels != -100]
        assert [words.decode(one).replace(words.bos_token, "<>") for one in seen] == [text, learned]
    whole = model.eval()(**batch).loss
    log_p = model(batch["input_ids"]).logits[:, :-1].log_softmax(-1)
    targets = batch["labels"][:, 1:]
    chosen = log_p.gather(2, targets.clamp(min=0)[..., None])[..., 0]
    torch.testing.assert_close(whole, -chosen[targets != -100].mean(), rtol=1e-4, atol=1e-5)


# Resumed, and predicted.


@pytest.mark.parametrize(
    "options", [{}, {"bf16": True}, {"neftune_noise_alpha": 5.0}, {"lr_scheduler_type": "cosine"}], ids=str
)
def test_a_training_resumed_inside_an_epoch_ends_as_an_uninterrupted_one(
    run: Path, words, tmp_path: Path, options: dict
):
    common = {"max_steps": 4, "save_steps": 2, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 1}
    whole = trainer_of(wrapped(load_model(run)), words, arguments(tmp_path / "a", **common | options))
    whole.train()
    again = trainer_of(wrapped(load_model(run)), words, arguments(tmp_path / "b", **common | options))
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True))


@pytest.mark.parametrize("accumulated", [None, 1])
def test_predictions_are_each_rows_own(model, words, tmp_path: Path, accumulated: int | None):
    words.padding_side = "right"
    options = arguments(tmp_path, per_device_eval_batch_size=2, eval_accumulation_steps=accumulated)
    trainer = trainer_of(model, words, options)
    data = [{"input_ids": words(row["text"]).input_ids} for row in TEXTS]
    predicted = trainer.predict(data)
    for row, logits in zip(data, predicted.predictions, strict=True):
        with torch.no_grad():
            alone = model.eval()(torch.tensor([row["input_ids"]])).logits[0]
        torch.testing.assert_close(torch.tensor(logits[: len(alone)]), alone, rtol=1e-3, atol=1e-3)


def test_a_seq2seq_trainer_predicts_what_generate_writes(model, words, tmp_path: Path):
    options = transformers.Seq2SeqTrainingArguments(
        str(tmp_path),
        use_cpu=True,
        report_to=[],
        predict_with_generate=True,
        generation_max_length=24,
        disable_tqdm=True,
    )
    trainer = transformers.Seq2SeqTrainer(
        model=model, args=options, processing_class=words,
        data_collator=transformers.DataCollatorForLanguageModeling(words, mlm=False),
    )  # fmt: skip
    data = [{"input_ids": words(row["text"]).input_ids[:6]} for row in TEXTS[:1]]
    predicted = trainer.predict(data)
    ids = torch.tensor([data[0]["input_ids"]])
    assert predicted.predictions[0].tolist() == model.eval().generate(ids, max_length=24, num_beams=1)[0].tolist()
