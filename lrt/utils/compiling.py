"""What a compiler is told, where it keeps its results, and the calls into torch that are private to it."""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import stat
import tempfile
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from lrt.utils.files import MEBI, expand_home, one_line

logger = logging.getLogger(__name__)
F = TypeVar("F", bound=Callable[..., Any])
FOLDER = "TORCHINDUCTOR_CACHE_DIR"
"""The variable that tells torch where to keep what it compiles."""
MOST_KEPT = 512 * MEBI
"""Bytes beyond which all that was kept is dropped: some 150 steps at depth 12."""


def graph_of(function: F, **options: Any) -> F:
    """`torch.compile`, whose results are kept for later processes in a folder that is the user's alone."""
    os.environ[FOLDER] = str(_kept())
    return torch.compile(function, **options)  # pyright: ignore[reportReturnType] - as above


@cache
def _kept() -> Path:
    """The folder of what was compiled; what it holds will be executed. See docs/decoding.md#speed."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or expand_home("~/.cache"))
    variable = os.environ.get(FOLDER)
    named = None if variable == _default_of_torch() else variable
    folder = Path(named or home / "lrt" / "compiled")
    try:
        if folder.parts[:1] == ("~",):
            raise FileNotFoundError("there is no home folder")
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not _is_ours(folder):
            raise PermissionError("it is not yours alone")
        if not named:  # a folder that a person chose may hold other programs' code
            keep_below(folder, MOST_KEPT)
    except OSError as error:
        reason = one_line(error.strerror or error, 120)
        logger.warning("%s keeps nothing that is compiled (%s): this process compiles anew", folder, reason)
        folder = Path(tempfile.mkdtemp(prefix="lrt-compiled-"))
        atexit.register(partial(shutil.rmtree, folder, ignore_errors=True))
    return folder


def _default_of_torch() -> str:
    """Where torch would keep it, in /tmp; it sets the variable to that itself when a part of it is imported."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    return os.path.abspath(default_cache_dir())


def _is_ours(folder: Path) -> bool:
    """Whether nobody else can write to a folder, nor put another in its place."""
    if not hasattr(os, "getuid"):  # Windows: a folder below the user's home is the user's
        return True
    resolved = folder.resolve()
    return _safe(resolved.stat(), {os.getuid()}) and all(
        _safe(parent.stat(), {os.getuid(), 0}) or parent.stat().st_mode & stat.S_ISVTX for parent in resolved.parents
    )


def _safe(status: os.stat_result, owners: set[int]) -> bool:
    """Whether only `owners` can write; a user's private group, which has the user's number, is the user."""
    others = stat.S_IWOTH if status.st_gid == status.st_uid else stat.S_IWOTH | stat.S_IWGRP
    return status.st_uid in owners and not status.st_mode & others


def keep_below(folder: Path, most: int) -> None:
    """Drop all that a folder holds if that is more than `most` bytes; other processes write theirs again."""
    sizes = (Path(root, name).lstat().st_size for root, _, names in os.walk(folder) for name in names)
    if sum(sizes) > most:
        for part in folder.iterdir():
            shutil.rmtree(part, ignore_errors=True)


def outside_graphs(function: F) -> F:
    """The function, which a compiler does not trace: it runs between two graphs."""
    return torch.compiler.disable(function)  # pyright: ignore[reportReturnType] - its types are looser


def being_exported() -> bool:
    """Whether a program is being made of what runs, by torch.export or by torch.jit.trace."""
    traced = torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
    return torch.compiler.is_exporting() or traced


def mark_dynamic(x: Tensor, axis: int) -> None:
    """Have a compiled graph keep the size of `axis` symbolic, where it can."""
    torch._dynamo.maybe_mark_dynamic(x, axis)


def mark_in_place(x: Tensor) -> None:
    """Say that a tensor stays at its address, so that a CUDA graph may write to it."""
    torch._dynamo.mark_static_address(x)


def int8_matmul(x: Tensor, integers: Tensor, scale: Tensor) -> Tensor:
    """(x integersᵀ) · scale on a CPU, bfloat16 [N, O]: x bfloat16 [N, I], integers int8 [O, I], scale bfloat16 [O]."""
    return torch.ops.aten._weight_int8pack_mm(x, integers, scale)
