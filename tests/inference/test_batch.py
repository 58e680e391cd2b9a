"""The running batch: requests that join and leave at any time get what they would get alone."""

from __future__ import annotations

import torch
from helpers import config, fixed
from hypothesis import given, settings
from hypothesis import strategies as st

from lrt.config.decoding import SamplingParams
from lrt.inference.batch import Request, RunningBatch
from lrt.inference.generate import generate
from lrt.inference.prefill import prefill
from lrt.model.kv_cache import KVCache

CFG = config()
ROWS = 6
ARRIVALS = st.lists(
    st.tuples(
        st.integers(0, 6),  # steps after the one before
        st.lists(st.integers(0, CFG.vocab_size - 1), min_size=1, max_size=9),
        st.builds(
            SamplingParams,
            max_new_tokens=st.integers(1, 6),
            temperature=st.sampled_from([0.0, 0.9]),
            top_k=st.sampled_from([None, 4]),
            repetition_penalty=st.sampled_from([1.0, 1.4]),
            presence_penalty=st.sampled_from([0.0, 0.6]),
            logit_bias=st.sampled_from([(), ((3, 2.0),)]),
            min_new_tokens=st.sampled_from([0, 3]),
            seed=st.integers(0, 9),
            stop_tokens=st.sampled_from([(), (1, 2)]),
        ),
        st.booleans(),  # whether all but the last token of the prompt come as a state
    ),
    min_size=1,
    max_size=9,
)


def alone(prompt: list[int], law: SamplingParams) -> list[tuple[int, float]]:
    made = generate(fixed(CFG), [prompt], law, mode="exact")
    return [(e.token, e.logprob) for step in made for e in step.emissions]


def seat(batch: RunningBatch, row: int, prompt: list[int], law: SamplingParams, as_state: bool) -> Request:
    model, known = fixed(CFG), len(prompt) - 1 if as_state else 0
    state = KVCache.empty(model, 1, batch.cache.capacity)
    if known:
        state = prefill(model, torch.tensor([prompt[:known]]), cache=state, mode="exact").cache
    request = Request(
        row, law, law.stop_tokens or (), law.max_new_tokens, None,
        length=known, prompt=prompt[known:][::-1], top=3,
    )  # fmt: skip
    batch.join(request, prompt, state)
    return request


@settings(max_examples=15)
@given(ARRIVALS, st.sampled_from([(), (2, 4)]))
def test_requests_that_come_and_go_get_what_they_get_alone(arrivals, shapes):
    batch = RunningBatch(fixed(CFG), KVCache.empty(fixed(CFG), ROWS, 40), shapes=shapes)
    queue, got, seats, clock, due = list(enumerate(arrivals)), {}, {}, 0, 0
    while queue or batch.running:
        free = [row for row in range(ROWS) if batch.requests[row] is None]
        while queue and free and clock >= due + queue[0][1][0]:
            number, (wait, prompt, law, as_state) = queue.pop(0)
            due += wait
            row = free.pop(0)
            seat(batch, row, prompt, law, as_state)
            seats[row], got[number] = number, []
        if batch.running:
            for e in batch.draw():
                got[seats[e.row]].append((e.token, e.logprob))
                assert e.top[0][1] >= e.logprob and len(e.top) == 3
                if e.finish:
                    batch.leave(e.row)
        if batch.running:
            batch.advance()
        clock += 1
    for number, (_, prompt, law, _) in enumerate(arrivals):
        expected = alone(prompt, law)
        assert [t for t, _ in got[number]] == [t for t, _ in expected]
        torch.testing.assert_close(
            torch.tensor([x for _, x in got[number]]), torch.tensor([x for _, x in expected]), atol=1e-10, rtol=1e-10
        )


