"""Whose turn it is: the engine is driven by hand, cycle by cycle, so that no test depends on time."""

from __future__ import annotations

import asyncio
import time

import pytest
from serving import make_run

from lrt.config.decoding import SamplingParams
from lrt.inference.batch import Emission
from lrt.serve.engine import OLDEST_EVERY, Answer, BackgroundTask, Engine
from lrt.serve.metrics import Metrics
from lrt.serve.settings import Settings
from lrt.training import checkpoint

SHARED = [3 + i % 50 for i in range(128)]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return checkpoint.load_model(make_run(tmp_path_factory.mktemp("order") / "tiny", context=512), "cpu")


@pytest.fixture
def engine(loaded):
    """An engine whose thread never starts."""
    settings = Settings(rows=8, chunk=32, sweep_from=32)
    return Engine(loaded.model, settings, loaded.tokenizer.decode_bytes, Metrics())


def answer(number: int, prompt: list[int], tokens: int = 2) -> Answer:
    law = SamplingParams(temperature=0, max_new_tokens=tokens)
    return Answer(number, asyncio.Queue(), time.monotonic() + 1e6, prompt=prompt, sampling=law)


def prompt(number: int, length: int, shared: int = 0) -> list[int]:
    return [*SHARED[:shared], *(3 + (7 * number + i * i) % 90 for i in range(length))]


def first_tokens(engine: Engine, cycles: int = 200) -> list[int]:
    """The numbers of the answers, in the order in which their first tokens came."""
    for _ in range(cycles):
        if engine.idle:
            break
        engine._cycle()
    return list(dict.fromkeys(job.number for job, event in engine._outbox if isinstance(event.payload, Emission)))


def chunks_until_first(engine: Engine, monkeypatch) -> dict[int, int]:
    """Chunks of all lanes that had been computed when each answer had its first token."""
    done, chunks = {}, 0
    advance = engine._advance_lane

    def counted() -> None:
        nonlocal chunks
        chunks += 1
        advance()

    monkeypatch.setattr(engine, "_advance_lane", counted)
    while not engine.idle:
        engine._cycle()
        for job, event in engine._outbox:
            if isinstance(event.payload, Emission):
                done.setdefault(job.number, chunks)
    return done


def test_prompts_of_one_length_come_to_their_first_tokens_one_after_another(engine, monkeypatch):
    """In turns, all would wait for the last chunk of all."""
    engine.submit([answer(i, prompt(i, 161)) for i in range(4)])
    waited = sorted(chunks_until_first(engine, monkeypatch).values())
    assert len(waited) == 4
    assert waited[0] <= waited[-1] / 2
    assert sum(waited) / 4 <= 0.75 * waited[-1]


def test_a_short_prompt_does_not_wait_for_long_ones_that_came_before(engine):
    engine.submit([answer(0, prompt(0, 400)), answer(1, prompt(1, 400)), answer(2, prompt(2, 40))])
    assert first_tokens(engine)[0] == 2


def test_a_long_prompt_ends_though_shorter_ones_keep_coming(engine):
    """Every fourth chunk is its own."""
    long = answer(0, prompt(0, 321), tokens=1)
    engine.submit([long])
    for i in range(1, 2 * OLDEST_EVERY * 13):
        engine.submit([answer(i, prompt(i, 66), tokens=1)])
        engine._cycle()
        if long.made:
            return
    raise AssertionError("the long prompt was never taken in")


def test_tasks_end_beside_prompts_and_the_smaller_first(engine):
    order = []

    def work(name: str, chunks: int):
        for _ in range(chunks):
            yield
        order.append(name)

    tasks = [
        BackgroundTask(i, asyncio.Queue(), time.monotonic() + 1e6, left=left, work=lambda n=name, c=left: work(n, c))
        for i, (name, left) in enumerate({"large": 12, "small": 2}.items())
    ]
    engine.submit([*tasks, answer(9, prompt(9, 100))])
    assert first_tokens(engine) == [9]
    assert order == ["small", "large"]


def test_prompts_that_arrive_together_share_what_the_first_took_in(engine, loaded):
    """The part that is the same is swept once, and each answer is the one that it gets alone."""
    prompts = [prompt(i, 40, shared=128) for i in range(4)]
    answers = [answer(i, p, tokens=5) for i, p in enumerate(prompts)]
    engine.submit(answers)
    first_tokens(engine)
    assert engine.metrics.reused_tokens._value.get() == 3 * 128
    assert engine.metrics.swept_tokens._value.get() == 128 + 4 * 39
    for a, p in zip(answers, prompts, strict=True):
        alone = answer(0, p, tokens=5)
        single = Engine(loaded.model, engine.settings, loaded.tokenizer.decode_bytes, Metrics())
        single.submit([alone])
        first_tokens(single)
        assert a.made == alone.made


def test_samples_of_one_prompt_take_it_in_once(engine):
    engine.submit([answer(i, prompt(0, 161)) for i in range(3)])
    first_tokens(engine)
    assert engine.metrics.swept_tokens._value.get() == 160
    assert engine.metrics.reused_tokens._value.get() == 2 * 160
