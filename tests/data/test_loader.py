"""The loader: a pure function of seed, step and rank; and a prefetcher that leaves no thread behind."""

import threading

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lrt.data.loader import BatchShape, Loader, RowSource, prefetch
from lrt.data.shards import open_split, write_shards
from lrt.data.tokenizer import ByteTokenizer

BOS = 0
ONE = BatchShape(batch=1, length=10, bos=BOS, seed=0)


class Counting(RowSource):
    """The stream 0, 1, 2, ...: an id tells where it came from."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def read(self, start: int, stop: int) -> np.ndarray:
        assert 0 <= start <= stop <= self.size
        return np.arange(start, stop)


def loader(size=101, shuffle=True, **options) -> Loader:
    shape = BatchShape(**({"batch": 4, "length": 10, "bos": BOS, "seed": 7} | options))
    return Loader(Counting(size), shape, shuffle=shuffle)


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def first_ids(source: Loader, steps) -> list[int]:
    return [int(token) for step in steps for token in source.batch(step).tokens[:, 0]]


def prefetchers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("lrt-prefetch")]


def test_batches_have_the_promised_shapes_and_shift():
    batch = loader().batch(0)
    assert batch.tokens.shape == batch.targets.shape == batch.starts.shape == (4, 10)
    assert batch.tokens.dtype == batch.targets.dtype == torch.int64
    assert batch.starts.dtype == torch.bool
    assert torch.equal(batch.targets, batch.tokens + 1)


def test_an_epoch_takes_every_row_once_and_each_epoch_anew():
    source = loader(batch=5)
    assert source.rows == 10
    epochs = [first_ids(source, (2 * epoch, 2 * epoch + 1)) for epoch in range(4)]
    assert all(sorted(epoch) == list(range(0, 100, 10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_every_id_is_a_target_once_an_epoch():
    source = loader(batch=5)
    targets = torch.cat([source.batch(step).targets.flatten() for step in range(2)])
    assert sorted(targets.tolist()) == list(range(1, 101))


def test_a_batch_may_span_epochs():
    source = loader(batch=4)
    ids = first_ids(source, range(5))
    assert sorted(ids[:10]) == sorted(ids[10:]) == list(range(0, 100, 10))


def test_without_shuffling_rows_come_in_order():
    assert first_ids(loader(shuffle=False), range(3)) == [*range(0, 100, 10), 0, 10]


@given(step=st.integers(0, 10**6), seed=st.integers(0, 2**63), world=st.sampled_from([1, 2, 3, 4, 6, 12]))
def test_the_global_batch_is_the_same_on_any_number_of_ranks(step, seed, world):
    alone = loader(batch=12, seed=seed).batch(step)
    ranks = [loader(batch=12, seed=seed, rank=rank, world=world).batch(step) for rank in range(world)]
    assert same(alone, [torch.cat(parts) for parts in zip(*ranks, strict=True)])


def test_resuming_is_exact_in_any_order_of_asking():
    source = loader()
    asked = [9, 0, 123, 2, 9, 1]
    assert all(same(source.batch(step), loader().batch(step)) for step in asked)


def test_the_seed_decides_the_order():
    orders = [tuple(first_ids(loader(seed=seed), range(2))) for seed in range(5)]
    assert len(set(orders)) == 5


def test_the_order_is_pinned():
    """A change here breaks the resuming of every run already begun."""
    assert first_ids(loader(), range(2)) == [60, 30, 40, 90, 0, 20, 80, 70]


def test_starts_mark_documents_from_real_shards(tmp_path):
    tokenizer = ByteTokenizer()
    write_shards([f"document {i}" for i in range(40)], tokenizer, tmp_path / "data", validation=0.1)
    stream = open_split(tmp_path / "data", "train")
    source = Loader(stream, BatchShape(batch=2, length=32, bos=tokenizer.bos, seed=0), shuffle=False)
    batch = source.batch(0)
    assert torch.equal(batch.tokens.flatten(), torch.from_numpy(stream.read(0, 64)))
    assert torch.equal(batch.starts, batch.tokens == tokenizer.bos)
    assert batch.starts[0, 0]
    assert 3 < batch.starts.sum() < 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 101}, "has 101 tokens but one row of length 101 needs 102"),
        ({"size": 0}, "has 0 tokens but one row of length 10 needs 11"),
        ({"batch": 0}, "batch 0"),
        ({"length": 0}, "length 0"),
        ({"seed": -1}, "seed -1"),
        ({"batch": 4, "world": 3}, "multiple of the world size"),
        ({"rank": 2, "world": 2}, "rank 2, world 2"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        loader(**options)


def test_one_row_is_enough():
    assert [loader(size=size).rows for size in (11, 20, 21, 100, 101)] == [1, 1, 2, 9, 10]
    with pytest.raises(ValueError, match="step -1 is negative"):
        loader().batch(-1)


# --- prefetching ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("first", "last"), [(0, 0), (3, 4), (0, 3), (5, 16), (4, 2)])
def test_prefetching_changes_nothing(first, last):
    source = loader()
    batches = list(prefetch(source, first, last))
    assert len(batches) == max(0, last - first)
    assert all(same(batch, source.batch(step)) for step, batch in enumerate(batches, first))
    assert not prefetchers()


def test_prefetching_works_ahead_in_the_background_but_not_too_far():
    built: list[tuple[int, bool]] = []
    fifth = threading.Event()

    class Watched(Counting):
        def read(self, start, stop):
            built.append((start, threading.current_thread() is threading.main_thread()))
            if len(built) == 5:
                fifth.set()
            return super().read(start, stop)

    stream = prefetch(Loader(Watched(1001), ONE, shuffle=False), 0, 100)
    next(stream)
    assert fifth.wait(120), "the thread should build four batches beyond the one handed out"
    stream.close()
    assert len(built) == 5
    assert not any(on_main for _, on_main in built)


def test_closing_early_leaves_no_thread():
    stream = prefetch(loader(), 0, 1_000_000)
    next(stream)
    assert prefetchers()
    stream.close()
    assert not prefetchers()


def test_errors_come_out_in_order_and_end_the_thread():
    class Broken(Counting):
        def read(self, start, stop):
            if start >= 20:
                raise ValueError("shard gone")
            return super().read(start, stop)

    source = Loader(Broken(101), ONE, shuffle=False)
    stream = prefetch(source, 0, 10)
    assert [int(next(stream).tokens[0, 0]) for _ in range(2)] == [0, 10]
    with pytest.raises(ValueError, match="shard gone"):
        next(stream)
    assert not prefetchers()
