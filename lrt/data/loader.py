"""The loader: batches as a pure function of (seed, step, rank), so that resuming needs nothing but the step."""

import collections
from collections.abc import Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple, Protocol, final

import numpy as np
import torch

from lrt.model.shapes import IGNORE

AHEAD = 4  # batches that `prefetch` keeps ready


class RowSource(Protocol):
    """What the loader reads: a sequence of ids such as `TokenStream`."""

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> np.ndarray: ...

    def learned(self, start: int, stop: int) -> np.ndarray:
        """Which of these ids are targets, bool [stop - start]; all, where nothing else is said."""
        return np.ones(stop - start, np.bool_)


class Batch(NamedTuple):
    """Rows of one rank.

    tokens, targets: int64 [B/world, T], targets one ahead, IGNORE where that id is none. starts: bool, at BOS.
    """

    tokens: torch.Tensor
    targets: torch.Tensor
    starts: torch.Tensor


class Batches(Protocol):
    """Batches by step."""

    def batch(self, step: int) -> Batch: ...


Row = tuple[np.ndarray, np.ndarray]
"""T + 1 ids of a stream, and which of them are targets."""


def as_batch(rows: Iterable[Row], bos: int) -> Batch:
    """Rows as a batch."""
    ids, learned = (torch.from_numpy(np.stack(part)) for part in zip(*rows, strict=True))
    tokens = ids[:, :-1].contiguous()
    return Batch(tokens, ids[:, 1:].masked_fill(~learned[:, 1:], IGNORE), tokens == bos)


@final
@dataclass(frozen=True, kw_only=True)
class BatchShape:
    """What batches are like, and whose share of each is taken: the global batch is the same on any number of ranks.

    Step s takes the global rows s B ... s B + B - 1 of an endless sequence, and rank k the k-th run of B/world of them.
    ValueError: numbers that do not fit.
    """

    batch: int
    """Global rows per step, B."""
    length: int
    """Tokens per row, T."""
    bos: int
    """The id that starts documents."""
    seed: int
    """Of the order, or of what is drawn."""
    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        batch, length, seed, rank, world = self.batch, self.length, self.seed, self.rank, self.world
        if min(batch, length) < 1 or seed < 0:
            raise ValueError(f"batch {batch} and length {length} must be positive, and seed {seed} not negative")
        if not 0 <= rank < world or batch % world:
            raise ValueError(
                f"batch {batch}, rank {rank}, world {world}: the batch must be a multiple of the world size"
            )

    def rows(self, step: int) -> range:
        """This rank's rows of a step."""
        if step < 0:
            raise ValueError(f"step {step} is negative: steps count from 0")
        share = self.batch // self.world
        first = step * self.batch + self.rank * share
        return range(first, first + share)


@final
class Loader:
    """Rows of a stream, in a fresh random order each epoch.

    Row r is ids [r T, r T + T + 1) of the stream: neighbours share one id, so each id of the rows but the very first is
    a target once an epoch. Attribute `rows`: rows per epoch. ValueError: a stream without a row.
    """

    def __init__(self, stream: RowSource, shape: BatchShape, *, shuffle: bool = True) -> None:
        if len(stream) < shape.length + 1:
            raise ValueError(
                f"the split has {len(stream)} tokens but one row of length {shape.length} needs {shape.length + 1}: "
                "give more text, a shorter train.length or, if it is the one held out, a larger data.validation"
            )
        self.rows = (len(stream) - 1) // shape.length
        self._stream, self._shape, self._shuffle = stream, shape, shuffle
        self._orders: dict[int, np.ndarray] = {}

    def batch(self, step: int) -> Batch:
        """This rank's rows of a step, on the CPU; the same whenever and in whatever order steps are asked for."""
        return as_batch(map(self.row, self._shape.rows(step)), self._shape.bos)

    def row(self, g: int) -> Row:
        """Row `g` of the endless sequence of epochs."""
        epoch, place = divmod(g, self.rows)
        start = (int(self._order(epoch)[place]) if self._shuffle else place) * self._shape.length
        stop = start + self._shape.length + 1
        return self._stream.read(start, stop), self._stream.learned(start, stop)

    def _order(self, epoch: int) -> np.ndarray:
        """The permutation of rows in an epoch, int64 [rows]; two are kept, as a batch may span two epochs."""
        order = self._orders.get(epoch)
        if order is None:
            # Raw bits, unlike numpy's own shuffle, are promised to stay the same in later versions.
            bits = np.random.PCG64(np.random.SeedSequence([self._shape.seed, epoch])).random_raw(self.rows)
            order = np.argsort(bits, kind="stable")
            self._orders = {e: rows for e, rows in self._orders.items() if e == epoch - 1} | {epoch: order}
        return order


def prefetch(loader: Batches, first_step: int, last_step: int, pin: bool = False) -> Generator[Batch, None, None]:
    """Yield the batches of steps [first_step, last_step), built ahead in one background thread.

    pin: put them into page-locked memory, for asynchronous copies to a GPU. An error in the thread is raised here.
    Closing the generator, or leaving it by an exception, ends the thread.
    """

    def build(step: int) -> Batch:
        batch = loader.batch(step)
        return Batch(*(tensor.pin_memory() for tensor in batch)) if pin else batch

    pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="lrt-prefetch")
    ready = collections.deque(pool.submit(build, s) for s in range(first_step, min(first_step + AHEAD, last_step)))
    try:
        for step in range(first_step + AHEAD, last_step + AHEAD):
            batch = ready.popleft().result()
            if step < last_step:
                ready.append(pool.submit(build, step))
            yield batch
    finally:
        pool.shutdown(cancel_futures=True)
