"""Folders that appear whole or not at all, whatever ends their writer."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from lrt.utils.file_lock import LOCK, FileLock, Held
from lrt.utils.files import DAY
from lrt.utils.tensor_files import system_error

PARTIAL = re.compile(r".+\.[0-9a-f]{8}\.partial")


@contextlib.contextmanager
def folder_aside(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder`, to be written and then renamed; what is still there at the end goes.

    Its writer holds a lock in it, so that what killed writers left is known, and removed here.
    OSError: it cannot be made.
    """
    aside = folder.with_name(f"{folder.name}.{uuid.uuid4().hex[:8]}.partial")
    lock = FileLock(aside / LOCK)
    try:
        aside.mkdir(parents=True)
        lock.take()
        _remove_abandoned(folder.parent)
        yield aside
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        lock.release()


def put_in_place(aside: Path, folder: Path) -> None:
    """Give a folder that was written aside its name. FileExistsError: something has that name by now."""
    (aside / LOCK).unlink(missing_ok=True)
    try:
        os.rename(aside, folder)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise FileExistsError(errno.EEXIST, "something is there by now", str(folder)) from None
        raise


def _remove_abandoned(parent: Path) -> None:
    """Delete what writers that were killed have left; a writer that is alive holds its folder.

    A lock that names no holder may be one that its writer has made and is about to take.
    """
    for folder in parent.iterdir():
        if PARTIAL.fullmatch(folder.name) and not folder.is_symlink():
            lock = FileLock(folder / LOCK)
            with contextlib.suppress(Held, OSError):
                if (folder / LOCK).is_file() and (folder / LOCK).stat().st_size:
                    lock.take()
                if lock.held or time.time() - folder.stat().st_mtime > DAY:
                    shutil.rmtree(folder, ignore_errors=True)
            lock.release()


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Write a folder that is not there: aside, where the block is told, and under its name once that is done.

    OSError: it could not be written, or another has been written there meanwhile.
    """
    try:
        with folder_aside(folder) as aside:
            yield aside
            put_in_place(aside, folder)
    except (OSError, SafetensorError) as error:
        if isinstance(error, (SafetensorError, shutil.Error)):
            error = system_error(error, folder)
        reason = error.__cause__ if isinstance(error.__cause__, OSError) else error
        if reason.strerror:
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
    os.umask(mask := os.umask(0))  # there is no other way to read it
    if mask & 0o700 and os.geteuid():
        raise ValueError(f"{folder} would forbid its own owner (umask {mask:03o}); set another first: umask 022")
