"""One step as a program: exported by torch, by ONNX and by transformers' exporters, beside the eager step."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import BOTH, config, randomised

from lrt.inference.prefill import decode_step, prefill
from lrt.integrations.exported_step import DecodingStep, as_tensors, exported_step
from lrt.model.kv_cache import KVCache

CFG = config(source=3, context=64)
DOCUMENTS = config(document_attention=True, window_pattern="L")
NARROW = config(window_pattern="S", last_layer="S")
IDS = torch.randint(0, 19, (2, 40), generator=torch.Generator().manual_seed(0))
compilers = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("cfg", [CFG, BOTH, DOCUMENTS, NARROW], ids=str)
def test_a_step_is_a_function_of_its_state(cfg):
    model = randomised(cfg)
    step, state = DecodingStep(model), as_tensors(KVCache.empty(model, 2, 16))
    before, cache = [x.clone() for x in state], KVCache.empty(model, 2, 16)
    first = step(IDS[:, 0], state)
    assert all(torch.equal(a, b) for a, b in zip(state, before, strict=True))
    for t in range(12):
        logits, state = step(IDS[:, t], state)
        expected, cache = decode_step(model, IDS[:, t], cache)
        torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)
    assert torch.equal(first[0], step(IDS[:, 0], before)[0])
    with pytest.raises(ValueError, match="rows 0, capacity 64: both must be at least 1"):
        exported_step(model, rows=0, capacity=64)


@pytest.mark.slow
@compilers
def test_an_exported_step_decodes_as_the_eager_one_and_so_does_its_onnx(tmp_path):
    model = randomised(CFG, scale=0.1).float()
    program = exported_step(model, rows=2, capacity=48)
    torch.export.save(program, tmp_path / "step.pt2")
    run = torch.export.load(tmp_path / "step.pt2").module()
    with torch.no_grad():
        cache = prefill(model, IDS[:, :6], capacity=48).cache
    state = [x.clone() for x in as_tensors(cache)]
    start = [x.clone() for x in state]
    expected = []
    for t in range(6, 38):
        with torch.no_grad():
            logits, cache = decode_step(model, IDS[:, t], cache)
        got, state = run(IDS[:, t], state)
        torch.testing.assert_close(got, logits)
        expected.append(logits)
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    torch.onnx.export(program, dynamo=True, verbose=False).save(tmp_path / "step.onnx")
    session = runtime.InferenceSession(tmp_path / "step.onnx")
    names, state = [one.name for one in session.get_inputs()], [x.numpy() for x in start]
    for t in range(6, 38):
        given = (IDS[:, t].numpy(), *state)
        logits, *state = session.run(None, dict(zip(names, given, strict=True)))
        torch.testing.assert_close(torch.from_numpy(logits), expected[t - 6], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@compilers
def test_executorch_runs_the_step(tmp_path):
    """A program keeps its outputs in its own memory: what a step returns is copied before the next one."""
    exir, runtime = pytest.importorskip("executorch.exir"), pytest.importorskip("executorch.runtime")
    model = randomised(CFG, scale=0.1).float()
    program = exir.to_edge_transform_and_lower(exported_step(model, rows=2, capacity=48)).to_executorch()
    (tmp_path / "step.pte").write_bytes(program.buffer)
    step = runtime.Runtime.get().load_program(tmp_path / "step.pte").load_method("forward")
    with torch.no_grad():
        cache = prefill(model, IDS[:, :6], capacity=48).cache
        state = [x.clone() for x in as_tensors(cache)]
        for t in range(6, 38):
            expected, cache = decode_step(model, IDS[:, t], cache)
            logits, *state = (x.clone() for x in step.execute([IDS[:, t].clone(), *state]))
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@compilers
@pytest.mark.parametrize("kind", ["dynamo", "onnx"])
def test_transformers_exporters_take_a_step_over_a_static_cache(kind: str):
    transformers = pytest.importorskip("transformers")
    module = pytest.importorskip(f"transformers.exporters.exporter_{kind}")
    if kind == "onnx":
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")
    from lrt.config.run import to_dict
    from lrt.integrations.hf import LRTConfig, LRTForCausalLM

    model = LRTForCausalLM(LRTConfig(lrt=to_dict(CFG), pad_token_id=1)).eval()
    model.inner.load_state_dict(randomised(CFG, scale=0.1).state_dict())
    exporter, settings = (getattr(module, kind.capitalize() + name) for name in ("Exporter", "Config"))
    with torch.no_grad():
        cache = transformers.StaticCache(config=model.config, max_cache_len=48)
        model(IDS[:, :8], past_key_values=cache)
        other = copy.deepcopy(cache)
        sample = {"input_ids": IDS[:, 8:9], "past_key_values": copy.deepcopy(cache)}
        program = exporter().export(model, sample, config=settings())
        for t in range(8, 40):
            expected = model(IDS[:, t : t + 1], past_key_values=cache).logits
            got = program(input_ids=IDS[:, t : t + 1], past_key_values=other)
            other = got["past_key_values"]
            torch.testing.assert_close(got["logits"], expected, rtol=1e-4, atol=1e-5)
