"""What can go wrong in a long training: signals, memory, lost processes, numbers that are not finite. One line each."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import final

import torch
import torch.distributed as dist
from torch import Tensor

from lrt.config.run import TrainConfig
from lrt.model.lrt import LRT
from lrt.utils.distributed import World
from lrt.utils.dtensor import shard

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""What asks for an end; SIGHUP comes when a terminal is closed."""


@final
class Stop:
    """Whether this process was asked to stop; in `listening` a first signal only asks, a second one kills.

    A SIGHUP that is ignored, as `nohup` has it, stays so.
    """

    def __init__(self) -> None:
        self.signal = 0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within it SIGNALS only ask, so that no step is cut in two."""
        if threading.current_thread() is not threading.main_thread():  # only the main thread may listen
            yield
            return
        before = {s: signal.getsignal(s) for s in SIGNALS}
        if before[signal.SIGHUP] == signal.SIG_IGN:
            del before[signal.SIGHUP]
        for s in before:
            signal.signal(s, self._ask)
        try:
            yield
        finally:
            for s, handler in before.items():
                signal.signal(s, handler)

    def _ask(self, number: int, _: object) -> None:
        self.signal = number
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

    def leave(self) -> None:
        """End the process as the signal would have: exit code 143 after SIGTERM, 130 after SIGINT, 129 after SIGHUP."""
        raise KeyboardInterrupt if self.signal == signal.SIGINT else SystemExit(128 + self.signal)


@contextmanager
def in_one_line(config: TrainConfig) -> Iterator[None]:
    """Turn what a machine can do to a training into one line with a remedy.

    ValueError: out of memory. ConnectionError: another process has died.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        text = " ".join(str(error).split())
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in text:
            raise ValueError(out_of_memory(config)) from None
        if isinstance(error, dist.DistError) or "gloo" in text:
            raise ConnectionError(
                f"another process of this run has ended or cannot be reached ({text[:120]}); continue with --resume, "
                "or start it with torchrun --max-restarts and --or-resume"
            ) from None
        raise


def out_of_memory(config: TrainConfig) -> str:
    """What helps, in the order of what it costs."""
    knobs = [] if config.recompute else ["set train.recompute (a third slower)"]
    knobs += [f"lower train.micro_batch (now {config.micro_batch or 'the whole share of the batch'})"]
    knobs += [
        f"choose a schedule with fewer passes with gradient than {config.schedule} (smaller S or K, or settled-R)"
    ]
    knobs += [f"shorten train.length (now {config.length})"]
    knobs += ["train.reshard"] if config.parallel == "fsdp" else ["shard the model: torchrun and train.parallel fsdp"]
    return f"out of memory; {', or '.join(knobs)}"


@final
class Skips:
    """Steps that were skipped since their loss or gradient was not finite, counted on the device."""

    def __init__(self, total: int, device: torch.device):
        self.counts = torch.tensor([total, 0, 0], device=device)  # in all, in a row up to now, longest row

    def add(self, skip: Tensor) -> None:
        """Count a step; `skip` is a boolean on the device."""
        total, row, longest = self.counts
        row = (row + 1) * skip
        self.counts = torch.stack((total + skip, row, torch.maximum(longest, row)))

    def read(self) -> tuple[int, int, int]:
        """How many in all, in a row up to now, and most in a row; the host waits for the device."""
        total, row, longest = self.counts.tolist()
        return total, row, longest


def not_finite(model: LRT, per_pass: Tensor, world: World) -> str:
    """What is not finite after a backward pass: weights, losses of passes, gradients. Every process must ask."""
    names = [name for name, _ in model.named_parameters()]
    bad = [[_bad(p) for p in model.parameters()], [_bad(p.grad) for p in model.parameters()]]
    weights, gradients = world.total(torch.tensor(bad, device=world.device)).tolist()
    culprits = {"weights": [n for n, x in zip(names, weights, strict=True) if x]}
    culprits["losses of passes"] = [str(i) for i in (~per_pass.isfinite()).nonzero().flatten().tolist()]
    culprits["gradients"] = [n for n, x in zip(names, gradients, strict=True) if x]
    sentences = [
        f"{kind} {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}" for kind, names in culprits.items() if names
    ]
    return "not finite when computed again: " + ("; ".join(sentences) or "nothing, so the cause may be the machine")


def finite(model: LRT) -> bool:
    """Whether all weights of this process are finite numbers."""
    return not any(_bad(p) for p in model.parameters())


def _bad(x: Tensor | None) -> float:
    return 0.0 if x is None else float(not shard(x).isfinite().all())
