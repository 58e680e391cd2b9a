"""Passes: slices as sets, the validity check, the exact prefix, what stops early, what is rewritten."""

from __future__ import annotations

import math

import pytest
from helpers import SCHEDULES, pass_lists, passes, slices
from hypothesis import given
from hypothesis import strategies as st

from lrt.passes import (
    Pass,
    check,
    effective_cost,
    exact_prefix,
    intersect,
    memory_only,
    repeated,
    rewriting,
    subtract,
    token_forwards,
)

anywhere = st.builds(
    lambda start, span, step: range(start, start + span, step),
    st.integers(-3, 30),
    st.integers(0, 40),
    st.integers(1, 9),
)


@given(anywhere, anywhere)
def test_intersect_is_that_of_the_sets(a: range, b: range):
    assert list(intersect(a, b)) == sorted(set(a) & set(b))


@given(anywhere, anywhere)
def test_subtract_is_that_of_the_sets_in_disjoint_slices_of_a(a: range, b: range):
    rest = subtract(a, b)
    assert sorted(t for part in rest for t in part) == sorted(set(a) - set(b))
    assert all(len(part) and part.step >= 1 and (len(part) == 1 or part.step % a.step == 0) for part in rest)


@pytest.mark.parametrize("stride", [1, 2, 3, 5])
@pytest.mark.parametrize("length", [5, 12, 13])
def test_subtract_leaves_one_slice_a_subset(stride: int, length: int):
    """What interleaved passes leave of a full one: S - 1 subsets, then S - 2, ..., never in pieces."""
    left = [range(length)]
    for i in range(stride):
        left = [part for at in left for part in subtract(at, range(i, length, stride))]
        assert len(left) <= stride - 1 - i


@pytest.mark.parametrize("bad", [range(0), range(3, 3), range(-1, 3), range(4, 0, -1)])
def test_a_pass_needs_rising_positions(bad: range):
    with pytest.raises(ValueError, match="start:stop:step"):
        Pass(bad)


@pytest.mark.parametrize(("weight", "grad"), [(-0.5, True), (1.0, False)])
def test_a_pass_without_gradient_has_no_loss(weight: float, grad: bool):
    with pytest.raises(ValueError, match="needs a gradient"):
        Pass(range(3), weight, grad)


@pytest.mark.parametrize(
    ("run", "hole"),
    [
        ([range(1, 4)], 0),
        ([range(0, 8, 2)], 1),
        ([range(4), range(5, 8)], 4),
        ([range(4), range(4, 8, 2)], 5),
        ([range(2), range(4), range(1, 9, 4)], 4),
    ],
)
def test_check_names_the_first_position_never_written(run: list[range], hole: int):
    with pytest.raises(ValueError, match=rf"attends to position {hole}, which no pass has written"):
        check([Pass(at) for at in run])


@given(st.lists(slices(8), max_size=6))
def test_check_is_that_of_the_sets(run: list[range]):
    written: set[int] = set()
    valid = True
    for at in run:
        valid &= set(range(at[-1] + 1)) <= written | set(at)
        written |= set(at)
    try:
        check([Pass(at) for at in run])
    except ValueError:
        assert not valid
    else:
        assert valid


@pytest.mark.parametrize("text", SCHEDULES)
@pytest.mark.parametrize("length", [1, 2, 5, 12, 13])
def test_every_schedule_is_valid_at_any_length(text: str, length: int):
    run = passes(text, length)
    check(run)
    assert set().union(*(p.positions for p in run)) == set(range(length))


@pytest.mark.parametrize(
    ("text", "length", "exact"),
    [
        ("parallel", 16, 1), ("settled-0", 16, 1), ("settled-3", 16, 4), ("sequential", 16, 16),
        ("refinement-1", 16, 2), ("refinement-3", 16, 4), ("refinement-15", 16, 16), ("refinement-99", 16, 16),
        ("interleaved-1", 16, 2), ("interleaved-2", 16, 2), ("interleaved-3", 16, 3), ("interleaved-8", 16, 8),
        ("interleaved-16", 16, 16), ("interleaved-99", 16, 16), ("interleaved-5", 13, 5),
        ("interleaved-4:settle=1", 16, 4),
        ("chunked-1", 16, 16), ("chunked-2", 16, 1), ("chunked-5", 16, 1), ("chunked-16", 16, 1), ("parallel", 1, 1),
    ],
)  # fmt: skip
def test_exact_prefix_figures(text: str, length: int, exact: int):
    assert exact_prefix(passes(text, length), length) == exact


