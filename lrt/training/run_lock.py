"""One training a folder."""

from __future__ import annotations

from pathlib import Path
from typing import final

from lrt.utils.file_lock import LOCK, FileLock, Held


@final
class RunLock:
    """The right to train in a run's folder, which a killed process does not keep."""

    def __init__(self, run: Path):
        self.run, self._lock = run, FileLock(run / LOCK)

    def __enter__(self) -> RunLock:
        """Give the folder back at the end of the block, if it was taken."""
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def take(self) -> None:
        """Hold the folder, if it is there. ValueError naming the process that holds it already."""
        if not self.run.is_dir():
            return
        try:
            self._lock.take()
        except Held as holder:
            raise ValueError(
                f"{self.run} is being trained by process {holder}; wait for it or end it, or choose another --out"
            ) from None

    def require_place(self) -> None:
        """ValueError if the folder was moved or removed while it was trained: nothing is written where it was."""
        if self._lock.moved:
            raise ValueError(
                f"{self.run} was moved or removed while it was trained, so nothing more is written there; go on from "
                "its last checkpoint with --resume and its new place"
            )

    def release(self) -> None:
        """Give the folder back."""
        self._lock.release()
