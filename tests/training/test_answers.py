"""Fine-tuning on dialogues: the loss is of the answers alone, its gradient that of targets masked by hand."""

from __future__ import annotations

import json
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import config, near, randomised, tiny

from lrt.config.decoding import NEXT, TURN, SamplingParams
from lrt.config.recipes import cpu_demo
from lrt.config.run import DataConfig
from lrt.data.loader import BatchShape, Loader
from lrt.data.prepare import prepare
from lrt.data.tokenizer import ByteTokenizer
from lrt.inference.chat import Conversation
from lrt.model.loss import ScheduledLoss
from lrt.model.run_passes import run_passes
from lrt.model.shapes import IGNORE
from lrt.schedule import Schedule
from lrt.training.checkpoint import load_model
from lrt.training.trainer import train

LETTERS = "abcdefghij"


@pytest.fixture(scope="module")
def talks(tmp_path_factory) -> Path:
    """Digits are asked for, the letter of that place is answered; one to three turns each."""
    draw, rows = random.Random(0), []
    for _ in range(400):
        digits = [draw.randrange(10) for _ in range(draw.randint(1, 3))]
        pairs = [({"role": "user", "content": str(d)}, {"role": "assistant", "content": LETTERS[d]}) for d in digits]
        rows.append({"messages": [message for pair in pairs for message in pair]})
    file = tmp_path_factory.mktemp("talks") / "talks.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return file


def by_hand(ids: torch.Tensor) -> torch.Tensor:
    """Targets of a stream of bytes, from its text: what follows BOT:, up to the end of the next USER:."""
    text = "".join(chr(i) if i < 256 else "\0" for i in ids.tolist())
    learned = torch.zeros(len(text), dtype=torch.bool)
    for answer in re.finditer(r"BOT:([^\0]*?\nUSER:)", text):
        learned[answer.start(1) : answer.end(1)] = True
    return ids.masked_fill(~learned, IGNORE)


@pytest.mark.parametrize("schedule", ["parallel", "settled-1", "interleaved-2"])
def test_gradients_are_those_of_targets_masked_by_hand(schedule: str, talks: Path, tmp_path: Path):
    data = prepare(DataConfig(source=str(talks), tokenizer="bytes", validation=0.1, folder=str(tmp_path)))
    batch = Loader(data.train, BatchShape(batch=3, length=60, bos=256, seed=0), shuffle=False).batch(0)
    targets = by_hand(torch.from_numpy(data.train.read(0, len(data.train))))[1:181].view(3, 60)
    assert torch.equal(batch.targets, targets)
    assert 0.2 < (targets == IGNORE).float().mean() < 0.8
    ours, theirs = randomised(config(vocab_size=257, bos=256)), randomised(config(vocab_size=257, bos=256))
    loss = ScheduledLoss(ours, Schedule.parse(schedule))(*batch).loss
    expected = slow(theirs, schedule, batch, targets)
    loss.backward()
    expected.backward()
    assert near(loss.detach(), expected.detach())
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert a.grad is not None and near(a.grad, torch.zeros_like(a) if b.grad is None else b.grad)


def slow(model, schedule: str, batch, targets: torch.Tensor) -> torch.Tensor:
    """Each pass's mean over its answers, from all logits at once; passes weigh alike."""
    means = []
    for p, written, _ in run_passes(model, batch.tokens, Schedule.parse(schedule).passes(60), batch.starts):
        if p.weight:
            cut = slice(p.positions.start, p.positions.stop, p.positions.step)
            logits, aims = model.logits(written.hidden), targets[:, cut]
            nats = F.cross_entropy(logits.flatten(0, 1), aims.clamp(min=0).flatten(), reduction="none")
            kept = (aims != IGNORE).flatten()
            means.append((nats * kept).sum() / kept.sum())
    return torch.stack(means).mean()


@pytest.mark.slow
def test_a_model_learns_to_answer_in_turns_and_its_score_says_what_it_is_of(talks: Path, tmp_path: Path):
    base = tiny(cpu_demo(), talks, steps=120)
    base = replace(base, optim=replace(base.optim, matrix_lr=0.05))
    result = train(base, tmp_path / "run")
    assert result.bpb.text == f"the answers in the validation split of {talks}"
    assert result.bpb.decoded < 0.2
    loaded = load_model(tmp_path / "run")
    talk = Conversation(loaded.model, loaded.tokenizer)
    sampling = SamplingParams(temperature=0, max_new_tokens=12, stop=(NEXT,))
    answers = ["".join(talk.say(TURN.format(digit), sampling)) for digit in "3719"]
    assert answers == [" d", " h", " b", " j"]
    assert isinstance(loaded.tokenizer, ByteTokenizer)
