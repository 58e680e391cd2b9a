"""What two processes compute for test_distributed.py, in the folder given: runs, and found.json."""

from __future__ import annotations

import collections
import json
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from helpers import config, packed, tiny
from torch.utils._python_dispatch import TorchDispatchMode

from lrt.config.recipes import cpu_demo
from lrt.config.run import Dtype, RunConfig
from lrt.model.loss import ScheduledLoss
from lrt.model.lrt import LRT
from lrt.schedule import Schedule
from lrt.training.logging import Jsonl
from lrt.training.parallel import Parallel
from lrt.training.trainer import train
from lrt.utils.distributed import join

GATHER, REDUCE, ALL_REDUCE = "_allgather_base_", "_reduce_scatter_base_", "allreduce_"
BEGUN = "begun-by-one"
"""A run that one process has begun, for two to end."""
COUNTED = ["parallel", "interleaved-2", "interleaved-4", "refinement-2", "settled-2"]
LAYERS = 3


class Collectives(TorchDispatchMode):
    """Counts the collectives that are started within it, and the numbers in their larger buffer."""

    def __init__(self):
        super().__init__()
        self.counts = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            given = [x for arg in args[:2] for x in (arg if isinstance(arg, list) else [arg])]
            sizes = [x.numel() for x in given if isinstance(x, torch.Tensor)]
            self.counts[func._opname] += 1
            self.counts[f"{func._opname} numbers"] += max(sizes)
        return func(*args, **(kwargs or {}))


def runs(source: Path, steps: int = 6, dtype: Dtype = "float32") -> dict[str, RunConfig]:
    """The trainings compared, by name, in one number type."""
    base = replace(cpu_demo(), optim=replace(cpu_demo().optim, warmup=0.0))
    adam = replace(base, optim=replace(base.optim, matrix_lr=0.0))

    late = replace(adam, optim=replace(adam.optim, memory_warmup=0.8, gamma_lr=0.1))

    def one(of: RunConfig, **training) -> RunConfig:
        return tiny(of, source, steps=steps, log_every=1, save_every=3, eval_rows=3, dtype=dtype, **training)

    return {
        "adam": one(adam), "muon": one(base),
        "adam-interleaved": one(adam, schedule="interleaved-2"),
        "adam-adaptive": one(adam, schedule="settled-1..3:tolerance=0.1:budget=1.8", micro_batch=2),
        "adam-consistent": one(late, schedule="hop-0..1:p=0.6/0.4", consistency=1.0, micro_batch=2),
        "adam-micro": one(adam, schedule="interleaved-2", micro_batch=2),
        "adam-reshard": one(adam, schedule="interleaved-2", micro_batch=2, reshard=True),
        # There the scalars' first gradients are rounding and nothing else, which AdamW scales up to a whole step.
        "muon-parallel": one(replace(base, optim=replace(base.optim, scalar_lr=0.0)), schedule="parallel"),
        "muon-interleaved": one(base, schedule="interleaved-2"),
    }  # fmt: skip


DDP = ["muon", "adam-micro", "adam-consistent", "adam-adaptive", "muon-parallel"]
FSDP = [
    "adam",
    "adam-interleaved",
    "adam-micro",
    "adam-reshard",
    "adam-consistent",
    "adam-adaptive",
    "muon",
    "muon-parallel",
    "muon-interleaved",
]


def count(world) -> dict[str, dict[str, int]]:
    """Collectives of a step, by case: FSDP2 with and without reshard, two micro-batches, DDP."""
    found, cfg = {}, config()
    rows = packed(cfg, 8, 8)[4 * world.rank :][:4]
    cases = [(s, "fsdp", reshard, 1) for s in COUNTED for reshard in (False, True)]
    cases += [("interleaved-2", mode, False, parts) for mode, parts in (("fsdp", 2), ("ddp", 1), ("ddp", 2))]
    for schedule, mode, reshard, parts in cases:
        with torch.device("meta"):
            model = LRT(cfg)
        parallel = Parallel(ScheduledLoss(model, Schedule.parse(schedule)), world, mode, 0, reshard)
        for _ in range(3):  # DDP arranges its buckets in the first step
            with Collectives() as collectives:
                for i in range(parts):
                    with parallel.accumulate(last=i + 1 == parts):
                        part = rows[i * 4 // parts : (i + 1) * 4 // parts]
                        parallel.module(part, part.roll(-1, 1)).loss.backward()
                parallel.collect()
            parallel.loss.zero_grad()
        name = f"{schedule} {mode}{' reshard' if reshard else ''}{f' x{parts}' if parts > 1 else ''}"
        found[name] = dict(collectives.counts)
    return found


BRIEF = {"ddp": ["adam", "muon", "adam-micro"], "fsdp": ["adam", "muon", "adam-micro", "adam-reshard"]}
"""What is trained in bfloat16."""


def together(folder: Path, modes: dict[str, list[str]], chosen: dict[str, RunConfig]) -> None:
    """Train these under both kinds of parallelism."""
    for mode, names in modes.items():
        for name in names:
            run, of = folder / f"{mode}-{name}", chosen[name]
            train(replace(of, train=replace(of.train, parallel=mode)), run, sinks=[Jsonl(run / "metrics.jsonl")])


def main(folder: Path, dtype: Dtype) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    if dtype == "bfloat16":
        together(folder, BRIEF, runs(folder / "text.py", dtype=dtype))
        dist.destroy_process_group()
        return
    with join("cpu") as world:
        found = {"collectives": count(world)}
        chosen = runs(folder / "text.py")
        together(folder, {"ddp": DDP, "fsdp": FSDP}, chosen)
        train(chosen["muon"], folder / BEGUN, resume=True, sinks=[Jsonl(folder / BEGUN / "metrics.jsonl")])
    if world.first:
        (folder / "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(Path(sys.argv[1]), "bfloat16" if sys.argv[2:] == ["bfloat16"] else "float32")
