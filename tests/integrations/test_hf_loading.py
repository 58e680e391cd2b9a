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


@pytest.mark.parametrize("share", [0.5, 0.9])
def test_a_map_of_devices_may_put_blocks_on_disk(folder: Path, tmp_path: Path, share: float):
    """The counter of drawn schedules, a buffer, had no place in a map that splits the backbone."""
    pytest.importorskip("accelerate")
    load = transformers.AutoModelForCausalLM.from_pretrained
    whole = load(folder)
    room = int(share * whole.get_memory_footprint())
    model = load(folder, device_map="auto", max_memory={"cpu": room}, offload_folder=str(tmp_path))
    assert set(model.hf_device_map.values()) == {"cpu", "disk"}
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, whole(IDS).logits)


def test_empty_weights_are_filled_later(folder: Path):
    accelerate = pytest.importorskip("accelerate")
    with accelerate.init_empty_weights(include_buffers=True):
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(folder))
    model = accelerate.load_checkpoint_and_dispatch(model, str(folder), device_map={"": "cpu"}).eval()
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, transformers.AutoModelForCausalLM.from_pretrained(folder)(IDS).logits)
    assert model.steps == 0


def gradients(model: torch.nn.Module, logits: torch.Tensor) -> list[torch.Tensor]:
    """Of a function of the logits, and the counter of drawn schedules set back."""
    model.zero_grad()
    logits.logsumexp(-1).sum().backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]


def breaks() -> int:
    return sum(torch._dynamo.utils.counters["graph_break"].values())


@pytest.fixture
def dynamo():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("training", [False, True])
def test_a_compiled_model_computes_the_same_at_every_length(folder: Path, training: bool, dynamo):
    """A second length used to end in an internal error of the compiler, where there were labels."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, schedule="interleaved-2").train(training)
    compiled = torch.compile(model)
    for forms, form in enumerate((set(), {"labels"}, {"attention_mask", "labels"}), 1):
        for n in (40, 17, 23):
            ids, mask = IDS[:, :n], torch.ones_like(IDS[:, :n])
            mask[0, :5] = 0
            options = {name: {"labels": ids, "attention_mask": mask}[name] for name in sorted(form)}
            expected, got = model(ids, **options), compiled(ids, **options)
            torch.testing.assert_close(got.logits, expected.logits)
            if "labels" in options:
                torch.testing.assert_close(got.loss, expected.loss)
            for a, b in zip(gradients(model, got.logits), gradients(model, expected.logits), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        assert breaks() <= 2 * forms  # none for another length


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("static", [False, True])
def test_compiled_steps_are_the_steps(folder: Path, static: bool, dynamo):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    compiled, parts = torch.compile(model), []
    with torch.no_grad():
        for run in (model, compiled):
            cache = transformers.DynamicCache(config=model.config)
            if static:
                cache = transformers.StaticCache(config=model.config, max_cache_len=48)
            cuts = IDS[:, :40].split([8] + [1] * 32, dim=1)
            parts.append(torch.cat([run(part, past_key_values=cache).logits for part in cuts], dim=1))
    torch.testing.assert_close(*parts)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= (1 if static else 3) and breaks() <= 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("mode", [None, "jacobi", "zero_memory"])
def test_a_compiled_lrt_computes_the_same_at_every_length(mode: str | None, dynamo):
    """Compiling it used to trace every step of the recurrence."""
    model = randomised(CFG, scale=0.05).float()
    compiled = torch.compile(model)
    for n in (12, 17, 9):
        for graded in (False, True) if mode != "jacobi" else (False,):
            with torch.set_grad_enabled(graded):
                expected, got = model(IDS[:, :n], mode=mode), compiled(IDS[:, :n], mode=mode)
            torch.testing.assert_close(got, expected)
            if graded:
                for a, b in zip(gradients(model, got), gradients(model, expected), strict=True):
                    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert breaks() <= 8
    with torch.no_grad(), pytest.raises(ValueError, match="token 19 is outside the vocabulary"):
        compiled(torch.full((1, 9), 19), mode=mode)
