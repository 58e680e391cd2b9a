"""Locks that the system gives back when their holder ends, however it ends: flock(2) on a file."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from pathlib import Path
from typing import final

LOCK = ".lock"
"""What a lock is called in the folder that it is of."""


class Held(Exception):
    """Somebody else holds it."""


@final
class FileLock:
    """A lock on a file, which is made if need be. The file holds its holder's process number."""

    def __init__(self, path: Path):
        self.path, self._file = path, -1

    @property
    def held(self) -> bool:
        """Whether it is held by this process, for certain."""
        return self._file >= 0

    @property
    def moved(self) -> bool:
        """Whether what this process holds is no longer the file at its path: it was moved, removed or replaced."""
        if not self.held:
            return False
        try:
            return not os.path.samestat(os.lstat(self.path), os.fstat(self._file))
        except OSError:
            return True

    def take(self) -> None:
        """Hold it until `release` or the end of the process. `Held`: another does; OSError: no such folder.

        On a file system without locks nobody holds it.
        """
        if self.held:
            return
        file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
        if not stat.S_ISREG(os.fstat(file).st_mode):
            os.close(file)
            raise OSError(errno.EINVAL, "no regular file", str(self.path))
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(file, 20).decode("ascii", "replace").strip()
            os.close(file)
            raise Held(holder or "unknown") from None
        except OSError:  # no locks here: then nothing can be promised
            os.close(file)
            return
        os.ftruncate(file, 0)
        os.pwrite(file, f"{os.getpid()}\n".encode(), 0)
        self._file = file

    def release(self) -> None:
        """Give it back."""
        if self.held:
            os.close(self._file)
            self._file = -1
