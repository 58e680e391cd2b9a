"""Files as they are at a moment: what is made of them is known by that, so they must not change meanwhile."""

from collections.abc import Iterable
from pathlib import Path

FileStates = dict[Path, tuple[int, int]]  # size and modification time by file


def states_of(files: Iterable[Path]) -> FileStates:
    """What these files are now."""
    return {file: _state(file) for file in files}


def _state(file: Path) -> tuple[int, int]:
    stat = file.stat()
    return stat.st_size, stat.st_mtime_ns


def require_unchanged(states: FileStates) -> None:
    """ValueError naming a file that is not as it was."""
    for file, state in states.items():
        if not file.exists() or _state(file) != state:
            raise ValueError(f"{file}: it has changed while it was read: wait until nothing writes into it, or copy it")
