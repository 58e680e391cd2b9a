"""Tensors that somebody else may have stored: safetensors from regular files alone, with errors of one line.

The library maps such a file into memory. If that is then shortened or overwritten in place, the process is killed or
goes on with other numbers, minutes later. So what is read here is read once, and belongs to this process.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lrt.utils.files import MOST_JSON, RESTORE, one_line, open_regular, parse_json, require_fields, require_kind

TYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "U16": torch.uint16, "I16": torch.int16,
    "U32": torch.uint32, "I32": torch.int32, "U64": torch.uint64, "I64": torch.int64, "F16": torch.float16,
    "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64,
}  # fmt: skip
"""Number types by their names in the format."""
ABOUT, SHORTENED = "__metadata__", "it was shortened while it was read"
FIELDS = {"dtype": str, "shape": list, "data_offsets": list}


class StoredTensors(NamedTuple):
    """What a safetensors file holds."""

    tensors: dict[str, Tensor]
    about: dict[str, str]
    """Its texts by name."""


def read_tensors(path: Path | str, label: str, device: str | torch.device = "cpu") -> StoredTensors:
    """A safetensors file. ValueError: it does not exist, is a pipe or a device, is damaged, or changes meanwhile."""
    with open_regular(path, label) as file:
        try:
            return _stored(file, device)
        except (OSError, ValueError, RuntimeError, MemoryError) as error:  # RuntimeError: torch finds no memory
            reason = one_line(error, 120)
            raise ValueError(f"{label} {path} cannot be read as safetensors ({reason}); {RESTORE}") from None


def as_long_as_it_says(path: Path) -> bool:
    """Whether a file is safetensors of the length that its header says: a sparse one can be of any, and costs nothing.

    ValueError: it is no regular file, or cannot be read.
    """
    with open_regular(path, "weights") as file:
        try:
            length, header = _header(file)
            header.pop(ABOUT, None)
            end = max((_place(*entry)[1] for entry in header.items()), default=0)
        except ValueError:
            return False
        return 8 + length + end == os.fstat(file.fileno()).st_size


def _header(file: io.BufferedReader) -> tuple[int, dict[str, Any]]:
    """8 bytes, the length of a header; then the header, in JSON."""
    length = int.from_bytes(_bytes(file, 8), "little")
    if length > min(MOST_JSON, os.fstat(file.fileno()).st_size - 8):
        raise ValueError("its header is longer than the file, or than any")
    return length, require_kind(parse_json(_bytes(file, length), "its header"), dict, "its header")


def _stored(file: io.BufferedReader, device: str | torch.device) -> StoredTensors:
    """The header, then the tensors' bytes without gaps."""
    before = os.fstat(file.fileno())
    length, header = _header(file)
    about = require_kind(header.pop(ABOUT, None) or {}, dict, ABOUT)
    for name, text in about.items():
        require_kind(text, str, f"{ABOUT}: {one_line(name, 40)}")
    tensors, end = {}, 0
    for name, entry in sorted(header.items(), key=lambda item: _place(*item)):
        tensors[name], end = _tensor(file, name, entry, end).to(device), entry["data_offsets"][1]
    if 8 + length + end != before.st_size:
        raise ValueError(f"its tensors need {8 + length + end:,} bytes, it has {before.st_size:,}")
    after = os.fstat(file.fileno())
    if (after.st_size, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
        raise ValueError("it was written to while it was read")
    return StoredTensors({name: tensors[name] for name in header}, about)


def write_tensors(tensors: Mapping[str, Tensor], path: Path, about: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file, texts beside the tensors. OSError as the system has it: it cannot be written."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(dict(tensors), path, None if about is None else dict(about))
    except SafetensorError as error:
        raise system_error(error, path) from None


def system_error(error: Exception, path: Path) -> OSError:
    """What the system said when a library could not write."""
    number = re.search(r"(?:os error|Errno) (\d+)", str(error))
    code = int(number[1]) if number else errno.EIO
    return OSError(code, os.strerror(code), str(path))


def tensors_hash(tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> str:
    """SHA-256 of what a file holds: every tensor's name, type, shape and bytes, and the texts beside them."""
    digest = hashlib.sha256(json.dumps(sorted(about.items())).encode())
    for name, tensor in sorted(tensors.items()):
        raw = tensor.detach().cpu().contiguous()
        digest.update(json.dumps([name, str(raw.dtype), list(raw.shape)]).encode())
        digest.update(raw.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _place(name: str, entry: Any) -> tuple[int, int]:
    """Where a tensor's bytes begin and end. ValueError: its entry in the header is none."""
    where = one_line(name, 40)
    require_fields(require_kind(entry, dict, where), FIELDS, where)
    for number in (*entry["shape"], *entry["data_offsets"]):
        if require_kind(number, int, where) < 0:
            raise ValueError(f"{where}: {number} is negative")
    if len(entry["data_offsets"]) != 2 or entry["dtype"] not in TYPES:
        raise ValueError(f"{where}: the type {one_line(entry['dtype'], 20)} or the place is unknown")
    return entry["data_offsets"][0], entry["data_offsets"][1]


def _tensor(file: io.BufferedReader, name: str, entry: dict[str, Any], begin: int) -> Tensor:
    """The tensor of an entry, whose bytes come next and begin where the last one's ended."""
    (first, end), shape, dtype = entry["data_offsets"], entry["shape"], TYPES[entry["dtype"]]
    if first != begin or end - first != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{one_line(name, 40)}: its place in the file does not fit its shape")
    left = os.fstat(file.fileno()).st_size - file.tell()
    if left < 0:  # what came before was read ahead
        raise ValueError(SHORTENED)
    if end - first > left:
        raise ValueError(f"{one_line(name, 40)}: {end - first:,} bytes, of which {left:,} are there")
    raw = torch.empty(end - first, dtype=torch.uint8)
    if file.readinto(raw.numpy().data) != len(raw):
        raise ValueError(SHORTENED)
    return raw.view(dtype).view(shape)


def _bytes(file: io.BufferedReader, count: int) -> bytes:
    """The next so many bytes."""
    content = file.read(count)
    if len(content) != count:
        raise ValueError("it ends inside its header")
    return content
