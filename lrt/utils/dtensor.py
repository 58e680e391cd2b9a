"""Tensors sharded by FSDP2 (DTensor, split along their rows) and whole ones behind the same few functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeGuard

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:  # a second of imports that only a process group needs
    from torch.distributed.tensor import DTensor


def is_sharded(x: Tensor | None) -> TypeGuard[DTensor]:
    """Whether this process holds only some rows of `x`; without a process group there is no such tensor."""
    if not (dist.is_available() and dist.is_initialized()):
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(x, DTensor)


def shard(x: Tensor) -> Tensor:
    """This process's rows of `x`, sharing its memory; a whole tensor is its own shard."""
    return x.to_local() if is_sharded(x) else x


def whole(x: Tensor) -> Tensor:
    """All of `x`. Every process must ask at the same time."""
    return x.full_tensor() if is_sharded(x) else x


@torch.no_grad()
def fill(x: Tensor, value: Tensor) -> None:
    """Copy the whole `value` into `x`, of which a process may hold a shard only; nothing is sent."""
    if is_sharded(x):
        from torch.distributed.tensor import distribute_tensor

        value = distribute_tensor(value.to(x.device, x.dtype), x.device_mesh, x.placements, src_data_rank=None)
    x.copy_(value)


def by_matrix(parts: Tensor, like: DTensor, work: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply `work` to n matrices of which every process holds some rows: each does its share of the matrices.

    Two all-to-all exchanges: a process receives n / size whole matrices, and sends the rows of the results back.

    Args:
        parts: this process's rows of the n matrices, [n, a, B].
        like: a matrix sharded like them, [A, B].
        work: takes and returns [m, A, B].
    """
    group, rows = like.device_mesh.get_group(), like.shape[0]
    size, (n, own, width) = dist.get_world_size(group), parts.shape
    most, share = -(-rows // size), -(-n // size)  # the last processes may hold fewer rows, or none
    sent = F.pad(parts, (0, 0, 0, most - own, 0, share * size - n)).contiguous()
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    blocks = received.view(size, share, most, width).transpose(0, 1).reshape(share, size * most, width)
    done = F.pad(work(blocks[:, :rows]), (0, 0, 0, size * most - rows))
    dist.all_to_all_single(sent, done.view(share, size, most, width).transpose(0, 1).contiguous(), group=group)
    return sent[:n, :own]
