"""What runs otherwise on a GPU than on a CPU, each part against its twin on the CPU.

Every test is a function of `device`, so that the CPU rehearses it. With a GPU: `pytest -m cuda tests/test_cuda.py`.
docs/gpu.md lists every place of the package that asks for the device, and the test here that runs it.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import SCHEDULES, config, events, packed, randomised, tiny
from torch import Tensor

import lrt.training.session
from lrt.benchmarks.latency import latencies
from lrt.benchmarks.profile import parts
from lrt.benchmarks.training_step import SteppedModel, measure
from lrt.config.benchmarks import StepBenchmark
from lrt.config.decoding import SamplingParams
from lrt.config.model import Execution, ModelConfig
from lrt.config.recipes import cpu_demo
from lrt.config.run import OptimConfig
from lrt.experiments.runner import at_once
from lrt.inference.generate import generate, score
from lrt.inference.prefill import compiled, next_logits, prefill
from lrt.inference.weights import Int8Linear, by_columns
from lrt.model.attention import Mask, attend, attention_mask
from lrt.model.cross_entropy import head_loss
from lrt.model.flex import block_mask
from lrt.model.kv_cache import KVCache
from lrt.model.loss import ScheduledLoss
from lrt.model.lrt import LRT
from lrt.model.ops import relu_squared, rms_norm, rotate, split, weighted_sum
from lrt.model.recurrence import advance
from lrt.schedule import Schedule
from lrt.training import checkpoint
from lrt.training.checkpoint import Writer
from lrt.training.logging import Jsonl
from lrt.training.optimizer import Optimizer, clip
from lrt.training.trainer import train
from lrt.utils.distributed import join
from lrt.utils.hardware import accelerator, peak_flops, peak_memory, resolve_device, resolve_dtype, synchronise

pytestmark = pytest.mark.filterwarnings("default")  # a warning of a driver fails no part
CONFIG = config(projection="shared", width=64, window=9, window_pattern="SL")
DOCUMENTS = replace(CONFIG, document_attention=True)
FLOATS = {"float32": (torch.float32, 2e-4), "bfloat16": (torch.bfloat16, 6e-2)}
"""Number types, and the relative error of a tensor as a whole against float64 that rounding explains."""
floats = pytest.mark.parametrize("kind", FLOATS)
ACCELERATORS = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}
GPUS = [pytest.param(name, marks=getattr(pytest.mark, name)) for name in ACCELERATORS]


def usable(name: str) -> Iterator[torch.device]:
    if name in ACCELERATORS and not ACCELERATORS[name]():
        pytest.skip(f"no {name} device here")
    strict = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(strict and name == "cpu")
    yield torch.device(name)
    torch.use_deterministic_algorithms(strict)


@pytest.fixture(params=["cpu", *GPUS])
def device(request) -> Iterator[torch.device]:
    """The CPU, as a rehearsal, and a GPU where there is one."""
    yield from usable(request.param)


@pytest.fixture(params=[pytest.param("cpu", marks=pytest.mark.slow), *GPUS])
def compiling(request) -> Iterator[torch.device]:
    """`device` of a test that compiles, which takes a CPU minutes."""
    torch._dynamo.reset()
    yield from usable(request.param)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def require_near(got: Tensor, expected: Tensor, error: float, what: str = "") -> None:
    """The error of a tensor as a whole, relative to its norm."""
    got, expected = got.detach().cpu().double(), expected.detach().cpu().double()
    assert got.shape == expected.shape
    relative = float((got - expected).norm() / expected.norm().clamp(min=1e-9))
    assert relative <= error, f"{what} is off by {relative:.2e} of its norm, more than {error:.0e}"


def graded(work, inputs: list[Tensor], device: torch.device, kind: torch.dtype) -> list[Tensor]:
    """The output of `work` on the inputs there, and their gradients for drawn weights of it."""
    leaves = [x.to(device, kind).requires_grad_() for x in inputs]
    out = work(*leaves)
    return [out, *torch.autograd.grad((out * drawn(*out.shape, seed=99).to(out)).sum(), leaves)]


# The parts of a pass.

OPS = {
    "rms_norm": lambda a, b, c: rms_norm(a),
    "relu_squared": lambda a, b, c: relu_squared(a),
    "weighted_sum": lambda a, b, c: weighted_sum([a[0, 0, 0], b[..., :1]], [b, c]),
    "rotate": lambda a, b, c: rotate(a, b.detach(), torch.cat((c[..., :8], -c[..., :8]), -1).detach()),
    "split": lambda a, b, c: split(a, 1, (slice(0, 6, 2), slice(1, 6, 2)))[1],
}


@floats
@pytest.mark.parametrize("name", OPS)
def test_ops(name: str, kind: str, device: torch.device):
    """Each hand-written operation: value and gradients."""
    number, error = FLOATS[kind]
    inputs = [drawn(3, 6, 16, seed=seed) for seed in range(3)]

    def work(*xs: Tensor) -> Tensor:
        return OPS[name](*xs) + 0 * sum(x.sum() for x in xs)

    expected = graded(work, inputs, torch.device("cpu"), torch.float64)
    for got, exact in zip(graded(work, inputs, device, number), expected, strict=True):
        assert got.dtype == number
        require_near(got, exact, error, name)


@floats
@pytest.mark.parametrize("backend", ["masked", "flex"])
@pytest.mark.parametrize("case", ["strided", "window", "documents"])
def test_attention(case: str, backend: str, kind: str, device: torch.device):
    """A strided pass of 300 of 600 positions, by one mask and by FlexAttention; gradients where the device has them."""
    number, error = FLOATS[kind]
    q, k, v = drawn(2, 4, 300, 16), drawn(2, 2, 600, 16, seed=1), drawn(2, 2, 600, 16, seed=2)
    queries = torch.arange(1, 600, 2)
    keys = torch.cat((queries, torch.arange(0, 600, 2)))
    start = torch.stack([queries // 250 * 250, queries // 130 * 130]) if case == "documents" else None
    window = 90 if case == "window" else None

    def under(masks, on: torch.device) -> Mask:
        return masks(queries.to(on), keys.to(on), window, start if start is None else start.to(on))

    cpu = torch.device("cpu")
    expected = graded(lambda *x: attend(*x, under(attention_mask, cpu)), [q, k, v], cpu, torch.float64)
    if backend == "flex" and device.type != "cuda":  # FlexAttention has no gradient there
        with torch.no_grad():
            mask = under(block_mask, device)
            require_near(attend(*(x.to(device, number) for x in (q, k, v)), mask), expected[0], error)
        return
    mask = under(block_mask if backend == "flex" else attention_mask, device)
    for got, exact in zip(graded(lambda *x: attend(*x, mask), [q, k, v], device, number), expected, strict=True):
        require_near(got, exact, error, backend)


@floats
def test_head_loss(kind: str, device: torch.device):
    """Head and loss in one, against logits and cross-entropy; and a target that is no token."""
    number, error = FLOATS[kind]
    weight, hidden = drawn(29, 16), drawn(2, 7, 16, seed=1)
    targets = torch.randint(0, 29, (2, 7), generator=torch.Generator().manual_seed(0))

    def fused(w: Tensor, h: Tensor) -> Tensor:
        scales = torch.full((1,), 0.5, device=w.device)
        return head_loss(w, 15.0, [h], [targets.to(w.device)], scales)[0][None]

    def plain(w: Tensor, h: Tensor) -> Tensor:
        logits = 15 * torch.tanh(h @ w.T / 15)
        return 0.5 * F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")[None]

    expected = graded(plain, [weight, hidden], torch.device("cpu"), torch.float64)
    for got, exact in zip(graded(fused, [weight, hidden], device, number), expected, strict=True):
        require_near(got, exact, error)
    wrong = torch.full_like(targets, 29).to(device)
    scales, inputs = torch.ones(1, device=device), (weight.to(device, number), hidden.to(device, number))
    if device.type == "cpu":
        with pytest.raises(ValueError, match="target 29 is no token"):
            head_loss(inputs[0], None, [inputs[1]], [wrong], scales)
    else:
        assert head_loss(inputs[0], None, [inputs[1]], [wrong.clamp(max=29)], scales)[0].isnan()


# Whole passes.


def loss_and_gradients(model: LRT, schedule: str, number: torch.dtype) -> dict[str, Tensor]:
    """The loss of packed rows under a schedule, in mixed precision where `number` is lower, and every gradient."""
    model.zero_grad()
    ids = packed(model.config, 3, 24).to(model.device)
    mixed = number == torch.bfloat16
    with torch.autocast(model.device.type, number) if mixed else nullcontext():
        loss = ScheduledLoss(model, Schedule.parse(schedule))(ids, ids.roll(-1, 1)).loss
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters() if p.grad is not None}}


def require_same_step(got: dict[str, Tensor], expected: dict[str, Tensor], error: float) -> None:
    """Loss, and all gradients as one vector, so that small ones may be coarse."""
    assert got.keys() == expected.keys()
    require_near(got["loss"], expected["loss"], error, "loss")
    flat = [torch.cat([x[name].cpu().double().flatten() for name in x if name != "loss"]) for x in (got, expected)]
    require_near(flat[0], flat[1], error, "the gradient")


def small(cfg: ModelConfig = CONFIG) -> LRT:
    return randomised(cfg, scale=0.3)


@floats
@pytest.mark.parametrize("schedule", [*SCHEDULES, "hop-1"])
def test_schedules(schedule: str, kind: str, device: torch.device):
    """Every schedule's loss and gradients, in float32 and mixed precision, against float64."""
    number, error = FLOATS[kind]
    expected = loss_and_gradients(small(), schedule, torch.float64)
    model = small().float().to(device)
    require_same_step(loss_and_gradients(model, schedule, number), expected, 3 * error)


