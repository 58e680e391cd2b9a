"""transformers' generate, Trainer and loading, against brute force: whole sequences, or the core's own decoding."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import BOTH, SHIFT, config, randomised
from torch import Tensor

from lrt.config.decoding import SamplingParams
from lrt.config.model import ModelConfig
from lrt.config.run import to_dict
from lrt.inference.generate import generate, score
from lrt.model.loss import IGNORE, ScheduledLoss
from lrt.model.lrt import LRT
from lrt.schedule import Schedule

transformers = pytest.importorskip("transformers")
from lrt.integrations.hf import LRTConfig, LRTForCausalLM  # noqa: E402

FULL = config()
SHARED = config(projection="shared", source=3, bos=None, window_pattern="L", value_embeddings="none")
NARROW = config(window_pattern="S", last_layer="S", source=3)
models = pytest.mark.parametrize(
    "cfg", [FULL, SHARED, SHIFT, BOTH, NARROW], ids=["layerwise", "shared", "shift", "both", "windows everywhere"]
)


def wrapped(cfg: ModelConfig, **options) -> LRTForCausalLM:
    """A float64 model with every parameter drawn; exact prefill unless `options` say otherwise."""
    model = LRTForCausalLM(LRTConfig(lrt=to_dict(cfg), **{"prefill": "exact", "pad_token_id": 0} | options))
    model.double().eval().model.core.load_state_dict(randomised(cfg).state_dict())
    return model


def ids_of(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(1, 19, (rows, length), generator=torch.Generator().manual_seed(seed))


def greedy(core: LRT, ids: Tensor, count: int) -> Tensor:
    """What the core decodes."""
    laws = SamplingParams(max_new_tokens=count, temperature=0, stop_tokens=())
    steps = list(generate(core, ids.tolist(), laws, mode="exact"))
    return torch.tensor([[e.token for e in step.emissions] for step in steps]).T


def made(model: LRTForCausalLM, ids: Tensor, count: int = 10, **options) -> Tensor:
    """What generate adds."""
    out = model.generate(ids, max_new_tokens=count, **{"do_sample": False} | options)
    return out[:, ids.shape[1] :]


DOCUMENTS = config(document_attention=True, window_pattern="L")


@pytest.mark.parametrize("prefill", ["exact", "sweeps"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_attention_confined_to_documents_goes_on_from_a_cache(prefill: str, cache: str):
    """A prompt whose last document begins inside it, and an answer that begins another: as the core decodes them."""
    model, ids = wrapped(DOCUMENTS, prefill=prefill, prefill_tolerance=0.0), ids_of(2, 9)
    ids[0, 4], ids[1, 7] = 0, 0
    mask = torch.ones_like(ids)
    assert torch.equal(
        made(model, ids, cache_implementation=cache, attention_mask=mask), greedy(model.model.core, ids, 10)
    )
    whole = torch.cat((ids, ids.flip(1)), dim=1)
    expected = model(whole).logits
    past, first = None, ids.shape[1]
    out = model(ids, use_cache=True)
    torch.testing.assert_close(out.logits, expected[:, :first], rtol=1e-9, atol=1e-9)
    for t in range(first, whole.shape[1]):
        past = out.past_key_values
        out = model(whole[:, t : t + 1], past_key_values=past)
        torch.testing.assert_close(out.logits[:, 0], expected[:, t], rtol=1e-9, atol=1e-9)


# Whole sequences.


@models
def test_a_forward_computes_its_mode(cfg: ModelConfig):
    model, ids = wrapped(cfg), ids_of(3, 12)
    targets = torch.full_like(ids, 3)
    for prefill, mode in (("exact", "exact"), ("zero_memory", "zero_memory")):
        model.config.prefill = prefill
        nats = -model(ids).logits.log_softmax(-1)[..., 3]
        expected = score(model.model.core, ids, targets, mode=mode).nats
        torch.testing.assert_close(nats, expected, rtol=1e-10, atol=1e-10)
    exact = score(model.model.core, ids, targets, mode="exact").nats
    assert ((nats - exact).abs().max() > 0.1) == cfg.memory.recurrent  # the modes do differ
    model.config.prefill, model.config.prefill_tolerance = "sweeps", 0.0
    torch.testing.assert_close(-model(ids).logits.log_softmax(-1)[..., 3], exact, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(model(ids, logits_to_keep=2).logits, model(ids).logits[:, -2:])


@models
@pytest.mark.parametrize("prefill", ["exact", "sweeps", "zero_memory"])
def test_padding_on_either_side_changes_nothing(cfg: ModelConfig, prefill: str):
    model, ids = wrapped(cfg, prefill=prefill, prefill_tolerance=0.0), ids_of(1, 6)
    alone = model(ids).logits
    for left in (True, False):
        parts = [torch.zeros(1, 3, dtype=torch.int64), ids]
        mask = torch.tensor([[0] * 3 + [1] * 6]) if left else torch.tensor([[1] * 6 + [0] * 3])
        padded = torch.cat(parts if left else parts[::-1], dim=1)
        logits = model(torch.cat((padded, ids_of(1, 9, 3))), torch.cat((mask, torch.ones_like(mask)))).logits
        torch.testing.assert_close(logits[:1, mask[0].bool()], alone, rtol=1e-9, atol=1e-9)


# Every mode of generate.


@models
@pytest.mark.parametrize(
    "options",
    [
        {}, {"cache_implementation": "static"}, {"use_cache": False}, {"prefill_chunk_size": 3},
        {"cache_implementation": "static", "prefill_chunk_size": 3}, {"num_beams": 1, "repetition_penalty": 1.0},
    ],
    ids=str,
)  # fmt: skip
def test_greedy_is_the_cores_decoding(cfg: ModelConfig, options: dict):
    model, ids = wrapped(cfg), ids_of(3, 7)
    assert made(model, ids, **options).equal(greedy(model.model.core, ids, 10))


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"use_cache": False}], ids=str)
@pytest.mark.parametrize("prefill", ["exact", "sweeps", "zero_memory"])
def test_left_padded_rows_are_what_they_are_alone(options: dict, prefill: str):
    model = wrapped(FULL, prefill=prefill, prefill_tolerance=0.0)
    rows = [ids_of(1, n, n) for n in (3, 8, 5, 1)]
    padded = torch.cat([torch.nn.functional.pad(row, (8 - row.shape[1], 0)) for row in rows])
    mask = torch.cat([torch.nn.functional.pad(torch.ones_like(row), (8 - row.shape[1], 0)) for row in rows])
    together = made(model, padded, attention_mask=mask, **options)
    for row, got in zip(rows, together, strict=True):
        assert got.equal(made(model, row, use_cache=False)[0])


@models
@pytest.mark.parametrize("static", [False, True])
def test_beams_samples_and_returned_sequences_carry_their_own_memory(cfg: ModelConfig, static: bool):
    """Against whole-sequence forwards, which have no state to reorder or repeat."""
    model, ids = wrapped(cfg), ids_of(2, 5)
    cached = {"cache_implementation": "static"} if static else {}
    for options in (
        {"num_beams": 4}, {"num_beams": 3, "num_return_sequences": 2}, {"do_sample": True, "num_return_sequences": 3},
        {"do_sample": True, "num_beams": 2, "top_k": 5}, {"do_sample": True, "temperature": 0.7, "top_p": 0.9},
    ):  # fmt: skip
        torch.manual_seed(0)
        expected = made(model, ids, use_cache=False, **options)
        torch.manual_seed(0)
        assert made(model, ids, **cached, **options).equal(expected), options


def test_beams_that_leave_the_memory_behind_would_be_noticed(monkeypatch):
    from lrt.integrations.hf.cache import MemoryDynamicLayer

    model, ids = wrapped(FULL), ids_of(2, 5)
    expected = made(model, ids, use_cache=False, num_beams=4)
    monkeypatch.setattr(MemoryDynamicLayer, "_pick", lambda self, rows: None)
    assert not made(model, ids, num_beams=4).equal(expected)


def on(model: LRTForCausalLM, before, ids: Tensor, count: int) -> Tensor:
    """Go on from a returned cache; the mask is given, or the library would take token 0, its padding, for absent."""
    return made(model, ids, count, past_key_values=before.past_key_values, attention_mask=torch.ones_like(ids))


@pytest.mark.parametrize("static", [False, True])
def test_a_returned_cache_is_gone_on_from(static: bool):
    model, ids = wrapped(FULL), ids_of(2, 5)
    whole = greedy(model.model.core, ids, 12)
    cache = transformers.DynamicCache(config=model.config)
    if static:
        cache = transformers.StaticCache(config=model.config, max_cache_len=24)
    first = model.generate(ids, max_new_tokens=4, past_key_values=cache, return_dict_in_generate=True, do_sample=False)
    assert torch.cat((first.sequences[:, 5:], on(model, first, first.sequences, 8)), dim=1).equal(whole)
    more = torch.cat((first.sequences, ids_of(2, 3, 9)), dim=1)  # several new tokens at once, on a used cache
    again = transformers.DynamicCache(config=model.config)
    kept = model.generate(ids, max_new_tokens=4, past_key_values=again, return_dict_in_generate=True, do_sample=False)
    assert on(model, kept, more, 5).equal(greedy(model.model.core, more, 5))


def test_a_reset_cache_is_an_empty_one():
    model, ids = wrapped(FULL), ids_of(2, 5)
    for cache in (
        transformers.DynamicCache(config=model.config),
        transformers.StaticCache(config=model.config, max_cache_len=9),
    ):
        expected = model(ids, past_key_values=cache).logits
        cache.reset()
        torch.testing.assert_close(model(ids, past_key_values=cache).logits, expected)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("padded", [False, True])
def test_compiled_steps_over_a_static_cache_are_one_graph(padded: bool):
    model, ids = wrapped(SHARED), ids_of(2, 5)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :2] = 0
    expected = made(model, ids, attention_mask=mask)
    compiled = transformers.CompileConfig(fullgraph=True, mode="default")
    compiled._compile_all_devices = True
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    got = made(model, ids, attention_mask=mask, cache_implementation="static", compile_config=compiled)
    assert got.equal(expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("change", [{"prefill": "some"}, {"schedule": "often"}, {"lrt": {"depht": 2}}])
def test_a_configuration_is_checked(change: dict):
    with pytest.raises(ValueError, match=r"prefill is 'some'|unknown schedule|no field 'depht'"):
        LRTConfig(**change)


# Training.


@models
@pytest.mark.parametrize("schedule", ["interleaved-2", "settled-1..3", "refinement-2:weights=0/1/2"])
def test_labels_in_train_mode_give_the_schedules_loss(cfg: ModelConfig, schedule: str):
    model, ids = wrapped(cfg, schedule=schedule, seed=5).train(), ids_of(4, 9)
    labels = ids.clone()
    labels[0, 5:] = IGNORE
    for step in range(3):
        model.zero_grad()
        loss = model(ids, labels=labels).loss
        loss.backward()
        got = {name: p.grad.clone() for name, p in model.model.core.named_parameters()}
        expected = ScheduledLoss(model.model.core, Schedule.parse(schedule), 5)
        model.zero_grad()
        by_hand = expected(ids[:, :-1], labels[:, 1:], step=step).loss
        by_hand.backward()
        torch.testing.assert_close(loss, by_hand, rtol=1e-12, atol=1e-12)
        for name, p in model.model.core.named_parameters():
            torch.testing.assert_close(got[name], p.grad, rtol=1e-9, atol=1e-12)
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    model.steps = 0
    padded = model(ids, mask, labels=ids).loss
    by_hand = ScheduledLoss(model.model.core, expected.schedule, 5)(ids[:, :-1], labels[:, 1:]).loss
    torch.testing.assert_close(padded, by_hand, rtol=1e-12, atol=1e-12)


AGAIN = next(name for name in ("activation", "gradient") if f"{name}_checkpointing_enable" in dir(LRTForCausalLM))
"""What transformers calls recomputation; up to 5.20 by the older name alone."""


@pytest.mark.parametrize(
    "options", [{}, {f"{AGAIN}_checkpointing_kwargs": {"use_reentrant": True}}], ids=["its own way", "reentrant"]
)
def test_recomputation_changes_no_gradient(options: dict):
    """Neither way of the library loses what reaches a block through its memory and its embedding."""
    model, ids, grads, runs = wrapped(FULL, schedule="interleaved-2").train(), ids_of(2, 8), [], []
    for again in (False, True):
        if again:
            getattr(model, f"{AGAIN}_checkpointing_enable")(**options)
        assert getattr(model, f"is_{AGAIN}_checkpointing") is model.model.gradient_checkpointing is again
        calls = []
        handle = model.model.core.blocks[1].mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        handle.remove()
        grads.append([p.grad.clone() for p in model.parameters()])
        runs.append(len(calls))
    assert runs[1] == 2 * runs[0]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    with pytest.raises(ValueError, match="disable activation checkpointing"):
        model(inputs_embeds=model.get_input_embeddings()(ids))
    getattr(model, f"{AGAIN}_checkpointing_disable")()
    assert model(inputs_embeds=model.get_input_embeddings()(ids)).logits.requires_grad


def test_labels_in_eval_mode_give_the_loss_of_the_logits():
    model, ids = wrapped(FULL), ids_of(3, 9)
    nats = score(model.model.core, ids[:, :-1], ids[:, 1:], mode="exact").nats
    torch.testing.assert_close(model(ids, labels=ids).loss.double(), nats.mean(), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*pin_memory.*")
def test_trainer_takes_the_steps_that_a_loop_by_hand_takes(tmp_path: Path):
    """With two micro-batches a step: token-weighted, as their sum over all targets."""
    model = wrapped(FULL, schedule="interleaved-2")
    twin = wrapped(FULL, schedule="interleaved-2").train()
    rows = [{"input_ids": row, "labels": row} for row in ids_of(8, 9)]
    rows[1]["labels"] = torch.where(torch.arange(9) > 4, IGNORE, rows[1]["labels"])
    options = transformers.TrainingArguments(
        str(tmp_path), per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=2, report_to=[],
        save_strategy="no", logging_strategy="no", use_cpu=True, max_grad_norm=0.0, disable_tqdm=True,
        train_sampling_strategy="sequential",
    )  # fmt: skip
    chosen = torch.optim.SGD(model.parameters(), lr=0.1)
    constant = torch.optim.lr_scheduler.LambdaLR(chosen, lambda step: 1.0)
    transformers.Trainer(model=model, args=options, train_dataset=rows, optimizers=(chosen, constant)).train()
    by_hand = torch.optim.SGD(twin.parameters(), lr=0.1)
    for step in range(2):
        four = rows[4 * step : 4 * step + 4]
        items = sum(int((row["labels"][1:] != IGNORE).sum()) for row in four)
        for i in (0, 2):
            ids, labels = (torch.stack([row[key] for row in four[i : i + 2]]) for key in ("input_ids", "labels"))
            twin(ids, labels=labels, num_items_in_batch=items).loss.backward()
        by_hand.step()
        by_hand.zero_grad()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


# Building, saving, loading.


def test_fresh_weights_are_the_cores(tmp_path: Path):
    made_ = transformers.AutoModelForCausalLM.from_config(LRTConfig(lrt=to_dict(FULL), seed=3))
    core = LRT(FULL, seed=3)
    assert all(torch.equal(p, dict(core.named_parameters())[n]) for n, p in made_.model.core.named_parameters())
    made_.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(again, LRTForCausalLM)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), made_.parameters(), strict=True))
    base = transformers.AutoModel.from_pretrained(tmp_path)
    assert base(ids_of(1, 4)).last_hidden_state.shape == (1, 4, 24)


def test_a_model_without_memory_is_served_too():
    from lrt.config.model import MEMORY_OFF

    model, ids = wrapped(replace(FULL, memory=MEMORY_OFF)), ids_of(2, 6)
    assert made(model, ids, num_beams=3).equal(made(model, ids, num_beams=3, use_cache=False))
    assert made(model, ids).equal(greedy(model.model.core, ids, 10))
