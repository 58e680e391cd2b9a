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


def start() -> None:
    """Run the command line."""
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