@pytest.mark.parametrize("cfg", [CONFIG, DOCUMENTS], ids=["rows", "documents"])
@pytest.mark.parametrize("how", [{"attention": "masked"}, {"recompute": True}, {"attention": "flex"}], ids=str)
def test_executions(how: dict, cfg: ModelConfig, device: torch.device):
    """How passes are computed changes nothing; FlexAttention with gradient on cuda alone."""
    if how.get("attention") == "flex" and device.type != "cuda":
        pytest.skip("FlexAttention has no gradient here; tests/model/test_flex.py lifts that guard")
    expected = loss_and_gradients(small(cfg), "interleaved-2", torch.float64)
    model = small(cfg).float().to(device)
    model.execution = Execution(**how)
    require_same_step(loss_and_gradients(model, "interleaved-2", torch.float32), expected, 1e-3)


@pytest.mark.parametrize("attention", ["auto", "flex"])
@pytest.mark.parametrize("schedule", ["interleaved-2", "settled-1"])
def test_compiled_blocks(schedule: str, attention: str, compiling: torch.device):
    """`train.compile` changes nothing, with either attention."""
    if attention == "flex" and compiling.type != "cuda":
        pytest.skip("FlexAttention has no gradient here")
    expected = loss_and_gradients(small(DOCUMENTS), schedule, torch.float64)
    model = small(DOCUMENTS).float().to(compiling)
    model.execution = Execution(attention=attention, compile=True)
    require_same_step(loss_and_gradients(model, schedule, torch.float32), expected, 1e-3)


