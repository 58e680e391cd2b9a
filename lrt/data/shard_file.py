"""One file of numbers, read so that a change meanwhile is seen: neither other tokens nor a killed process."""

from __future__ import annotations

import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, final

import numpy as np

from lrt.data.manifest import AGAIN

MOST_OPEN = 128
"""Files that a stream keeps open."""
BLOCK = 2**21
"""Bytes hashed at a time."""


class _State(NamedTuple):
    """What differs once a file has been written to or replaced; its times alone could be set back."""

    device: int
    inode: int
    size: int
    modified: int
    changed: int

    @classmethod
    def of(cls, file: int) -> _State:
        stat = os.fstat(file)
        return cls(stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)


@final
class ShardFile:
    """A file of `count` numbers below `limit`. Reads go through the file, not a memory map: a truncated one would kill.

    After every read the file is looked at; where it is not what it was, its whole checksum must be the manifest's.
    ValueError: it is missing, of another size, or was altered.
    """

    def __init__(self, path: Path, count: int, dtype: np.dtype, limit: int, sha256: str):
        self.path, self._dtype, self._limit, self._sha256 = path, dtype, limit, sha256
        self._size = count * dtype.itemsize
        self._known: _State | None = None

    def verify(self, file: int, checksum: bool) -> None:
        """Compare the open file with the manifest: its size, and with `checksum` every byte."""
        state = _State.of(file)
        if state.size != self._size:
            raise ValueError(
                f"{self.path}: {state.size} bytes where the manifest says {self._size} (truncated?): {AGAIN}"
            )
        if checksum:
            digest = hashlib.sha256()
            for block in self._blocks(file):
                self._require_known(np.frombuffer(block, self._dtype))
                digest.update(block)
            if digest.hexdigest() != self._sha256:
                raise ValueError(f"{self.path}: its checksum is not the manifest's, so it was altered: {AGAIN}")
        self._known = state

    def read(self, file: int, start: int, stop: int) -> np.ndarray:
        """Numbers [start, stop) of the open file."""
        size = self._dtype.itemsize
        while True:
            raw = os.pread(file, (stop - start) * size, start * size)
            if _State.of(file) == self._known and len(raw) == (stop - start) * size:
                return self._require_known(np.frombuffer(raw, self._dtype))
            self.verify(file, checksum=True)

    def open(self) -> int:
        """A descriptor of the file."""
        try:
            return os.open(self.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError):
            raise ValueError(f"{self.path}: the shard is missing: {AGAIN}") from None
        except OSError as error:
            raise ValueError(f"{self.path}: cannot be read ({error.strerror}): check its permissions") from None

    def _blocks(self, file: int) -> Iterator[bytes]:
        offset = 0
        while offset < self._size:
            block = os.pread(file, min(BLOCK, self._size - offset), offset)
            if not block:
                return
            yield block[: len(block) // self._dtype.itemsize * self._dtype.itemsize]
            offset += len(block)

    def _require_known(self, ids: np.ndarray) -> np.ndarray:
        if ids.size and ids.max() >= self._limit:
            raise ValueError(f"{self.path}: id {ids.max()} is outside the vocabulary of {self._limit}: {AGAIN}")
        return ids


@final
class ShardFiles:
    """The files of a stream, of which the latest used are open."""

    def __init__(self, files: tuple[ShardFile, ...]):
        self.files = files
        self._open: OrderedDict[int, int] = OrderedDict()
        self._lock = threading.Lock()

    def verify(self, checksum: bool) -> None:
        """See `ShardFile.verify`."""
        for i, file in enumerate(self.files):
            with self._lock:
                file.verify(self._descriptor(i), checksum)

    def read(self, i: int, start: int, stop: int) -> np.ndarray:
        """Numbers [start, stop) of the i-th file."""
        with self._lock:
            return self.files[i].read(self._descriptor(i), start, stop)

    def _descriptor(self, i: int) -> int:
        if i not in self._open:
            while len(self._open) >= MOST_OPEN:
                os.close(self._open.popitem(last=False)[1])
            self._open[i] = self.files[i].open()
        self._open.move_to_end(i)
        return self._open[i]

    def __del__(self) -> None:
        for file in self._open.values():
            os.close(file)
