"""Savers of memory and time that trainers offer: each trains to the weights of a training without it."""

# ruff: noqa: F811 - fixtures of other files are named again as arguments

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from test_trl import COMMON, PAIRS, TEXTS, arguments, rows, run, trainer_of, words  # noqa: F401 - fixtures
from test_trl_more import exported  # noqa: F401 - a fixture
from test_trl_settings import adapter, loaded, starting  # noqa: F401 - a fixture

transformers = pytest.importorskip("transformers")
trl = pytest.importorskip("trl")
pytest.importorskip("peft")

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def weights(trainer) -> list[torch.Tensor]:
    before = [p.detach().clone() for p in trainer.model.parameters() if p.requires_grad]
    trainer.train()
    after = [p.detach().clone() for p in trainer.model.parameters() if p.requires_grad]
    assert sum(not torch.equal(a, b) for a, b in zip(before, after, strict=True)) > len(after) // 2
    return after


def require_same(one: list[torch.Tensor], other: list[torch.Tensor]) -> None:
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


def trainer(kind: str, folder: Path, words, out: Path, settings: dict[str, Any], schedule: str = "settled-1..3"):
    torch.manual_seed(0)
    model, options = loaded(folder, schedule=schedule).double(), dict(settings)
    extra = adapter(options)
    arguments = getattr(trl, f"{kind}Config")(str(out), **COMMON | {"max_steps": 3, "seed": 1} | options)
    data = rows(PAIRS if kind == "DPO" else TEXTS * 2)
    return getattr(trl, f"{kind}Trainer")(model, args=arguments, train_dataset=data, processing_class=words, **extra)


@pytest.fixture
def moved(monkeypatch) -> list:
    """TRL's offloading with the processor in the place of an accelerator; its managers, as they are made."""
    made: list = []
    monkeypatch.setattr(torch.cpu, "empty_cache", lambda: None, raising=False)
    make = trl.models.get_act_offloading_ctx_manager

    def on_the_processor(model):
        with monkeypatch.context() as patch:
            patch.setattr(torch.accelerator, "current_accelerator", partial(torch.device, "cpu"))
            made.append(make(model, use_streams=False, use_pin_memory=False, min_offload_size=1))
        return made[-1]

    for name in ("sft", "dpo", "kto"):
        monkeypatch.setattr(f"trl.trainer.{name}_trainer.get_act_offloading_ctx_manager", on_the_processor)
    return made


OFFLOADED: list[tuple[str, dict[str, Any]]] = [
    ("SFT", {}), ("SFT", {"packing": True, "max_length": 32}), ("SFT", {"lora": True}), ("DPO", {}),
    ("SFT", {"gradient_checkpointing": False, "gradient_accumulation_steps": 2}), ("SFT", {"loss_type": "chunked_nll"}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "settings"), OFFLOADED, ids=str)
def test_offloaded_activations_train_the_same(starting: Path, words, tmp_path: Path, moved: list, kind, settings):
    wanted = weights(trainer(kind, starting, words, tmp_path / "a", settings))
    got = weights(trainer(kind, starting, words, tmp_path / "b", settings | {"activation_offloading": True}))
    require_same(got, wanted)
    (manager,) = moved
    assert manager.tensor_id > 10  # tensors of the last step that went through its hands


@pytest.mark.parametrize("schedule", ["interleaved-2", "refinement-2:weights=0/1/2", "sequential", "hop-1"])
def test_offloading_knows_every_pass(exported: Path, words, tmp_path: Path, moved: list, schedule: str):
    made = [
        weights(trainer("SFT", exported, words, tmp_path / str(on), {"activation_offloading": on}, schedule))
        for on in (False, True)
    ]
    require_same(*made)
    assert moved[0].tensor_id > 10


@pytest.mark.parametrize("kind", ["Trainer", "SFT", "SFT-LoRA"])
def test_liger_leaves_an_lrt_as_it_is(exported: Path, words, tmp_path: Path, kind: str):
    """Its kernels replace modules of the families that it names; it has none for LRT, and says so at level INFO."""
    pytest.importorskip("liger_kernel.transformers")

    def trained(liger: bool):
        out = tmp_path / str(liger)
        if kind == "Trainer":
            torch.manual_seed(0)
            options = arguments(out, max_steps=3, use_liger_kernel=liger)
            one = trainer_of(loaded(exported), words, options)
        else:
            one = trainer("SFT", exported, words, out, {"use_liger_kernel": liger, "lora": kind == "SFT-LoRA"})
        after = weights(one)
        return after, one.evaluate()["eval_loss"] if kind == "Trainer" else None

    (with_it, scored), (without, wanted) = trained(True), trained(False)
    require_same(with_it, without)
    assert scored == wanted