def test_optimizer(device: torch.device):
    """Three steps of Muon and AdamW with clipping move the weights as on the CPU."""
    states = []
    for on in (torch.device("cpu"), device):
        model = small().float().to(on)
        optimizer = Optimizer(model, OptimConfig(), torch.float32)
        for _ in range(3):
            loss_and_gradients(model, "settled-1", torch.float32)
            clip(model.parameters(), 1.0)
            optimizer.step(1.0, torch.zeros((), dtype=torch.bool, device=on))
        states.append(torch.cat([p.flatten() for p in model.parameters()]))
    require_near(states[1], states[0], 2e-3, "the weights")


# Decoding. In float64, which a GPU has too, so that equality is equality.


def exact_on(cfg: ModelConfig, device: torch.device) -> LRT:
    model = small(cfg).to(device, torch.float32 if device.type == "mps" else torch.float64)
    return model.requires_grad_(False)


@pytest.mark.parametrize("cfg", [CONFIG, DOCUMENTS], ids=["rows", "documents"])
@pytest.mark.parametrize("mode", ["exact", "interleaved-3", "zero_memory"])
def test_prefill_and_scores(mode: str, cfg: ModelConfig, device: torch.device):
    model, ids = exact_on(cfg, device), packed(cfg, 3, 20)
    nats = [score(m, ids.to(m.device), ids.roll(-1, 1).to(m.device), mode=mode).nats for m in (small(cfg), model)]
    require_near(nats[1], nats[0], 1e-3)


