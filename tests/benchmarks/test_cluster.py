"""The plan's formulas against what is counted: saved tensors, parameters, optimizer state, collectives, FLOPs."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace

import pytest
import torch
from helpers import config, refusal

from lrt.benchmarks.cluster import activations, fitting, gathers, matrices, muon_flops, plan, row, traffic
from lrt.cli.main import main
from lrt.config.benchmarks import Cluster
from lrt.config.model import Execution, MemoryConfig, ModelConfig
from lrt.config.recipes import recipe
from lrt.config.run import OptimConfig, RunConfig, TrainConfig
from lrt.model.loss import ScheduledLoss
from lrt.model.lrt import LRT
from lrt.schedule import Schedule
from lrt.training.optimizer import Muon, Optimizer

SHAPE = {"depth": 6, "width": 64, "heads": 4, "context": 64, "vocab_size": 64}


def kept(model: ModelConfig, schedule: str, recompute: bool) -> int:
    """Numbers that autograd keeps of one row, weights not counted."""
    built = LRT(model)
    built.execution = Execution(recompute=recompute)
    own, seen = {p.untyped_storage().data_ptr() for p in built.parameters()}, {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        if x.untyped_storage().data_ptr() not in own:
            seen[x.untyped_storage().data_ptr()] = (x.untyped_storage().nbytes() // 4, x)
        return x

    ids = torch.randint(1, model.vocab_size, (1, 64), generator=torch.Generator().manual_seed(0))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        ScheduledLoss(built, Schedule.parse(schedule))(ids, ids.roll(-1, 1))
    return sum(size for size, _ in seen.values())


@pytest.mark.parametrize("schedule", ["parallel", "interleaved-2", "interleaved-4", "refinement-1", "settled-2"])
@pytest.mark.parametrize(("projection", "kv_heads"), [("layerwise", 4), ("shared", 1), ("none", 2)])
def test_activations_are_what_autograd_keeps(schedule: str, projection, kv_heads: int):
    """Within a tenth, for every kind of pass; the buffer of passes without gradient is not autograd's."""
    model = ModelConfig(**SHAPE, kv_heads=kv_heads, memory=MemoryConfig(projection=projection, residual=False))
    passes = Schedule.parse(schedule).passes(64)
    idle = 2 * model.k * model.e * model.depth * 64 * any(not p.grad for p in passes)
    assert activations(model, passes, False) - idle == pytest.approx(kept(model, schedule, False), rel=0.1)


def test_recomputation_keeps_a_fraction():
    model = ModelConfig(**SHAPE)
    passes = Schedule.parse("interleaved-2").passes(64)
    assert kept(model, "interleaved-2", True) < activations(model, passes, True) < activations(model, passes, False) / 2


@pytest.mark.parametrize("name", ["cpu_demo", "cpu_demo_paper", "cpu_demo_plain", "d4"])
def test_state_is_what_the_optimizer_holds(name: str):
    """Weights, gradients and optimizer state of the plan against a model that has taken a step."""
    run = recipe(name)
    run = replace(run, model=replace(run.model, vocab_size=64))
    model = LRT(run.model)
    optimizer = Optimizer(model, OptimConfig())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step(0.0)
    counted = 4 * sum(x.numel() for x in optimizer.state().values())
    found = row(run, Cluster(devices=1), run.train.schedule, "ddp", False)["state_bytes"]
    assert found["optimizer"] == pytest.approx(counted, rel=1e-2)
    assert found["weights"] == found["gradients"] == 4 * sum(p.numel() for p in model.parameters())
    muon = [p for group in optimizer.muon.param_groups for p in group["params"]]
    gates = sum(p.numel() for name, p in model.named_parameters() if name.endswith("gamma"))
    assert matrices(run.model) - gates == sum(p.numel() for p in muon)


def test_flops_of_orthogonalisation():
    """Counted by torch on the matrices of a model; the small gates are left out."""
    from torch.utils.flop_counter import FlopCounterMode

    model = LRT(config(gate_width=1))
    muon = Muon([torch.nn.Parameter(torch.zeros(1))], 0.1, 0.9, 0.0, torch.float32)
    with FlopCounterMode(display=False) as counter:
        for name, p in model.named_parameters():
            if p.ndim == 2 and "embedding" not in name and "head" not in name and "gate" not in name:
                muon.orthogonalise(p.detach()[None])
    assert muon_flops(model.config) == pytest.approx(counter.get_total_flops(), rel=1e-6)


