"""Tensors that somebody else may have stored: safetensors from regular files alone, with errors of one line."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lrt.utils.files import RESTORE, one_line


class StoredTensors(NamedTuple):
    """What a safetensors file holds."""

    tensors: dict[str, Tensor]
    about: dict[str, str]
    """Its texts by name."""


def read_tensors(path: Path | str, what: str, device: str | torch.device = "cpu") -> StoredTensors:
    """A safetensors file. ValueError: it does not exist, is a pipe or a device, or is damaged."""
    from safetensors import safe_open

    if not Path(path).is_file():
        raise ValueError(f"{what} {path} cannot be read: it is no regular file; {RESTORE}")
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return StoredTensors(tensors, file.metadata() or {})
    except Exception as error:  # the library raises SafetensorError, OSError, KeyError for types that torch lacks, ..
        raise ValueError(f"{what} {path} cannot be read as safetensors ({one_line(error, 120)}); {RESTORE}") from None
