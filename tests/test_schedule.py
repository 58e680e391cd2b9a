"""Schedules: text round trip, draws, slices, what they cost, stages."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from helpers import passes
from hypothesis import given
from hypothesis import strategies as st

from lrt.schedule import KINDS, Curriculum, Schedule, effective_forwards, raw_forwards
from lrt.span import Span


@st.composite
def spans(draw, lows: st.SearchStrategy[int], most: int = 5) -> Span:
    """Fixed sizes, uniform ranges, and ranges whose sizes have probabilities (some of them 0 between the ends).

    Adaptive ones cannot be drawn: test_adaptive.py.
    """
    low, more = draw(lows), draw(st.integers(0, most))
    if not more or draw(st.booleans()):
        return Span(low, low + more)
    ends, middle = st.integers(1, 9), st.lists(st.integers(0, 9), min_size=more - 1, max_size=more - 1)
    parts = [draw(ends), *draw(middle), draw(ends)]
    return Span(low, low + more, tuple(part / sum(parts) for part in parts))


sizes = spans(st.integers(1, 9))
weight_lists = st.lists(st.floats(0, 1e6), max_size=4).filter(lambda w: not w or sum(w) > 0)
schedules = st.builds(
    lambda kind, size, settle, weights, detach: Schedule(
        kind,
        size if kind in ("interleaved", "refinement", "chunked", "settled", "hop") else None,
        settle,
        weights,
        detach and kind != "hop",
    ),
    st.sampled_from(sorted(KINDS)),
    sizes,
    spans(st.integers(0, 2), 2),
    weight_lists.map(tuple),
    st.booleans(),
)


@given(schedules)
def test_text_round_trip(schedule: Schedule):
    assert Schedule.parse(str(schedule)) == schedule


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("interleaved-2", "interleaved-2"),
        (" settled-1..3 ", "settled-1..3"),
        ("settled-2..2", "settled-2"),
        ("refinement-2:weights=0.1/0.3/0.6", "refinement-2:weights=0.1/0.3/0.6"),
        ("parallel:detach:settle=0..2", "parallel:settle=0..2:detach"),
        ("chunked-3:settle=0", "chunked-3"),
        ("settled-1..3:p=0.8/0.1/0.1", "settled-1..3:p=0.8/0.1/0.1"),
        ("settled-1..3:p=.5/0/.5:detach", "settled-1..3:p=0.5/0/0.5:detach"),
        ("hop-0..2:p=0.7/0.2/0.1", "hop-0..2:p=0.7/0.2/0.1"),
        ("settled-1..3:tolerance=.1:budget=1.30", "settled-1..3:tolerance=0.1:budget=1.3"),
        ("parallel:settle=1..9:tolerance=1e-3:detach", "parallel:settle=1..9:tolerance=0.001:detach"),
        ("hop-1..2:p=.5/.5:settle=0..1:p=1e-3/0.999", "hop-1..2:p=0.5/0.5:settle=0..1:p=0.001/0.999"),
    ],
)
def test_text_forms(text: str, canonical: str):
    assert str(Schedule.parse(text)) == canonical


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("", "unknown schedule"), ("spiral-2", "interleaved"), ("interleaved", "interleaved-2"),
        ("parallel-3", "no size"), ("interleaved-0", "at least 1"), ("settled--1", "range such as 1..3"),
        ("settled-3..1", "rise"), ("interleaved-x", "'x'"), ("interleaved-1.5", "'1.5'"),
        ("refinement-0", "at least 1"),
        ("refinement-1:weights=", "weights"), ("refinement-1:weights=a/b", "a/b"), ("refinement-1:weights=-1", "-1"),
        ("refinement-1:weights=nan", "nan"), ("refinement-1:weights=inf", "inf"), ("parallel:weights=0", "not all 0"),
        ("parallel:fast", "'fast'"), ("parallel:detach=1", "detach=1"), ("parallel:settle=x", "'x'"),
        ("parallel:", "option"),
        ("settled-1..3:p=0.8/0.2", "each of the 3 sizes 1..3"), ("settled-1..3:p=0.8/0.1/0.2", "add up to 1"),
        ("settled-1..3:p=1/0/0", "ends are above 0"), ("settled-1..2:p=2/-1", "add up to 1"),
        ("settled-1..2:p=a/b", "p=a/b"), ("settled-1..2:p=nan/nan", "p=nan/nan"), ("settled-2:p=1", "fixed size 2"),
        ("parallel:p=0.5/0.5", "right after a range"), ("settled-1..2:detach:p=0.5/0.5", "right after a range"),
        ("hop", "hop-2"), ("hop-0:detach", "settled"),
        ("settled-1..3:tolerance=0", "tolerance=0 is not understood"), ("settled-1..3:tolerance=x", "tolerance=x"),
        ("settled-1..3:budget=2", "give a tolerance"), ("settled-2:tolerance=0.1", "fixed size 2"),
        ("settled-1..3:tolerance=0.1:budget=4", "1..3:tolerance=0.1:budget=2"),
        ("settled-1..3:p=1/0/1:tolerance=1", "add up to 1"), ("settled-1..2:p=0.5/0.5:tolerance=1", "tolerance=1"),
        ("settled-1..2:tolerance=1:p=0.5/0.5", "nothing adapts"), ("interleaved-2..3:tolerance=1", "only sweeps adapt"),
        ("settled-0..3:tolerance=1", "begin the range at 1"), ("chunked-2:settle=0..1:tolerance=1", "begin the range"),
        ("settled-1..2:tolerance=1:settle=1..2:tolerance=1", "two ranges that adapt"),
    ],
)  # fmt: skip
def test_bad_text_gets_one_line_with_a_remedy(text: str, names: str):
    with pytest.raises(ValueError) as error:
        Schedule.parse(text)
    assert names in str(error.value)
    assert "\n" not in str(error.value)


@given(st.text(alphabet="interlavdpskqu-:.=/0123456789wghm \n", max_size=30) | st.text(max_size=20))
def test_any_text_is_a_schedule_or_a_value_error(text: str):
    try:
        schedule = Schedule.parse(text)
    except ValueError:
        return
    assert Schedule.parse(str(schedule)) == schedule


def test_slices_of_every_kind():
    def drawn(text: str, length: int) -> list[str]:
        return [str(p) for p in passes(text, length)]

    assert drawn("parallel", 8) == ["0:8"]
    assert drawn("interleaved-3", 8) == ["0:8", "0:7:3", "1:8:3", "2:6:3"]
    assert drawn("interleaved-9", 2) == ["0:2", "0:1", "1:2"]  # more subsets than positions
    assert drawn("refinement-2", 8) == ["0:8"] * 3
    assert drawn("chunked-3", 8) == ["0:3", "3:6", "6:8"]
    assert drawn("sequential", 3) == ["0:1", "1:2", "2:3"]
    assert drawn("settled-2", 8) == ["0:8 no grad"] * 2 + ["0:8"]
    assert drawn("settled-0", 8) == ["0:8"]
    assert drawn("interleaved-2:settle=1:detach", 4) == [
        "0:4 no grad",
        "0:4 detached",
        "0:3:2 detached",
        "1:4:2 detached",
    ]
    assert drawn("settled-1:settle=2", 4) == ["0:4 no grad"] * 3 + ["0:4"]
    assert drawn("hop-0", 4) == ["0:4"] * 2
    assert drawn("hop-2", 4) == ["0:4 no grad"] * 2 + ["0:4"] * 2


def test_weights_go_to_passes_with_gradient_and_the_last_repeats():
    assert [p.weight for p in passes("interleaved-3:weights=0/2:settle=1", 6)] == [0, 0, 2, 2, 2]
    assert [p.weight for p in passes("refinement-2:weights=0.1/0.3/0.6", 6)] == [0.1, 0.3, 0.6]
    assert [p.weight for p in passes("settled-3", 6)] == [0, 0, 0, 1]
    assert passes("hop-2", 6) == passes("refinement-1:weights=0/1:settle=2", 6)
    with pytest.raises(ValueError, match="3 weights for 2 passes"):
        passes("refinement-1:weights=1/1/1", 6)


def test_ranges_must_be_drawn_and_rows_must_have_positions():
    for text in ("settled-1..3", "parallel:settle=0..1"):
        with pytest.raises(ValueError, match=r"range; call draw"):
            passes(text, 8)
    with pytest.raises(ValueError, match="row of 0 positions"):
        passes("parallel", 0)


@given(schedules, st.integers(0, 2**31), st.integers(0, 10**6))
def test_draw_is_a_function_of_seed_and_step(schedule: Schedule, seed: int, step: int):
    drawn = schedule.draw(seed, step)
    assert drawn == schedule.draw(seed, step)
    assert drawn in dict(schedule.shares())
    assert drawn.draw(seed + 1, step + 1) == drawn  # nothing left to draw
    assert (drawn.kind, drawn.weights, drawn.detach) == (schedule.kind, schedule.weights, schedule.detach)


def test_draws_differ_by_step_and_seed_and_cover_the_range():
    schedule = Schedule.parse("settled-1..3:settle=0..1")
    draws = [schedule.draw(0, step) for step in range(200)]
    assert set(map(str, draws)) == {str(drawn) for drawn, _ in schedule.shares()}
    assert len(schedule.shares()) == 6
    other = [schedule.draw(1, step) for step in range(200)]
    for part in ("size", "settle"):
        assert [getattr(d, part) for d in draws] != [getattr(d, part) for d in other]


def test_draws_are_the_same_in_every_version():
    """Pinned: a resumed run must draw what the interrupted one did, in whatever process."""
    schedule = Schedule.parse("settled-1..3")
    assert [schedule.draw(0, step).size.low for step in range(12)] == [2, 3, 3, 2, 1, 3, 2, 1, 3, 3, 3, 2]


def test_draws_with_probabilities_are_pinned_and_as_frequent_as_they_say():
    schedule = Schedule.parse("settled-1..3:p=0.8/0.1/0.1:settle=0..1:p=0.25/0.75")
    drawn = [schedule.draw(0, step) for step in range(6000)]
    assert [d.size.low for d in drawn[:12]] == PINNED
    for d, p in schedule.shares():
        assert abs(drawn.count(d) / len(drawn) - p) < 0.02
    assert sum(p for _, p in schedule.shares()) == pytest.approx(1)
    assert [d.size.low for d in drawn] != [schedule.draw(1, step).size.low for step in range(6000)]


PINNED = [1, 1, 1, 2, 1, 1, 1, 1, 1, 2, 1, 1]


def test_a_size_of_probability_0_is_never_drawn_nor_counted():
    schedule = Schedule.parse("settled-1..3:p=0.5/0/0.5")
    assert {schedule.draw(0, step).size.low for step in range(200)} == {1, 3}
    assert [(str(s), p) for s, p in schedule.shares()] == [("settled-1", 0.5), ("settled-3", 0.5)]


@given(schedules)
def test_shares_add_up_to_1_over_distinct_schedules(schedule: Schedule):
    drawn = schedule.shares()
    assert math.isclose(sum(p for _, p in drawn), 1)
    assert len(dict(schedule.shares())) == len(drawn)


def test_at_largest():
    assert str(Schedule.parse("settled-1..3:settle=0..2").at_largest()) == "settled-3:settle=2"
    assert str(Schedule.parse("parallel").at_largest()) == "parallel"


# What it costs: the table of docs/method.md#schedules.


@pytest.mark.parametrize(
    ("text", "raw", "effective"),
    [
        ("parallel", 1, 1), ("interleaved-2", 2, 2), ("interleaved-5", 2, 2), ("refinement-3", 4, 4),
        ("chunked-5", 1, 1),
        ("sequential", 1, 1), ("settled-3", 4, 2), ("settled-1..3", 3, 1 + 2 / 3), ("settled-0..3", 2.5, 1.5),
        ("interleaved-2:settle=0..3", 3.5, 2.5), ("settled-1..3:p=0.8/0.1/0.1", 2.3, 1 + 1.3 / 3),
        ("hop-0..2:p=0.7/0.2/0.1", 2.4, 2 + 0.4 / 3),
    ],
)  # fmt: skip
@pytest.mark.parametrize("length", [12, 13])
def test_forwards_per_token(text: str, raw: float, effective: float, length: int):
    schedule = Schedule.parse(text)
    assert math.isclose(raw_forwards(schedule, length), raw)
    assert math.isclose(effective_forwards(schedule, length), effective)


@pytest.mark.parametrize(
    ("text", "effective"),
    [
        ("parallel", 1), ("settled-3", 1 + 3 / 3 / 4), ("settled-1..3:p=0.8/0.1/0.1", 1 + 1.3 / 3 / 4),
        ("hop-0", 1 + 1 / 4), ("hop-2", 1 + 1 / 4 + 2 / 3 / 4), ("refinement-1", 2),
        ("interleaved-2:settle=1", 2 + 1 / 12),
        ("interleaved-2:weights=0/1", 2), ("parallel@0.5,settled-3", 0.5 + 0.5 * 1.25),
    ],
)  # fmt: skip
def test_a_pass_that_stops_at_the_source_block_counts_its_share_of_the_blocks(text: str, effective: float):
    assert math.isclose(effective_forwards(Curriculum.parse(text), 12, source=1 / 4), effective)


def test_forwards_are_the_mean_over_equally_likely_draws():
    schedule = Schedule.parse("settled-1..4")
    drawn = [raw_forwards(schedule.draw(3, step), 8) for step in range(3000)]
    assert abs(sum(drawn) / len(drawn) - raw_forwards(schedule, 8)) < 0.1


def test_a_curriculum_goes_from_stage_to_stage():
    plan = replace(Curriculum.parse("parallel@0.25,interleaved-2@0.5,settled-1..3"), steps=40)
    assert str(plan) == "parallel@0.25,interleaved-2@0.5,settled-1..3"
    kinds = [plan.at(step).kind for step in range(40)]
    assert kinds == ["parallel"] * 10 + ["interleaved"] * 10 + ["settled"] * 20
    assert [plan.draw(3, step) for step in (0, 30)] == [
        Schedule.parse("parallel"), Schedule.parse("settled-1..3").draw(3, 30)
    ]  # fmt: skip
    assert str(plan.at_largest()) == "settled-3"
    assert math.isclose(effective_forwards(plan, 8), 0.25 + 0.25 * 2 + 0.5 * (1 + 2 / 3))
    assert math.isclose(raw_forwards(plan, 8), 0.25 + 0.25 * 2 + 0.5 * 3)
    assert math.isclose(sum(share for _, share in plan.shares()), 1)


def test_a_curriculum_of_one_stage_is_its_schedule():
    plan, schedule = Curriculum.parse("settled-1..3"), Schedule.parse("settled-1..3")
    assert [plan.draw(5, step) for step in range(20)] == [schedule.draw(5, step) for step in range(20)]
    assert effective_forwards(plan, 16) == effective_forwards(schedule, 16)


@pytest.mark.parametrize(
    "text", ["parallel@1.5,settled-1", "parallel,settled-1", "parallel@0.5,parallel@0.4,settled-1"]
)
def test_stages_must_rise(text: str):
    with pytest.raises(ValueError, match=r"must end at a share of the steps that rises"):
        Curriculum.parse(text)