def test_gathers_are_per_step_not_per_token():
    """As test_collectives_per_step counts them: once, or once per pass and backward; no length changes that."""
    for length in (8, 64):
        for schedule, again in (("parallel", 2), ("interleaved-2", 6), ("interleaved-4", 10), ("settled-2", 4)):
            passes = Schedule.parse(schedule).passes(length)
            assert gathers(passes, reshard=False) == 1
            assert gathers(passes, reshard=True) == again
    model, passes = recipe("d12").model, Schedule.parse("interleaved-2").passes(2048)
    total = sum(p.numel() for p in meta(model).parameters())
    assert traffic(model, passes, 8, "ddp", False) == 2 * 4 * total * 7 / 8
    assert traffic(model, passes, 1, "fsdp", True) == 0


def meta(model: ModelConfig) -> LRT:
    with torch.device("meta"):
        return LRT(model)


def test_a_micro_batch_fits_and_divides():
    assert fitting(12, 5.5) == 4
    assert fitting(12, 100) == 12
    assert fitting(12, 0.9) == 0


def test_what_a_plan_says():
    """More devices are faster, sharding needs less, a smaller memory means smaller micro-batches."""
    run = recipe("d20_paper")

    def of(schedule: str, parallel: str, **cluster) -> dict:
        facts = plan(run, Cluster(**cluster))
        return next(r for r in facts["rows"] if r["schedule"] == schedule and r["parallel"] == parallel)

    one, eight = (of("interleaved-2", "ddp", devices=n) for n in (1, 8))
    assert one["sent_bytes"] == 0 < eight["sent_bytes"]
    assert 6 < one["seconds"][0] / eight["seconds"][0] <= 8
    assert of("settled-1..3", "fsdp", devices=64)["bytes"] < of("settled-1..3", "ddp", devices=64)["bytes"]
    assert of("parallel", "ddp", memory=40e9)["micro_batch"] < of("parallel", "ddp")["micro_batch"]
    assert not of("parallel", "ddp", memory=20e9)["fits"]
    assert of("parallel", "ddp")["tokens"] == pytest.approx(10 * 0.87e9, rel=0.5)


def test_the_command(capsys):
    assert main(shlex.split("plan --recipe d12 --cluster.devices 16 --json")) == 0
    facts = json.loads(capsys.readouterr().out)
    assert {r["parallel"] for r in facts["rows"]} == {"ddp", "fsdp", "fsdp reshard"}
    assert main(shlex.split("plan --recipe d12 --cluster.memory 1e9")) == 0
    out = capsys.readouterr().out
    assert "no fit" in out and "gathers" in out


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--cluster.devices 7", "--train.batch 8 does not divide among 7 devices"),
        ("--cluster.devices 0", "--cluster.devices is 0"),
        ("--cluster.efficiency 1.5", "--cluster.efficiency is 1.5"),
        ("--cluster.across -1", "--cluster.across is -1"),
        ("--recipe d99", "unknown recipe 'd99'"),
    ],
)
def test_impossible_clusters_are_one_line(flags: str, said: str, capsys):
    assert said in refusal(capsys, ["plan", *shlex.split(flags)])


def test_a_run_from_json_can_be_planned():
    assert plan(RunConfig(train=TrainConfig(batch=8)), Cluster(devices=2))["cache_bytes_per_row"] > 0


def test_stages_are_weighed_by_their_shares():
    """Half of the steps run the plain schedule, the other half one of three settled ones."""
    given, cluster = recipe("d4"), Cluster(devices=8, efficiency=0.5)
    whole, plain, *settled = (
        row(given, cluster, name, "fsdp", True)["gathers"]
        for name in ("parallel@0.5,settled-1..3", "parallel", "settled-1", "settled-2", "settled-3")
    )
    assert whole == pytest.approx((plain + sum(settled) / 3) / 2)
    assert whole != pytest.approx((plain + sum(settled)) / 4)