def greedy(model: LRT, run=next_logits, count: int = 24) -> list[int]:
    law = SamplingParams(max_new_tokens=count, temperature=0, stop_tokens=())
    prompts = [[3, 1, 4, 1, 5], [9, 2, 6]]
    steps = generate(model, prompts, law, run=run, mode="exact")
    return [e.token for step in steps for e in step.emissions]


def test_generate(device: torch.device):
    assert greedy(exact_on(CONFIG, device)) == greedy(small())


def test_int8_weights(device: torch.device):
    """The kernel of the CPU, or the formula elsewhere, against the formula in float64."""
    linear, x = torch.nn.Linear(64, 48, bias=False), drawn(5, 64).float()
    small = Int8Linear(linear)
    whole, scale = (small.get_buffer(name).double() for name in ("whole", "scale"))
    require_near(small.to(device)(x.to(device)), x.double() @ (whole * scale[:, None]).T, FLOATS["bfloat16"][1])


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
    law = SamplingParams(max_new_tokens=24, temperature=0.9, top_k=12, top_p=0.95, repetition_penalty=1.2, seed=4)
    rows = [
        [e.token for step in generate(m, [[3, 1, 4]], law, mode="exact") for e in step.emissions]
        for m in (exact_on(CONFIG, torch.device("cpu")), exact_on(CONFIG, device))
    ]
    assert rows[0] == rows[1]


def test_compiled_step_and_cuda_graphs(compiling: torch.device):
    """One compiled step, replayed as a CUDA graph there, over lengths that change the number of visible slots."""
    cfg = replace(DOCUMENTS, context=192)
    model, run = exact_on(cfg, compiling), compiled()
    ids = packed(cfg, 2, 140).to(compiling)
    caches = [KVCache.empty(model, 2, 150) for _ in range(2)]
    for t in range(ids.shape[1]):
        with torch.no_grad():
            out, caches[0] = advance(model, ids[:, t], caches[0], None, run)
            expected, caches[1] = advance(model, ids[:, t], caches[1], None, next_logits)
        require_near(out.clone(), expected, 1e-6, f"step {t}")


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


def test_server(device: torch.device, random_run: Path):
    """Greedy answers of a server on the device are those of one on the CPU."""
    pytest.importorskip("fastapi")
    from serving import Server, post

    texts = []
    for on in ("cpu", str(device)):
        with Server(random_run, device=on) as server:
            body = {"prompt": "def area(", "max_tokens": 12, "temperature": 0}
            texts.append(post(server, "/v1/completions", body).json()["choices"][0]["text"])
    assert texts[0] == texts[1]


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


# Training.


def trained(source: Path, run: Path, device: torch.device, **training) -> list[float]:
    """Losses of a tiny training on a device."""
    base = tiny(cpu_demo(), source, steps=6, device=device.type, log_every=1, save_every=3, eval_rows=2, **training)
    train(base, run, sinks=[Jsonl(run / "metrics.jsonl")], resume=None)
    return [e["loss"] for e in events(run, "train")]


