"""Models as people load and run them: lower precision, compiled, offloaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import config, randomised

from lrt.config.run import to_dict

transformers = pytest.importorskip("transformers")
from lrt.integrations.hf import LRTConfig, LRTForCausalLM  # noqa: E402

CFG = config(source=3, context=256)
IDS = torch.randint(1, 19, (2, 60), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A saved model whose sweeps contract."""
    model = LRTForCausalLM(LRTConfig(lrt=to_dict(CFG), pad_token_id=1))
    model.inner.load_state_dict(randomised(CFG, scale=0.05).state_dict())
    path = tmp_path_factory.mktemp("saved") / "model"
    model.save_pretrained(path)
    return path


def forwards(model: LRTForCausalLM, ids: torch.Tensor) -> int:
    """How often the first block runs in one forward without gradient."""
    calls: list[int] = []
    handle = model.inner.blocks[0].register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        model(ids)
    handle.remove()
    return len(calls)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_not_prefilled_token_by_token(folder: Path, dtype: torch.dtype, monkeypatch):
    from lrt.model import recurrence

    plain = transformers.AutoModelForCausalLM.from_pretrained(folder)
    low = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    assert low.dtype == dtype
    assert forwards(low, IDS) <= forwards(plain, IDS) + 8 < IDS.shape[1]
    low.save_pretrained(folder.parent / str(dtype))
    auto = transformers.AutoModelForCausalLM.from_pretrained(folder.parent / str(dtype), dtype="auto")
    assert auto.dtype == dtype and forwards(auto, IDS) == forwards(low, IDS)
    monkeypatch.setattr(recurrence, "ROUNDING", {})
    low.config.prefill_tolerance = 1e-5
    assert forwards(low, IDS) > IDS.shape[1]  # rounding keeps the memory moving: without the floor, token by token


@pytest.mark.parametrize("way", ["cpu", "disk"])
def test_offloaded_weights_compute_the_same(folder: Path, tmp_path: Path, way: str):
    accelerate = pytest.importorskip("accelerate")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        expected = model(IDS, labels=IDS)
        tokens = model.generate(IDS[:, :9], max_new_tokens=5, do_sample=False)
        if way == "cpu":
            accelerate.cpu_offload(model, execution_device="cpu")
        else:
            accelerate.disk_offload(model, str(tmp_path), execution_device="cpu")
        got = model(IDS, labels=IDS)
        assert torch.equal(got.logits, expected.logits)
        torch.testing.assert_close(got.loss, expected.loss)
        assert model.generate(IDS[:, :9], max_new_tokens=5, do_sample=False).equal(tokens)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_model_computes_the_same(folder: Path):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        expected = model(IDS).logits
        got = torch.compile(model)(IDS).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
