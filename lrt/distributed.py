"""Many processes: who takes part, DDP or FSDP2 around the loss, and the few collectives that training needs.

Processes are started by torchrun (or anything that sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT); without one,
a process is alone and nothing here communicates.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar, final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from lrt.hardware import resolve_device
from lrt.loss import ScheduledLoss
from lrt.model import initialise
from lrt.model_config import require

T = TypeVar("T")
FAILED = -(2**62)
LAUNCHED = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
PATIENCE = timedelta(minutes=30)
"""How long a process waits for the others in a collective before it gives up."""


@final
@dataclass(frozen=True)
class World:
    """The processes of a run, and this one's place among them."""

    device: torch.device
    rank: int = 0
    size: int = 1
    grouped: bool = False
    """Whether there is a process group, of however many processes."""

    @property
    def first(self) -> bool:
        """Whether this is the process that prepares data, writes and reports."""
        return self.rank == 0

    def total(self, x: Tensor) -> Tensor:
        """The sum over processes of a tensor on the device, in its place."""
        if self.size > 1:
            dist.all_reduce(x)
        return x

    def any(self, flag: bool) -> bool:
        """Whether any process says so; the host waits for the device."""
        return flag if self.size == 1 else bool(self.total(torch.tensor(float(flag), device=self.device)))

    def gather(self, x: Tensor) -> Tensor:
        """Every process's `x`, all of one shape, one after the other along the first dimension."""
        if self.size == 1:
            return x
        here = x.to(self.device)
        parts = [torch.empty_like(here) for _ in range(self.size)]
        dist.all_gather(parts, here)
        return torch.cat(parts).to(x.device)

    def agree(self, work: Callable[[], int]) -> int:
        """What `work` gives on the first process, told to all.

        Where it fails there, the others leave without a word: one message is enough.
        """
        if self.size == 1:
            return work()
        told = torch.tensor(FAILED, device=self.device)
        try:
            if self.first:
                told.fill_(work())
        finally:
            dist.broadcast(told, 0)
        if int(told) == FAILED:
            raise SystemExit(2)
        return int(told)

    def in_turn(self, work: Callable[[], T]) -> T:
        """`work` on the first process, then on the others, which find what it has made."""
        made: list[T] = []

        def first() -> int:
            made.append(work())
            return 0

        self.agree(first)
        return made[0] if made else work()


@contextmanager
def join(device: str) -> Iterator[World]:
    """The world of this process, on `auto`, `cpu` or `cuda`; within it the process group exists, if there is any.

    ValueError: no such device, fewer devices than processes, or the others cannot be reached.
    """
    found = resolve_device(device)
    if dist.is_initialized():  # by the caller, who also ends it
        yield World(found, dist.get_rank(), dist.get_world_size(), grouped=True)
        return
    if not os.environ.keys() >= LAUNCHED:
        yield World(found)
        return
    if found.type == "cuda":
        place, there = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        require(
            place < there, f"process {place} of this machine has no GPU: there are {there}; start no more processes"
        )
        found = torch.device("cuda", place)
        torch.cuda.set_device(found)
    try:
        dist.init_process_group("nccl" if found.type == "cuda" else "gloo", timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise ValueError(f"cannot join the other processes at {address} ({error}); start all with torchrun") from None
    yield World(found, dist.get_rank(), dist.get_world_size(), grouped=True)
    dist.destroy_process_group()  # not after an error: the process ends, and waiting for the others might not


@final
class Parallel:
    """One loss module on all processes: as it is, replicated (DDP), or sharded (FSDP2).

    FSDP2 shards every block, and the root (embedding, head, shared projection) with the loss: one gather and one
    reduce-scatter of each a step (in micro-batches up to two), however many passes the schedule has, since blocks stay
    gathered from their first pass until the gradients are complete. With `reshard` they are given back after every
    pass, and gathered for each pass and its backward again: slower, but only one block is whole at a time. Scalars are
    replicated.
    """

    def __init__(self, loss: ScheduledLoss, world: World, mode: str, seed: int, reshard: bool = False):
        """Allocate the model of `loss`, which is on the meta device, on the world's, and initialise it from `seed`."""
        self.loss, self.world, self.reshard = loss, world, reshard
        self.module: nn.Module = loss
        self.blocks: list[FSDPModule] = []
        if world.grouped and mode == "fsdp":
            self._shard()
        loss.to_empty(device=world.device)
        initialise(loss.model, seed)
        self.parameters = list(loss.parameters())
        if world.grouped and mode != "fsdp":
            self.module = DistributedDataParallel(loss, gradient_as_bucket_view=True)

    def _shard(self) -> None:
        model = self.loss.model
        require(not model.execution.compile, "train.compile is not possible under fsdp; set one of them off")
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")  # we change none in place
        mesh = init_device_mesh(self.world.device.type, (self.world.size,))
        scalars = {p for p in model.parameters() if p.ndim == 0}  # which FSDP2 does not take
        for block in model.blocks:
            fully_shard(block, mesh=mesh, reshard_after_forward=self.reshard, ignored_params=scalars)
        fully_shard(self.loss, mesh=mesh, reshard_after_forward=False, ignored_params=scalars)
        self.blocks = [m for m in self.loss.modules() if isinstance(m, FSDPModule)]
        for m in self.blocks:  # or the end of the last pass's backward would give back what earlier ones still need
            m.set_reshard_after_backward(self.reshard, recurse=False)

    @contextmanager
    def accumulate(self, last: bool) -> Iterator[None]:
        """Around forward and backward of a micro-batch: gradients travel with the last one's."""
        if isinstance(self.module, DistributedDataParallel) and not last:
            with self.module.no_sync():
                yield
            return
        for m in self.blocks[:1]:
            m.set_requires_gradient_sync(last)
            m.set_is_last_backward(last)
        yield

    @torch.no_grad()
    def collect(self) -> None:
        """After the last backward: give blocks back, complete the gradients that FSDP2 does not care for."""
        if not self.blocks:
            return
        for m in self.blocks:
            m.reshard()
        for p in self.parameters:
            if p.grad is None:  # a pass without memory: zero, as everywhere else
                p.grad = torch.zeros_like(p)
        scalars = [p.grad for p in self.parameters if p.grad is not None and not isinstance(p, DTensor)]
        if scalars and self.world.size > 1:
            mean = self.world.total(torch.stack(scalars)) / self.world.size
            for own, new in zip(scalars, mean, strict=True):
                own.copy_(new)

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Within it the bare model can be called (evaluation): the root is whole, and the blocks unless `reshard`."""
        kept = self.blocks[:1] if self.reshard else self.blocks
        for m in kept:
            m.unshard()
        yield
        for m in kept:
            m.reshard()
