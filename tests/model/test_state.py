"""The buffer: after any passes it holds the newest state of every position, and only that; the views it hands out."""

from __future__ import annotations

import torch
from helpers import slices
from hypothesis import given
from hypothesis import strategies as st

from lrt.model.state import Buffer, CachedPrefix, PassInput, PassOutput

LENGTH, LAYERS, WIDTH, EARLY = 10, 3, 4, 1
runs = st.lists(st.tuples(slices(LENGTH), st.booleans()), min_size=1, max_size=6)
"""Passes: where, and whether they stop at the source block (`EARLY` layers)."""


def written(at: range, number: int, layers: int = LAYERS) -> PassOutput:
    """States that say where they come from: 100 x pass + position, and layer and kind behind the point."""
    label = torch.tensor([[100.0 * number + t for t in at]]).expand(2, -1)
    state = label[..., None].repeat(1, 1, WIDTH)
    keys = tuple(label[:, None, :, None].repeat(1, 2, 1, 2) + layer / 8 for layer in range(layers))
    return PassOutput(label.long(), state, state, keys, tuple(k + 0.5 for k in keys))


def opened(buffer: Buffer, at: range, blocks: range = range(LAYERS)) -> PassInput:
    """What a pass over `at` with tokens -t reads."""
    return buffer.open(at, -torch.tensor([list(at)] * 2), blocks)[0]


def filled(run) -> tuple[Buffer, dict[int, tuple[int, bool]]]:
    """The buffer after `run`, and the newest pass of every position."""
    buffer, newest = Buffer(), {}
    for number, (at, early) in enumerate(run, 1):
        buffer = buffer.write(at, written(at, number, EARLY if early else LAYERS))
        newest |= dict.fromkeys(at, number)
    return buffer, newest


@given(runs)
def test_segments_are_disjoint_and_hold_the_newest(run):
    buffer, newest = filled(run)
    places = [t for s in buffer.segments for t in s.positions]
    assert sorted(places) == sorted(newest)
    for s in buffer.segments:
        assert s.written.memory[0, :, 0].tolist() == [100 * newest[t] + t for t in s.positions]


@given(runs, slices(LENGTH))
def test_memory_is_the_newest_of_the_position_before(run, at: range):
    buffer, newest = filled(run)
    expected = [100 * newest[t - 1] + t - 1 if t - 1 in newest else 0 for t in at]
    memory = buffer.memory(at)
    if memory is None:
        assert not any(expected)
        assert not any(t - 1 in newest for t in at)
    else:
        assert memory.shape == (2, len(at), WIDTH)
        assert memory[1, :, 2].tolist() == expected


@given(runs, slices(LENGTH))
def test_previous_tokens_are_the_passs_own_and_the_newest_elsewhere(run, at: range):
    buffer, newest = filled(run)
    expected = [1 - t if t - 1 in at else 100 * newest[t - 1] + t - 1 if t - 1 in newest else -1 for t in at]
    assert opened(buffer, at, range(EARLY)).previous[1].tolist() == expected


@given(runs, slices(LENGTH))
def test_what_is_read_is_everything_but_the_pass_itself_up_to_its_end(run, at: range):
    run = [(where, False) for where, _ in run]
    buffer, newest = filled(run)
    read, own = opened(buffer, at), written(at, 99)
    assert read.positions.tolist() == list(at)
    for i, layer in enumerate(read.kv or ()):
        keys, values = layer.extend(own.keys[i], own.values[i])
        places = layer.positions.tolist()
        needed = {t for t in newest if t <= at[-1]} | set(at)
        assert len(set(places)) == len(places)
        assert needed <= set(places) <= set(newest) | set(at)
        labels = [(9900 if t in at else 100 * newest[t]) + t + i / 8 for t in places]
        assert keys[1, 1, :, 0].tolist() == labels
        assert values[0, 0, :, 1].tolist() == [x + 0.5 for x in labels]


@given(runs, slices(LENGTH))
def test_a_pass_sees_itself_alone_only_if_nothing_else_stands_before_its_end(run, at: range):
    buffer, newest = filled(run)
    others = {t for t in newest if t <= at[-1]} - set(at)
    if opened(buffer, at, range(EARLY)).kv is None:
        assert not others
    else:  # a segment of larger stride may begin below and be seen
        assert any(s.positions[0] <= at[-1] for s in buffer.segments if set(s.positions) - set(at))


@given(runs, slices(LENGTH))
def test_opening_leaves_the_buffer_less_what_the_pass_will_rewrite(run, at: range):
    buffer, newest = filled(run)
    tokens = torch.zeros(2, len(at), dtype=torch.int64)
    _, rest = buffer.open(at, tokens, range(EARLY))
    assert sorted(t for s in rest.segments for t in s.positions) == sorted(set(newest) - set(at))


