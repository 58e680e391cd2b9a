"""Weights that quantisers have packed: near the full ones, alike with a cache and without; adapters learn on them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import config
from test_hf_training import ids_of, wrapped

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
WIDE = config(width=64, heads=2, kv_heads=1, gate_width=64)
"""Groups of 32 weights fit every matrix, as they do those of any recipe."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    kept = tmp_path_factory.mktemp("full")
    wrapped(WIDE).float().save_pretrained(kept)
    return kept


def loaded(folder: Path, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def torchao_applied(folder: Path):
    module = pytest.importorskip("torchao.quantization")
    model = loaded(folder)
    module.quantize_(model, module.Int8WeightOnlyConfig())
    return model


def torchao_8(folder: Path):
    module = pytest.importorskip("torchao.quantization")
    return loaded(folder, quantization_config=transformers.TorchAoConfig(module.Int8WeightOnlyConfig()))


def torchao_4(folder: Path):
    module = pytest.importorskip("torchao.quantization")
    per_group = pytest.importorskip("torchao.quantization.granularity").PerGroup(32)
    how = module.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=per_group)
    return loaded(folder, quantization_config=transformers.TorchAoConfig(how))


def quanto_applied(folder: Path):
    quanto = pytest.importorskip("optimum.quanto")
    model = loaded(folder)
    quanto.quantize(model, weights=quanto.qint8)
    quanto.freeze(model)
    return model


def quanto_8(folder: Path):
    pytest.importorskip("optimum.quanto")
    return loaded(folder, quantization_config=transformers.QuantoConfig(weights="int8"))


def bitsandbytes_8(folder: Path):
    pytest.importorskip("bitsandbytes")
    return loaded(folder, quantization_config=transformers.BitsAndBytesConfig(load_in_8bit=True))


KINDS: dict[Callable, float] = {
    torchao_applied: 0.02, torchao_8: 0.02, torchao_4: 0.3, quanto_applied: 0.02, quanto_8: 0.02, bitsandbytes_8: 0.05,
}  # fmt: skip
"""Ways to pack weights, and what the logits may be off by, relatively."""


@pytest.mark.parametrize("packed", KINDS, ids=lambda kind: kind.__name__)
def test_packed_weights_compute_what_full_ones_do(folder: Path, packed: Callable):
    ids, full, model = ids_of(2, 12).clamp(min=2), loaded(folder), packed(folder)  # 1 is the pad token
    with torch.no_grad():
        logits, expected = model(ids).logits.float(), full(ids).logits
        off = (logits - expected).norm() / expected.norm()
        assert 1e-6 < off < KINDS[packed], off
        cache = transformers.DynamicCache(config=model.config)
        steps = [model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(12)]
    torch.testing.assert_close(torch.cat(steps, 1).float(), logits, rtol=1e-3, atol=1e-2 * float(expected.std()))
    answers = [model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=cached) for cached in (True, False)]
    assert torch.equal(*answers)
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=4, task_type="CAUSAL_LM", init_lora_weights=False)).train()
    tuned(input_ids=ids, labels=ids).loss.backward()
    gradients = {name: p.grad for name, p in tuned.named_parameters() if p.requires_grad}
    assert len(gradients) >= 12
    assert all(g is not None and g.abs().max() > 0 for g in gradients.values())
