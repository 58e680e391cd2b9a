"""`python -m lrt`, and the command `lrt`: an interruption ends without a traceback, from the first line to the last."""

import os
import signal
import sys
from types import FrameType
from typing import NoReturn

IMPORTING = "<frozen importlib._bootstrap>"


def _interrupted(number: int, frame: "FrameType | None") -> None:
    """KeyboardInterrupt, but while modules are loaded: there any of them may catch it, or tell it at length."""
    while frame is not None:
        if frame.f_code.co_filename == IMPORTING:
            _leave(number, None)
        frame = frame.f_back
    raise KeyboardInterrupt


def _leave(number: int, _: "FrameType | None") -> NoReturn:
    try:
        os.write(2, b"lrt: interrupted\n")
    finally:
        os._exit(128 + number)


def _open_streams() -> None:
    """Open on nothing what was closed: else the next file takes its number, and what is printed goes into that."""
    while (number := os.open(os.devnull, os.O_RDWR)) < 3:
        pass
    os.close(number)
    for stream in range(3):
        os.set_inheritable(stream, True)  # a process that this one starts needs them too
    sys.stdin = sys.stdin or os.fdopen(0, closefd=False)
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)


def start() -> None:
    """Run the command line."""
    _open_streams()
    signal.signal(signal.SIGINT, _interrupted)
    try:
        from lrt.cli.main import main

        code = main()
    except KeyboardInterrupt:  # between two imports
        _leave(signal.SIGINT, None)
    signal.signal(signal.SIGINT, _leave)  # while the interpreter ends
    sys.exit(code)


if __name__ == "__main__":
    start()