def test_a_row_that_left_is_taken_by_the_next_without_a_trace():
    batch = RunningBatch(fixed(CFG), KVCache.empty(fixed(CFG), 1, 40))
    law = SamplingParams(max_new_tokens=9, temperature=0, stop_tokens=())
    seat(batch, 0, [3, 4, 5, 6], law, as_state=False)
    for _ in range(7):  # abandoned while it answers
        batch.draw()
        batch.advance()
    batch.leave(0)
    assert batch.running == []
    seat(batch, 0, [7, 8], law, as_state=False)
    made = []
    while batch.running:
        made += batch.draw()
        if batch.running:
            batch.advance()
    assert [e.token for e in made] == [t for t, _ in alone([7, 8], law)]
    assert batch.cache.longest <= 10


def test_logits_that_are_not_finite_end_their_row_alone_and_leave_no_trace():
    model, law = fixed(CFG), SamplingParams(max_new_tokens=8, temperature=0, stop_tokens=())
    batch = RunningBatch(model, KVCache.empty(model, 2, 40))
    seat(batch, 0, [3, 4, 5], law, as_state=False)
    seat(batch, 1, [7, 8], law, as_state=False)
    made = {0: [], 1: []}
    while batch.running:
        for e in batch.draw():
            made[e.row].append(e)
        if len(made[0]) == 3 and not made[0][-1].finish:
            assert batch._logits is not None
            for x in (*batch.cache.keys, *batch.cache.values, batch.cache.memory):
                x[0] = float("nan")  # as an overflow would
        if batch.running:
            batch.advance()
    assert made[0][-1].finish == "error" and "not finite" in made[0][-1].fault
    assert [e.token for e in made[0][:-1]] == [t for t, _ in alone([3, 4, 5], law)][:3]
    assert [e.token for e in made[1]] == [t for t, _ in alone([7, 8], law)]
    batch.leave(0)
    seat(batch, 0, [9, 2], law, as_state=False)
    tokens = []
    while batch.running:
        tokens += [e.token for e in batch.draw()]
        if batch.running:
            batch.advance()
    assert tokens == [t for t, _ in alone([9, 2], law)]


class Evens:
    """A constraint: even tokens alone, and after `limit` of them an error."""

    def __init__(self, limit: int):
        self.taken, self.limit = [], limit

    def allowed(self) -> torch.Tensor:
        return torch.arange(CFG.vocab_size) % 2 == 0

    def take(self, token: int) -> None:
        self.taken.append(token)
        if len(self.taken) > self.limit:
            raise ArithmeticError("no more")


def test_a_constraint_binds_its_row_and_its_error_ends_its_row_alone():
    model, law = fixed(CFG), SamplingParams(max_new_tokens=8, seed=3, stop_tokens=())
    batch = RunningBatch(model, KVCache.empty(model, 3, 40))
    for row, constraint in ((0, Evens(3)), (1, None), (2, Evens(99))):
        seat(batch, row, [3, 4, 5], law, as_state=False).constraint = constraint
    made = {0: [], 1: [], 2: []}
    while batch.running:
        for e in batch.draw():
            made[e.row].append(e)
        if batch.running:
            batch.advance()
    assert [e.finish for e in made[0]] == [None] * 3 + ["error"] and "no more" in made[0][-1].fault
    assert [e.token for e in made[1]] == [t for t, _ in alone([3, 4, 5], law)]
    assert len(made[2]) == 8 and all(e.token % 2 == 0 for e in made[2])
    assert any(e.token % 2 for e in made[1])


def test_stop_tokens_wait_for_the_least_length():
    model = fixed(CFG)
    free = alone([3, 4, 5], SamplingParams(max_new_tokens=8, temperature=0, stop_tokens=()))
    stop = (free[1][0],)
    short = alone([3, 4, 5], SamplingParams(max_new_tokens=8, temperature=0, stop_tokens=stop))
    assert len(short) <= 2
    long = alone([3, 4, 5], SamplingParams(max_new_tokens=8, temperature=0, stop_tokens=stop, min_new_tokens=6))
    assert len(long) >= 7 and stop[0] not in [t for t, _ in long[:6]]
    assert model is fixed(CFG)
