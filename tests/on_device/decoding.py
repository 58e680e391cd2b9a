"""Decoding, in float64, which a GPU has too: there equality is equality."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import packed
from torch._dynamo.utils import counters

from lrt.config.decoding import SamplingParams
from lrt.config.model import ModelConfig
from lrt.inference.generate import generate, score
from lrt.inference.prefill import compiled, decode_step, next_logits, prefill
from lrt.inference.weights import Int8Linear, by_columns
from lrt.model.kv_cache import KVCache
from lrt.model.lrt import LRT
from lrt.model.recurrence import advance
from on_device.common import CONFIG, DOCUMENTS, FLOATS, drawn, floats, require_near, small


def exact_on(cfg: ModelConfig, device: torch.device) -> LRT:
    model = small(cfg).to(device, torch.float32 if device.type == "mps" else torch.float64)
    return model.requires_grad_(False)


@pytest.mark.parametrize("cfg", [CONFIG, DOCUMENTS], ids=["rows", "documents"])
@pytest.mark.parametrize("mode", ["exact", "interleaved-3", "zero_memory"])
def test_prefill_and_scores(mode: str, cfg: ModelConfig, device: torch.device):
    model, ids = exact_on(cfg, device), packed(cfg, 3, 20)
    exact = model.stream_dtype == torch.float64 and not mode.startswith("interleaved")  # sweeps end where they settle
    nats = [score(m, ids.to(m.device), ids.roll(-1, 1).to(m.device), mode=mode).nats for m in (small(cfg), model)]
    require_near(nats[1], nats[0], 1e-9 if exact else 1e-3)


@floats
def test_logits(kind: str, device: torch.device):
    """A prompt and one step more, in weights of that type, against float64."""
    (number, error), ids, found = FLOATS[kind], packed(CONFIG, 3, 20), []
    for model in (small(), small().to(device, number)):
        taken = prefill(model, ids.to(model.device), capacity=30, mode="exact")
        found.append((taken.logits, decode_step(model, ids[:, 0].to(model.device), taken.cache)[0]))
    for got, expected in zip(found[1], found[0], strict=True):
        require_near(got, expected, error)


def greedy(model: LRT, run=next_logits, count: int = 24) -> list[int]:
    sampling = SamplingParams(max_new_tokens=count, temperature=0, stop_tokens=())
    prompts = [[3, 1, 4, 1, 5], [9, 2, 6]]
    steps = generate(model, prompts, sampling, run=run, mode="exact")
    return [e.token for step in steps for e in step.emissions]


def test_generate(device: torch.device):
    assert greedy(exact_on(CONFIG, device)) == greedy(small())


def test_int8_weights(device: torch.device):
    """The kernel of the CPU, or the formula elsewhere, against the formula in float64."""
    linear, x = torch.nn.Linear(64, 48, bias=False), drawn(5, 64).float()
    small = Int8Linear(linear)
    integers, scale = (small.get_buffer(name).double() for name in ("integers", "scale"))
    require_near(small.to(device)(x.to(device)), x.double() @ (integers * scale[:, None]).T, FLOATS["bfloat16"][1])


def test_matrices_by_columns(device: torch.device):
    """A layout for a CPU: elsewhere matrices stay as they lie, and logits are the same in any case."""
    model, tokens = small().to(device), packed(CONFIG, 2, 12).to(device)
    before = prefill(model, tokens).logits
    by_columns(model)
    laid = [
        p.T.is_contiguous()
        for block in model.blocks
        for name, p in block.named_parameters()
        if p.ndim == 2 and "embed" not in name
    ]
    assert set(laid) == {device.type == "cpu"}
    require_near(prefill(model, tokens).logits, before, FLOATS["float32"][1])


def test_sampling_is_the_same_on_every_device(device: torch.device):
    sampling = SamplingParams(max_new_tokens=24, temperature=0.9, top_k=12, top_p=0.95, repetition_penalty=1.2, seed=4)
    rows = [
        [e.token for step in generate(m, [[3, 1, 4]], sampling, mode="exact") for e in step.emissions]
        for m in (exact_on(CONFIG, torch.device("cpu")), exact_on(CONFIG, device))
    ]
    assert rows[0] == rows[1]


def test_compiled_step_and_cuda_graphs(compiling: torch.device):
    """One compiled step, replayed as a CUDA graph there, over lengths that change the number of visible slots.

    A graph is passed over in silence where something stands against it; torch counts that. What a step has returned
    stays, whatever later ones write.
    """
    counters.clear()
    cfg = replace(DOCUMENTS, context=192)
    model, run = exact_on(cfg, compiling), compiled()
    ids = packed(cfg, 2, 140).to(compiling)
    caches, kept = [KVCache.empty(model, 2, 150) for _ in range(2)], []
    for t in range(ids.shape[1]):
        with torch.no_grad():
            out, caches[0] = advance(model, ids[:, t], caches[0], None, run)
            expected, caches[1] = advance(model, ids[:, t], caches[1], None, next_logits)
        kept.append((out, expected))
    for t, (out, expected) in enumerate(kept):
        require_near(out, expected, 1e-6, f"step {t}")
    if compiling.type == "cuda":
        from torch._inductor.cudagraph_trees import get_manager

        graphs = get_manager(0, create_if_none_exists=False)
        assert graphs is not None and graphs.roots and not counters["inductor"]["cudagraph_skips"]


def test_state_travels_between_devices(device: torch.device, tmp_path: Path):
    """A decoder's state saved there goes on here."""
    model, ids = exact_on(CONFIG, device), packed(CONFIG, 2, 12)
    prefill(model, ids.to(device), capacity=20, mode="exact").cache.save(tmp_path / "state")
    states = [
        KVCache.load(tmp_path / "state"),
        prefill(exact_on(CONFIG, torch.device("cpu")), ids, capacity=20, mode="exact").cache,
    ]
    for mine, theirs in itertools.chain(zip(states[0].per_row(), states[1].per_row(), strict=True)):
        require_near(mine, theirs, 1e-5)