@given(st.integers(2, 20), st.integers(2, 20))
def test_one_interleaved_sweep_is_exact_up_to_its_stride(stride: int, length: int):
    run = passes(f"interleaved-{stride}", length)
    assert exact_prefix(run, length) == min(max(stride, 2), length)
    assert exact_prefix(run[:1], length) == 1
    assert exact_prefix([], length) == 0


def test_two_sweeps_of_three_subsets():
    sweep = passes("interleaved-3", 12)
    assert exact_prefix([*sweep, *sweep[1:]], 12) == 6


@pytest.mark.parametrize(
    ("text", "early"),
    [
        ("parallel", [0]), ("settled-3", [1, 1, 1, 0]), ("interleaved-2", [0, 0, 0]), ("refinement-2", [0, 0, 0]),
        ("interleaved-2:weights=0/1", [0, 0, 0]), ("refinement-2:weights=0/0/1", [1, 1, 0]),
        ("interleaved-1:weights=0/1", [1, 0]), ("interleaved-2:settle=2", [1, 1, 0, 0, 0]),
        ("chunked-4:weights=0/1", [0, 0]), ("chunked-4:settle=1", [1, 0, 0]),
        ("hop-0", [1, 0]), ("hop-2", [1, 1, 1, 0]),
    ],
)  # fmt: skip
def test_memory_only_figures(text: str, early: list[int]):
    assert memory_only(passes(text, 8)) == [bool(x) for x in early]


def test_keys_that_only_passes_below_the_top_read_need_no_top():
    settle, strided, last = Pass(range(8), 0.0, False), Pass(range(1, 8, 2), 0.0, False), Pass(range(8))
    assert memory_only([settle, strided, last]) == [True, True, False]
    assert memory_only([settle, strided, Pass(range(4, 8)), last]) == [False, False, False, False]
    assert memory_only([settle, strided]) == [False, False]  # what lies there at the end may be continued from


@given(pass_lists())
def test_memory_only_means_no_loss_and_keys_that_nobody_reads(case: tuple[int, tuple[Pass, ...]]):
    """By brute force: follow every key of every pass until it is overwritten."""
    _, run = case
    early = memory_only(run)
    for i, p in enumerate(run):
        if not early[i]:
            continue
        assert p.weight == 0
        alive = set(p.positions)
        for later, stops in zip(run[i + 1 :], early[i + 1 :], strict=True):
            alive -= set(later.positions)
            assert stops or not any(t <= later.positions[-1] for t in alive)
        assert not alive


@given(pass_lists())
def test_effective_cost_is_the_sum_over_positions(case: tuple[int, tuple[Pass, ...]]):
    _, run = case
    stops = memory_only(run)
    cost = [(3 if p.grad else 1) / 3 * (0.3 if s else 1) for p, s in zip(run, stops, strict=True) for _ in p.positions]
    assert math.isclose(effective_cost(run, 0.3), sum(cost))
    spared = [0.2 / 3 for p, again in zip(run, repeated(run), strict=True) for _ in p.positions if again]
    assert math.isclose(effective_cost(run, 0.3, 0.2), sum(cost) - sum(spared))
    assert math.isclose(effective_cost(run), sum((3 if p.grad else 1) / 3 for p in run for _ in p.positions))


@given(pass_lists())
def test_repeated_passes_are_those_without_gradient_where_others_have_been(case: tuple[int, tuple[Pass, ...]]):
    _, run = case
    written: set[int] = set()
    for p, again in zip(run, repeated(run), strict=True):
        assert again == (not p.grad and set(p.positions) <= written)
        written |= set(p.positions)


@given(pass_lists())
def test_rewriting_is_that_of_the_sets(case: tuple[int, tuple[Pass, ...]]):
    _, run = case
    written: set[int] = set()
    for p, whole in zip(run, rewriting(run), strict=True):
        assert whole == (p.weight > 0 and set(p.positions) <= written)
        written |= set(p.positions)


def test_token_forwards_counts_every_pass_in_full():
    run = [Pass(range(8), 0.0, False), Pass(range(0, 8, 3)), Pass(range(4))]
    assert token_forwards(run, 8) == (8 + 3 + 4) / 8
