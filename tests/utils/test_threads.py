"""Threads are chosen by a measurement made here and now."""

from __future__ import annotations

import pytest
import torch

from lrt.utils import threads
from lrt.utils.threads import choose_threads


@pytest.mark.parametrize(
    ("seconds", "chosen", "why"),
    [
        ((1.0, 40.0), 1, "2 take 40.0 times as long"),
        ((1.0, 0.5), 2, "2.0 times as fast"),
        ((1.0, 0.99), 1, "1.0 times"),
    ],
)
def test_the_faster_number_is_taken(seconds, chosen, why, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(threads, "_medians", lambda work, counts: seconds)
    found = choose_threads(64, 1024)
    assert found.threads == chosen and why in found.why


def test_a_single_thread_needs_no_measurement(monkeypatch):
    monkeypatch.setattr(threads, "_medians", None)
    assert choose_threads(64, 1024).threads == 1


def test_measuring_runs_the_work_in_turns_and_restores_the_threads():
    ran: list[int] = []
    one, two = threads._medians(lambda: ran.append(torch.get_num_threads()), (1, 2))
    assert ran[:4] == [1, 2, 1, 2] and torch.get_num_threads() == 1
    assert one > 0 and two > 0


def test_the_sample_of_work_has_gradients():
    threads._mlp_step(8, 16)()


@pytest.mark.slow
def test_the_choice_is_no_slower_than_the_other(monkeypatch):
    torch.set_num_threads(2)
    try:
        found = choose_threads(32, 512)
        one, both = threads._medians(threads._mlp_step(32, 512), (1, 2))
    finally:
        torch.set_num_threads(1)
    assert (one if found.threads == 1 else both) < 3 * min(one, both)
