"""The process group: who takes part in a run, and the few collectives that training and evaluation need.

Processes are started by torchrun (or anything that sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT); without one,
a process is alone and nothing here communicates.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar, final

import torch
import torch.distributed as dist
from torch import Tensor

from lrt.utils.hardware import resolve_device

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
        """The sum of `x`, a tensor on the device, over all processes; it is written into `x` and returned."""
        if self.size > 1:
            dist.all_reduce(x)
        return x

    def any(self, flag: bool) -> bool:
        """Whether `flag` is True on any process; the host waits for the device."""
        return flag if self.size == 1 else bool(self.total(torch.tensor(float(flag), device=self.device)))

    def gather(self, x: Tensor) -> Tensor:
        """Every process's `x`, all of one shape, one after the other along the first dimension."""
        if self.size == 1:
            return x
        mine = x.to(self.device)
        parts = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(parts, mine)
        return torch.cat(parts).to(x.device)

    def agree(self, work: Callable[[], int | None]) -> int:
        """What `work` returns on the first process, on every process; 0 for nothing.

        Where it raises there, the others end by SystemExit(2), without a message: the first process has one.
        """
        if self.size == 1:
            return work() or 0
        answer = torch.tensor(FAILED, device=self.device)
        try:
            if self.first:
                answer.fill_(work() or 0)
        finally:
            dist.broadcast(answer, 0)
        if int(answer) == FAILED:
            raise SystemExit(2)
        return int(answer)

    def in_turn(self, work: Callable[[], T]) -> T:
        """`work` on the first process, then on the others, which find what it has made."""
        made: list[T] = []
        self.agree(lambda: made.append(work()))
        return made[0] if made else work()


def _require_place() -> None:
    """ValueError if RANK and WORLD_SIZE name no place among the processes: the others would be waited for."""
    rank, size = (os.environ[name] for name in ("RANK", "WORLD_SIZE"))
    fine = all(re.fullmatch("[0-9]{1,9}", text) for text in (rank, size)) and int(rank) < int(size)
    if not fine:
        raise ValueError(f"RANK is {rank[:20]!r} and WORLD_SIZE {size[:20]!r}; start all with torchrun, or unset them")


@contextmanager
def join(device: str) -> Iterator[World]:
    """The world of this process, on `auto`, `cpu` or `cuda`; within it the process group exists, if there is any.

    ValueError: no such device, fewer devices than processes, or the others cannot be reached.
    """
    chosen = resolve_device(device)
    if dist.is_initialized():  # by the caller, who also ends it
        yield World(chosen, dist.get_rank(), dist.get_world_size(), grouped=True)
        return
    if not os.environ.keys() >= LAUNCHED:
        yield World(chosen)
        return
    _require_place()
    if chosen.type == "cuda":
        place, there = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if place >= there:
            raise ValueError(f"process {place} of this machine has no GPU: there are {there}; start no more processes")
        chosen = torch.device("cuda", place)
        torch.cuda.set_device(chosen)
    try:
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise ValueError(f"cannot join the other processes at {address} ({error}); start all with torchrun") from None
    yield World(chosen, dist.get_rank(), dist.get_world_size(), grouped=True)
    dist.destroy_process_group()  # not after an error: the process ends, and waiting for the others might not
