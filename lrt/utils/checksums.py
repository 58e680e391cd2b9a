"""Checksums of a folder's files, as `sha256sum` writes and checks them: SHA256SUMS beside what it covers."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from pathlib import Path

from lrt.utils.file_lock import LOCK
from lrt.utils.files import MOST_JSON, is_there, one_line, open_regular, read_text, write_text
from lrt.utils.tensor_files import as_long_as_it_says

SUMS, TENSORS = "SHA256SUMS", ".safetensors"
LINE = re.compile(r"([0-9a-f]{64}) [ *]([^/\0\\][^\0\\]*)")
FREE = (SUMS, "README.md", LOCK)
"""Left out: what others go on writing, and what is there only while the folder is written."""


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with open_regular(path, "file") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def has_hash(path: Path, expected: str) -> bool:
    """Whether a file is there with this hash; large weights of another length than they say are not read for it."""
    if not path.is_file():
        return False
    large = path.suffix == TENSORS and path.stat().st_size > MOST_JSON
    return (not large or as_long_as_it_says(path)) and file_hash(path) == expected


def sums_text(sums: dict[str, str]) -> str:
    """One line a file, by its name."""
    return "".join(f"{sums[name]}  {name}\n" for name in sorted(sums))


def write_sums(folder: Path) -> None:
    """Write SHA256SUMS of every file in `folder`; a model card may go on changing."""
    names = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    write_text(folder / SUMS, sums_text({name: file_hash(folder / name) for name in names if name not in FREE}))


def require_sums(folder: Path, needed: Callable[[str], bool] = lambda name: True) -> None:
    """ValueError unless every file that `folder`'s SHA256SUMS names, and that is `needed`, is as it was written.

    A folder without such a file is taken as it is: others write those.
    """
    sums = folder / SUMS
    if not is_there(sums):
        return
    lines = [LINE.fullmatch(line) for line in read_text(sums, "checksums").removesuffix("\n").split("\n")]
    names = [line[2] for line in lines if line is not None]
    remedy = f"restore {folder}, or, if that was meant, delete {SUMS} in it"
    if None in lines or len(set(names)) < len(names):
        raise ValueError(f"{sums} is no list of checksums; {remedy}")
    for expected, name in (line.groups() for line in lines if line is not None and needed(line[2])):
        inside = ".." not in Path(name).parts
        if not inside or not has_hash(folder / name, expected):
            raise ValueError(f"{folder / one_line(name, 80)} is missing, truncated or altered (checksum); {remedy}")
