"""One training a folder: a lock that the system gives back when its holder ends, however it ends."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import final

LOCK = ".lock"


@final
class RunLock:
    """The right to train in a run's folder; flock(2) on a file in it, which a killed process does not keep."""

    def __init__(self, run: Path):
        self.run, self._file = run, -1

    def take(self) -> None:
        """Hold the folder, if it is there. ValueError naming the process that holds it already."""
        if self._file >= 0 or not self.run.is_dir():
            return
        file = os.open(self.run / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(file, 20).decode("ascii", "replace").strip()
            os.close(file)
            raise ValueError(
                f"{self.run} is being trained by process {holder or 'unknown'}; wait for it or end it, "
                "or choose another --out"
            ) from None
        except OSError:  # a file system without locks: then nothing can be promised
            os.close(file)
            return
        os.ftruncate(file, 0)
        os.pwrite(file, f"{os.getpid()}\n".encode(), 0)
        self._file = file

    def release(self) -> None:
        """Give the folder back."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