@floats
def test_training(kind: str, source: Path, tmp_path: Path, device: torch.device):
    """Batches in page-locked memory, steps, evaluation, sample and checkpoints: the same losses as on the CPU."""
    losses = [trained(source, tmp_path / on.type, on, dtype=kind) for on in {torch.device("cpu"), device}]
    assert all(len(x) == 6 and x[-1] < x[0] for x in losses)
    torch.testing.assert_close(losses[0], losses[-1], rtol=1e-3 if kind == "float32" else 3e-2, atol=0)
    assert json.loads((tmp_path / device.type / "result.json").read_text())["peak_memory_bytes"] > 0


def test_checkpoint_across_devices(source: Path, tmp_path: Path, device: torch.device):
    """What the device trained half-way the CPU ends, and the other way round."""
    cpu = torch.device("cpu")
    whole = trained(source, tmp_path / "whole", cpu)
    for name, first, second in (("out", device, cpu), ("back", cpu, device)):
        run = tmp_path / name
        trained(source, run, first)
        shutil.rmtree(checkpoint.checkpoints(run)[-1])
        (run / "metrics.jsonl").unlink()
        loaded = checkpoint.load_model(run, second)
        assert loaded.step == 3 and loaded.model.device.type == second.type
        torch.testing.assert_close(trained(source, run, second), whole[3:], rtol=1e-3, atol=0)


def test_background_saving(source: Path, tmp_path: Path, device: torch.device, monkeypatch):
    """A checkpoint written beside the next steps holds the weights of its own step."""
    weights = []
    for background in (False, True):
        monkeypatch.setattr(lrt.training.session, "Writer", lambda _, how=background: Writer(how))
        run = tmp_path / str(background)
        trained(source, run, device, keep=3)
        weights.append(checkpoint.open_checkpoint(checkpoint.checkpoints(run)[0]).weights())
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_process_group_of_one(mode: str, source: Path, tmp_path: Path, device: torch.device, monkeypatch):
    """DDP and FSDP2 on one device, over nccl on cuda, lose what a plain process does."""
    if device.type == "mps":
        pytest.skip("no process group on mps")
    import socket

    expected = trained(source, tmp_path / "alone", device)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launched = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in launched.items():
        monkeypatch.setitem(os.environ, name, value)
    with join(device.type) as world:
        assert world.grouped and world.device.type == device.type
        losses = trained(source, tmp_path / mode, device, parallel=mode)
    torch.testing.assert_close(losses, expected, rtol=1e-3, atol=0)


# What is measured.


def test_hardware(device: torch.device):
    assert resolve_device(device.type) == device
    if device.type == "cuda":
        assert resolve_device("auto").type == "cuda" and at_once() == 1
    assert resolve_dtype("auto", device) in ("bfloat16", "float32")
    most, source = peak_flops(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    assert most > 1e8 and source
    synchronise(device)
    assert bool(accelerator()) == torch.cuda.is_available()
    assert peak_memory(device) > 0


def test_benchmarks(device: torch.device):
    """`lrt bench train` with its division of a step, and the latencies of `lrt bench decode`, at tiny sizes."""
    tiny_step = StepBenchmark(
        device=device.type, depth=2, width=32, vocab_size=64, batch=2, length=32, repeats=1, memory=False,
        schedules=("interleaved-2",),
    )  # fmt: skip
    plain, interleaved = measure(tiny_step)["rows"]
    assert plain["mfu"] > 0 and interleaved["ratio"] > 0
    if device.type != "mps":
        stepped = SteppedModel(tiny_step, "interleaved-2")
        assert parts(stepped.step, stepped.model)["attention"] > 0
    (cell,) = latencies(replace(CONFIG, context=64), device, [2], [16], 2, False, 6.0)
    assert cell["ms"] > 0
