"""Folders that are written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from lrt.utils.tensor_files import system_error


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[None]:
    """While a folder that was not there is written; what is there of it goes again where that fails.

    OSError: it could not be written.
    """
    made = not folder.exists()
    try:
        yield
    except BaseException as error:
        if made:
            shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, (SafetensorError, shutil.Error)):
            error = system_error(error, folder)
        reason = error.__cause__ if isinstance(error.__cause__, OSError) else error
        if isinstance(reason, OSError) and reason.strerror:
            raise OSError(f"{folder} could not be written ({reason.strerror}); free space, or choose another") from None
        raise


def require_makable(folder: Path) -> None:
    """ValueError if a folder cannot be made, or be written into: told before the work whose result goes there."""
    place = folder.absolute()
    while not os.path.lexists(place):
        place = place.parent
    if not place.is_dir():
        raise ValueError(f"{place} is no folder, so {folder} cannot be made; remove it, or choose another")
    if not os.access(place, os.W_OK | os.X_OK):
        raise ValueError(f"{folder} cannot be written into ({place} forbids it); choose another")