def test_views_share_storage_with_what_was_written():
    whole = written(range(8), 1)
    buffer = Buffer().write(range(8), whole).write(range(1, 8, 2), written(range(1, 8, 2), 2))
    for s in buffer.segments[1:]:
        assert s.written.keys[0].untyped_storage().data_ptr() == whole.keys[0].untyped_storage().data_ptr()
    assert buffer.memory(range(1, 8, 2)).untyped_storage().data_ptr() == whole.memory.untyped_storage().data_ptr()


def test_write_and_detach_leave_the_old_buffer_as_it_was():
    state = written(range(4), 1)
    first = Buffer().write(range(4), state._replace(memory=state.memory.requires_grad_()))
    second = first.write(range(2), written(range(2), 2))
    assert [s.positions for s in first.segments] == [range(4)]
    assert second.segments[0].positions == range(2)
    assert first.memory(range(1, 5)).requires_grad
    assert not first.detach().memory(range(1, 5)).requires_grad
    assert torch.equal(first.detach().memory(range(1, 5)), first.memory(range(1, 5)))


def test_take_picks_rows():
    state = written(range(4), 1)
    both = torch.stack((state.memory[0], -state.memory[1]))
    buffer = Buffer().write(range(4), state._replace(memory=both))
    taken = buffer.take(torch.tensor([1]))
    assert torch.equal(taken.memory(range(1, 5)), -state.memory[1:])
    assert taken.segments[0].written.keys[0].shape[0] == 1


def test_gradient_flows_to_exactly_what_is_read():
    state = written(range(6), 1)
    source = state.memory.requires_grad_()
    buffer = Buffer().write(range(6), state._replace(memory=source)).write(range(3, 4), written(range(3, 4), 2))
    buffer.memory(range(0, 6, 2)).sum().backward()  # reads -1, 1, 3; 3 is no longer the first pass's
    assert source.grad[0, :, 0].tolist() == [0, 1, 0, 0, 0, 0]


def test_a_cached_prefix_stands_before_position_0_in_every_layer():
    """Rows that have seen 3 and 5 tokens: positions become absolute, the memory of position 0 is the prefix's."""
    length = torch.tensor([3, 5])
    before = torch.arange(6).expand(2, -1) - 1
    layers = [(torch.full((2, 2, 6, 2), 7.0), torch.full((2, 2, 6, 2), 8.0), before)] * LAYERS
    buffer = Buffer(
        prefix=CachedPrefix(length, torch.full((2, WIDTH), -5.0), torch.tensor([4, 6]), torch.tensor([0, 2]), layers)
    )
    buffer = buffer.write(range(2), written(range(2), 1))
    assert buffer.memory(range(3))[0, :, 0].tolist() == [-5, 100, 101]
    assert buffer.memory(range(1, 3))[0, :, 0].tolist() == [100, 101]
    for before, first in ((buffer, [4, 6]), (Buffer(), [-1, -1])):
        previous = before.open(range(2), torch.tensor([[7, 8], [9, 1]]), range(LAYERS))[0].previous
        assert previous.tolist() == [[first[0], 7], [first[1], 9]]
    read = opened(buffer, range(2, 4))
    assert read.positions.tolist() == [[5, 6], [7, 8]]
    assert read.kv[0].positions.tolist() == [[5, 6, 3, 4, *range(-1, 5)], [7, 8, 5, 6, *range(-1, 5)]]
    own = written(range(2, 4), 2)
    keys, values = read.kv[2].extend(own.keys[2], own.values[2])
    assert keys[0, 0, :, 0].tolist() == [202.25, 203.25, 100.25, 101.25, *[7.0] * 6]
    assert values.shape == keys.shape
    row = buffer.take(torch.tensor([1]))
    assert row.prefix.length.tolist() == [5]
    assert row.open(range(2, 4), torch.zeros(1, 2).long(), range(LAYERS))[0].positions.tolist() == [[7, 8]]


@given(runs, slices(LENGTH))
def test_what_no_memory_reaches_is_that_of_every_position_in_order(run, at: range):
    """Positions in any number of segments; those that hold no stream are not known."""
    buffer, newest = Buffer(), {}
    for number, (place, unknown) in enumerate(run, 1):
        states = written(place, number)
        buffer = buffer.write(place, states._replace(below=None if unknown else states.memory + 0.25))
        newest |= dict.fromkeys(place, 0 if unknown else number)
    assert buffer.knows(at) == all(newest.get(t, 0) for t in at)
    if buffer.knows(at):
        read, labels = opened(buffer, at, range(2, LAYERS)), [100 * newest[t] + t for t in at]
        assert read.below is not None
        assert read.below.stream[1, :, 0].tolist() == [x + 0.25 for x in labels]
        assert [k[1, 1, :, 0].tolist() for k in read.below.keys] == [labels, [x + 1 / 8 for x in labels]]
        assert [v[1, 1, :, 0].tolist() for v in read.below.values] == [
            [x + 0.5 + i / 8 for x in labels] for i in (0, 1)
        ]
