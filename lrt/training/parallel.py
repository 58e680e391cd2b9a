"""Training on many processes: DDP or FSDP2 around the loss, and when gradients travel."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, final

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lrt.model.loss import ScheduledLoss
from lrt.model.parameters import initialise
from lrt.utils.distributed import World
from lrt.utils.dtensor import is_sharded
from lrt.utils.require import require

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule


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
        initialise(loss.model, loss.model.config, seed)
        self.parameters = list(loss.parameters())
        if world.grouped and mode != "fsdp":
            self.module = DistributedDataParallel(loss, gradient_as_bucket_view=True)

    def _shard(self) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import FSDPModule, fully_shard

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
        scalars = [p.grad for p in self.parameters if p.grad is not None and not is_sharded(p)]
        if scalars and self.world.size > 1:
            mean = self.world.total(torch.stack(scalars)) / self.world.size
            for own, new in zip(scalars, mean, strict=True):
                own.copy_(new)

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Within it the bare model can be called (evaluation): the root is whole, and the blocks unless `reshard`."""
        modules = self.blocks[:1] if self.reshard else self.blocks
        for m in modules:
            m.unshard()
        yield
        for m in modules:
            m.reshard()