ASKED = {"prompt": "def area(", "max_tokens": 12, "temperature": 0}


def answered(run: Path, device: torch.device) -> str:
    """A greedy answer of a server on the device."""
    from serving import Server, post

    with Server(run, device=str(device)) as server:
        return post(server, "/v1/completions", ASKED).json()["choices"][0]["text"]


def test_server(device: torch.device, random_run: Path):
    pytest.importorskip("fastapi")
    assert answered(random_run, device) == answered(random_run, torch.device("cpu"))


def test_compiled_server(compiling: torch.device, random_run: Path, tmp_path: Path):
    """Its steps are compiled, and recorded as CUDA graphs there, in a thread of their own.

    In a process of its own: with torch 2.11 graphs are recorded in the first thread that asks for them alone.
    """
    httpx = pytest.importorskip("httpx")
    pytest.importorskip("fastapi")
    from serving import started

    with started(random_run, tmp_path / "log", "--compile", "--device", compiling.type) as process:
        answer = httpx.post(process.url + "/v1/completions", json=ASKED, timeout=600).json()
    assert answer["choices"][0]["text"] == answered(random_run, torch.device("cpu"))


def test_transformers_generate(device: torch.device):
    """`generate` of the transformers class."""
    pytest.importorskip("transformers")
    from lrt.config.run import to_dict
    from lrt.integrations.hf import LRTConfig, LRTForCausalLM

    found = []
    for on in (torch.device("cpu"), device):
        model = LRTForCausalLM(LRTConfig(lrt=to_dict(CONFIG), prefill="exact", pad_token_id=0)).eval()
        model.model.core.load_state_dict(small().state_dict())
        model = model.to(on, torch.float32)
        ids = torch.tensor([[3, 1, 4, 1, 5]], device=on)
        found.append(model.generate(ids, max_new_tokens=12, do_sample=False, attention_mask=torch.ones_like(ids)).cpu())
    assert torch.equal(found[0], found[1])


def test_transformers_loss(device: torch.device):
    """The loss of the transformers class, padded on the left; and a count of targets that is none."""
    pytest.importorskip("transformers")
    from lrt.config.run import to_dict
    from lrt.integrations.hf import LRTConfig, LRTForCausalLM

    losses = []
    for on in (torch.device("cpu"), device):
        model = LRTForCausalLM(LRTConfig(lrt=to_dict(CONFIG), schedule="settled-1", pad_token_id=0)).train()
        model.model.core.load_state_dict(small().state_dict())
        model, ids = model.to(on, torch.float32), torch.tensor([[0, 0, 4, 1, 5], [3, 1, 4, 1, 5]], device=on)
        mask = torch.ones_like(ids)
        mask[0, :2] = 0
        batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
        losses.append(model(**batch, num_items_in_batch=torch.tensor(6, device=on)).loss.item())
        if on.type == "cpu":
            with pytest.raises(ValueError, match="num_items_in_batch is 0 for 6 targets"):
                model(**batch, num_items_in_batch=torch.tensor(0))
        else:
            assert model(**batch, num_items_in_batch=torch.tensor(0, device=on)).loss.isfinite()
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
